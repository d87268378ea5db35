/* SPDX-License-Identifier: MIT */
/*
 * A 32-bit guest with paging that loads from or stores to one virtual address on the VMM's command.
 * overwrite.py makes its page tables.
 *
 *   as --32 -o overwrite.o overwrite.S &&
 *   ld -m elf_i386 -Ttext=0x1000 -e round --oformat binary -o overwrite.bin overwrite.o
 */
	.code32
	.set	COMMAND, 0xe0		/* IN, 1 byte: 1 load, any other store */
	.set	LOADED, 0xe2		/* OUT, 1 byte: what a load gave */
	.set	TARGET, 0x400000
	.set	STORED, 0x5a		/* what a store writes */

	.globl	round
round:
	inb	$COMMAND, %al
	decb	%al
	jnz	1f
	movb	TARGET, %al
	outb	%al, $LOADED
	jmp	round

1:	movb	$STORED, TARGET
	jmp	round
