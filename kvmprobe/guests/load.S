/* SPDX-License-Identifier: MIT */
/*
 * A real-mode guest, flat at base 0, that does one round of chosen accesses and halts, for ever.
 * load.py knows these addresses.  Each vCPU has a page of its own, at FS.
 *
 *   as --32 -o load.o load.S && ld -m elf_i386 -Ttext=0x1000 -e round --oformat binary -o load.bin load.o
 */
	.code16
	.set	PARAMS, 0x2000		/* how often a round does each kind: 16 bits each */
	.set	N_MMIO, PARAMS + 0	/* a 4-byte write and a 4-byte read of the hole */
	.set	N_PIO, PARAMS + 2	/* a byte OUT and a byte IN */
	.set	N_RAM, PARAMS + 4	/* an increment of RAM_DONE */
	.set	N_OUTS_RAM, PARAMS + 6	/* bytes of REP OUTSB from RAM */
	.set	N_INS_RAM, PARAMS + 8	/* bytes of REP INSB into RAM */
	.set	N_OUTS_MMIO, PARAMS + 10 /* bytes of REP OUTSB from the hole */
	.set	N_INS_MMIO, PARAMS + 12	/* bytes of REP INSB into the hole */

	.set	RAM_DONE, 0		/* in the vCPU's page: 32 bits */
	.set	LAST_MMIO, 4		/* what the last read of the hole gave: 32 bits */
	.set	LAST_IN, 8		/* what the last IN gave: 8 bits */
	.set	BUFFER, 0x800		/* 2048 bytes for the string instructions */

	.set	HOLE, 0xf000		/* a page without a memslot */
	.set	PORT, 0x10

	.globl	round
round:
	movw	N_MMIO, %cx
	jcxz	2f
1:	movl	%ecx, HOLE
	movl	HOLE, %eax
	loop	1b
	movl	%eax, %fs:LAST_MMIO

2:	movw	N_PIO, %cx
	jcxz	4f
3:	outb	%al, $PORT
	inb	$PORT, %al
	loop	3b
	movb	%al, %fs:LAST_IN

4:	movw	N_RAM, %cx
	jcxz	6f
5:	incl	%fs:RAM_DONE
	loop	5b

6:	cld
	movw	$PORT, %dx
	movw	N_OUTS_RAM, %cx
	movw	$BUFFER, %si
	rep outsb %fs:(%si), %dx

	movw	N_INS_RAM, %cx
	movw	$BUFFER, %di
	movw	%fs, %ax
	movw	%ax, %es
	rep insb

	xorw	%ax, %ax
	movw	%ax, %es
	movw	N_OUTS_MMIO, %cx
	movw	$HOLE, %si
	rep outsb

	movw	N_INS_MMIO, %cx
	movw	$HOLE, %di
	rep insb

	hlt
	jmp	round
