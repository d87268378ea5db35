/* SPDX-License-Identifier: MIT */
/*
 * A real-mode guest, flat at base 0 with 4 GiB segment limits, that does one access at a time on
 * the VMM's command.  smm.py puts a second copy where SMM begins; so it knows no address of its own.
 *
 *   as --32 -o smm.o smm.S && ld -m elf_i386 -Ttext=0x1000 -e round --oformat binary -o smm.bin smm.o
 */
	.code16
	.set	COMMAND, 0xe0		/* IN, 1 byte: what to do */
	.set	LOADED, 0xe2		/* OUT, 1 byte: what a load gave */
	.set	ADDRESS, 0xe4		/* IN, 4 bytes: where to do it */
	.set	STRING, 0xe8		/* OUTSB and INSB */
	.set	STORED, 0x5a		/* what a store writes */

	.globl	round
round:
	inl	$ADDRESS, %eax
	movl	%eax, %esi
	movl	%eax, %edi
	movw	$STRING, %dx
	cld
	inb	$COMMAND, %al
	decb	%al
	jz	1f
	decb	%al
	jz	2f
	decb	%al
	jz	3f
	decb	%al
	jz	4f
	decb	%al
	jz	5f
	jmp	round			/* any other command: nothing */

1:	movb	(%esi), %al
	outb	%al, $LOADED
	jmp	round

2:	movb	$STORED, (%edi)
	jmp	round

3:	addr32 outsb
	jmp	round

4:	addr32 insb
	jmp	round

5:	rsm
