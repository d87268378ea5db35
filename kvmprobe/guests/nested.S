/* SPDX-License-Identifier: MIT */
/*
 * L1 in long mode, which does what the VMM asks for at port COMMAND, and its L2.  nested.py puts
 * both into memory at 0x1000 with the page tables, the VMCB and the list of VMCS fields.
 *
 *   as --64 -o nested.o nested.S && ld -Ttext=0x1000 -e start --oformat binary -o nested.bin nested.o
 */
	.code64
	.set	TARGET, 0x2000		/* the gpa (and gva) to touch: 64 bits */
	.set	IS_AMD, 0x2008		/* 0 or 1: 64 bits */
	.set	SCRATCH, 0x2010
	.set	FIELDS, 0x3000		/* VMCS: field, capability MSR or 0, value (32, 32, 64 bits) */
	.set	VMXON_REGION, 0x4000
	.set	VMCS, 0x5000
	.set	VMCB, 0x6000
	.set	HOST_SAVE, 0x7000
	.set	STACK, 0x9000

	.set	COMMAND, 0x10		/* IN: the next step, a number below */
	.set	LOADED, 0x11		/* OUT: the byte that L1's or L2's load gave */
	.set	STRING_OUT, 0x12	/* OUTSB from TARGET */
	.set	STRING_IN, 0x13		/* INSB to TARGET */
	.set	DONE, 0x14		/* OUT: a step without a result is over */
	.set	FAILED, 0x1f		/* OUT: a 32-bit reason, and the guest halts */

	.set	VMCB_EXITCODE, VMCB + 0x70
	.set	VMCB_RIP, VMCB + 0x578
	.set	VMCB_RAX, VMCB + 0x5f8
	.set	EXIT_VMMCALL, 0x81
	.set	EXIT_VMCALL, 18

	.globl	start
start:
	movl	$STACK, %esp
	movq	IS_AMD, %r10
	testq	%r10, %r10
	jnz	1f

	movl	$0x3a, %ecx		/* IA32_FEATURE_CONTROL: lock, VMXON outside SMX */
	rdmsr
	testb	$1, %al
	jnz	2f
	movl	$5, %eax
	xorl	%edx, %edx
	wrmsr
2:	movl	$0x480, %ecx		/* IA32_VMX_BASIC: revision */
	rdmsr
	movl	%eax, VMXON_REGION
	movl	%eax, VMCS
	movq	$VMXON_REGION, SCRATCH
	vmxon	SCRATCH
	jbe	failed
	jmp	next

1:	movl	$0xc0010117, %ecx	/* VM_HSAVE_PA */
	movl	$HOST_SAVE, %eax
	xorl	%edx, %edx
	wrmsr

next:
	movq	TARGET, %rbx
	cld
	inb	$COMMAND, %al
	cmpb	$1, %al
	je	load
	cmpb	$2, %al
	je	store
	cmpb	$3, %al
	je	string_out
	cmpb	$4, %al
	je	string_in
	cmpb	$5, %al
	je	forced_load
	leaq	l2_load, %r8
	cmpb	$6, %al
	je	run_l2
	leaq	l2_store, %r8
	cmpb	$7, %al
	je	run_l2
	cmpb	$8, %al
	je	spin
	cmpb	$9, %al
	je	forced_sidt
	hlt

load:
	movb	(%rbx), %al
	outb	%al, $LOADED
	jmp	next
store:
	movb	$0x5a, (%rbx)
	outb	%al, $DONE
	jmp	next
string_out:
	movq	%rbx, %rsi
	movw	$STRING_OUT, %dx
	outsb
	outb	%al, $DONE
	jmp	next
string_in:
	movq	%rbx, %rdi
	movw	$STRING_IN, %dx
	insb
	outb	%al, $DONE
	jmp	next
forced_load:				/* with kvm.force_emulation_prefix=1 */
	ud2
	.ascii	"kvm"
	movb	(%rbx), %al
	outb	%al, $LOADED
	jmp	next
forced_sidt:				/* a store that KVM emulates without asking its cache */
	ud2
	.ascii	"kvm"
	sidt	(%rbx)
	outb	%al, $DONE
	jmp	next
spin:					/* with exits: Bochs takes no interrupt in a loop without */
	outb	%al, $DONE
	jmp	spin

run_l2:					/* at %r8; its %al goes to LOADED */
	testq	%r10, %r10
	jnz	1f

	movq	$VMCS, SCRATCH
	vmclear	SCRATCH
	jbe	failed
	vmptrld	SCRATCH
	jbe	failed
	movl	$FIELDS, %esi
2:	movl	(%rsi), %edi
	testl	%edi, %edi
	jz	4f
	movq	8(%rsi), %r11
	movl	4(%rsi), %ecx
	jrcxz	3f
	rdmsr				/* %eax: bits that must be 1; %edx: bits that may be */
	orl	%eax, %r11d
	andl	%edx, %r11d
3:	vmwrite	%r11, %rdi
	jbe	failed
	addl	$16, %esi
	jmp	2b
4:	movl	$0x681e, %edi		/* guest RIP */
	vmwrite	%r8, %rdi
	movl	$0x6c16, %edi		/* host RIP */
	leaq	vm_exit, %r11
	vmwrite	%r11, %rdi
	movl	$0x6c14, %edi		/* host RSP */
	vmwrite	%rsp, %rdi
	vmlaunch
	movl	$0x4400, %edi		/* why not */
	vmread	%rdi, %rax
	jmp	failed
vm_exit:
	movq	%rax, %r9
	movl	$0x4402, %edi		/* exit reason */
	vmread	%rdi, %rax
	cmpl	$EXIT_VMCALL, %eax
	jne	failed
	movq	%r9, %rax
	outb	%al, $LOADED
	jmp	next

1:	movq	%r8, VMCB_RIP
	movl	$VMCB, %eax
	vmrun	%rax
	movq	VMCB_EXITCODE, %rax
	cmpq	$EXIT_VMMCALL, %rax
	jne	failed
	movq	VMCB_RAX, %rax
	outb	%al, $LOADED
	jmp	next

failed:
	outl	%eax, $FAILED
	hlt

l2_load:
	movq	(%rbx), %rax
	jmp	l2_done
l2_store:
	movabsq	$0x5a5a5a5a5a5a5a5a, %rax
	movq	%rax, (%rbx)
l2_done:
	testq	%r10, %r10
	jnz	1f
	vmcall
1:	vmmcall
