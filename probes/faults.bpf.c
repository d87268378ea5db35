/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * FAULT and FAULTIN, and the fill made by the no-slot function: what kvm_mmu_page_fault() was asked,
 * which memslot it found, and how it ended.
 *
 * Every function is probed at entry and exit.  The vCPU's state remembers an open entry; one that
 * is still open at the next entry, or when the vCPU enters the guest, counts an exit that was missed
 * (kretprobes exhausted, or a program skipped because another BPF program ran on that CPU).
 */

#define PFERR_RSVD (1 << 3)         /* PFERR_RSVD_MASK */
#define PFN_NOSLOT (1ULL << 63)     /* KVM_PFN_NOSLOT */
#define PFN_ERROR (0x7ffULL << 52)  /* KVM_PFN_ERR_MASK */

/*
 * KVM's own test in mmio_info_in_cache(), evaluated before KVM does: will this reserved-bit fault be
 * emulated as MMIO on the cache's word?  No tracepoint tells.  In SMM an entry with address space 0's
 * generation is believed by a kernel with CVE-2026-99082 only: GEN_IS_CURRENT tells the two apart.
 */
static __always_inline u32 test_rsvd(struct now *n, u64 addr)
{
	struct mmio_cache c = {};
	struct kvmprobe_event *e;
	u64 walk_mmu;
	u32 gen;

	if (read_cache(&c, n))
		return 0;
	walk_mmu = read_u64(n->vcpu + OFF_VCPU_WALK_MMU, &n->failed);
	gen = compare_gen(n, c.gen);
	if (walk_mmu == n->vcpu + OFF_VCPU_NESTED_MMU)
		return 0;
	if (!(gen & (KVMPROBE_F_GEN_IS_AS0 | KVMPROBE_F_GEN_IS_CURRENT)))
		return 0;
	if (n->st->flags & KVMPROBE_F_DIRECT) {
		if (!c.gfn || c.gfn != addr >> 12)
			return 0;
	} else if (!c.gva || c.gva != (addr & ~0xfffULL)) {
		return 0;
	}
	e = begin(n->st, KVMPROBE_MATCH, KVMPROBE_AT_RSVD);
	e->addr = c.gfn << 12 | (addr & 0xfff);
	e->value = c.gva;
	e->gen = c.gen;
	e->aux = (u32)n->slots.gen;
	e->flags |= gen | compare_fill(n, &c);
	if (n->st->flags & KVMPROBE_F_DIRECT)
		e->flags |= KVMPROBE_F_BY_GPA;
	look_up(e, n, c.gfn);
	if (!kvmprobe_candidate(e->type, e->flags, e->slot))
		drop(n->st); /* FAULT says BELIEVED, and MMIO MATCHED */
	n->st->matched = 1;
	return KVMPROBE_F_BELIEVED;
}

static __always_inline int on_fault_entry(struct now *n, u64 vcpu, u64 addr, u64 error)
{
	int answer = arrive(n, vcpu, KVMPROBE_AT_PAGE_FAULT, 0);
	struct open_calls *open;

	if (answer)
		return answer;
	open = &n->st->open;
	if (open->fault_ts)
		count_of(n->st->vm, KVMPROBE_LOST_EXIT, KVMPROBE_FAULT);
	if (error & PFERR_RSVD) /* the cache may be believed now */
		sample_cache(n, KVMPROBE_AT_RSVD);
	open->fault_flags = n->st->flags;
	n->st->matched = 0;
	if (error & PFERR_RSVD)
		open->fault_flags |= test_rsvd(n, addr);
	open->fault_addr = addr;
	open->fault_error = error;
	open->fault_ts = bpf_ktime_get_ns();
	return 0;
}

#define ROW_LENGTH 1000            /* faults */
#define ROW_TIME 1000000000ULL     /* ns */

/*
 * Does the vCPU repeat one fault while KVM gets nowhere?  pf_taken moves, pf_fixed, pf_emulate and
 * pf_spurious stand still.  Says so when the row is long enough, and each time it has doubled since.
 */
static __always_inline u32 test_row(struct vcpu_state *st, u64 vcpu, u64 addr, u64 error)
{
	struct {
		u64 taken, fixed, emulate, spurious;
	} pf = {};
	u64 now = bpf_ktime_get_ns(), progress;
	int same;

	if (bpf_probe_read_kernel(&pf, sizeof(pf), (void *)(vcpu + OFF_VCPU_PF_TAKEN))) {
		count(KVMPROBE_LOST_READ, KVMPROBE_FAULT);
		return 0;
	}
	progress = pf.fixed + pf.emulate + pf.spurious;
	same = addr == st->fault_addr && error == st->fault_error && progress == st->pf_progress &&
	       pf.taken != st->pf_taken;
	st->fault_addr = addr;
	st->fault_error = error;
	st->pf_taken = pf.taken;
	st->pf_progress = progress;
	if (!same) {
		st->row = 1;
		st->row_start = now;
		st->row_told = 0;
		return 0;
	}
	st->row++;
	if (st->row < ROW_LENGTH || st->row < 2 * st->row_told || now - st->row_start < ROW_TIME)
		return 0;
	st->row_told = st->row;
	return KVMPROBE_F_STUCK;
}

static __always_inline void on_fault_exit(struct now *n, s32 ret)
{
	struct kvmprobe_event *e;
	struct open_calls *open;
	u64 start;

	if (resume(n))
		return;
	open = &n->st->open;
	if (!open->fault_ts)
		return;
	start = open->fault_ts;
	open->fault_ts = 0;
	if (ret) /* 0 leads to user space, which an MMIO event may be held for */
		release(n->st);
	e = begin(n->st, KVMPROBE_FAULT, KVMPROBE_AT_PAGE_FAULT);
	e->flags = open->fault_flags | test_row(n->st, n->vcpu, open->fault_addr, open->fault_error);
	if (open->fault_error & 2) /* PFERR_WRITE_MASK */
		e->flags |= KVMPROBE_F_WRITE;
	e->addr = open->fault_addr;
	e->value = open->fault_error;
	e->gen = bpf_ktime_get_ns() - start;
	e->aux = (u32)ret;
	e->kind = ret < 0 ? KVMPROBE_FAULT_ERROR : ret ? KVMPROBE_FAULT_RESUMED : KVMPROBE_FAULT_USERSPACE;
	if (!KEEP_ALL && !kvmprobe_candidate(e->type, e->flags, e->slot))
		drop(n->st);
}

/* Tracepoint kvm_page_fault(vcpu, address, error code): no exit, and nothing for EPT misconfigurations. */
static __always_inline int on_page_fault_tp(struct now *n, u64 vcpu, u64 addr, u64 error)
{
	int answer = arrive(n, vcpu, KVMPROBE_AT_PAGE_FAULT_TP, 0);
	struct kvmprobe_event *e;

	if (answer)
		return answer;
	e = begin(n->st, KVMPROBE_FAULT, KVMPROBE_AT_PAGE_FAULT_TP);
	e->addr = addr;
	e->value = error;
	e->flags |= test_row(n->st, vcpu, addr, error); /* the counters tell how the fault before ended */
	return 0;
}

/*
 * `ret`: what the faultin function returned, 0 (RET_PF_CONTINUE) where it goes on.  A fault that is to be
 * retried may have no pfn yet: since v6.8 kvm_faultin_pfn() looks for a running invalidation before the
 * slot is hidden from L2 (d02c357e5bfa).  Before v6.10 such a pfn reads as 0, later as an error ("KVM:
 * x86/mmu: Initialize kvm_page_fault's pfn and hva to error values"): no pfn was found.
 */
static __always_inline u8 faultin_result(u64 pfn, s32 ret)
{
	if (pfn & PFN_NOSLOT)
		return KVMPROBE_FAULTIN_NOSLOT;
	return ret || pfn & PFN_ERROR ? KVMPROBE_FAULTIN_ERROR : KVMPROBE_FAULTIN_KEPT;
}

/*
 * At entry fault->slot is the slot KVM itself found, for direct and shadow MMUs; a vulnerable kernel
 * sets it to NULL inside (kvm_faultin_pfn() before v6.10).
 */
static __always_inline int on_faultin_entry(u64 vcpu, u64 fault)
{
	struct open_calls *open;
	struct slot s = {};
	struct now n = {};
	u64 slot;

	if (resume(&n) || n.vcpu != vcpu)
		return 0;
	open = &n.st->open;
	if (open->faultin)
		count_of(n.st->vm, KVMPROBE_LOST_EXIT, KVMPROBE_FAULTIN);
	s.id = -1;
	s.flags = KVMPROBE_F_SLOT_KNOWN;
	slot = read_u64(fault + OFF_FAULT_SLOT, &n.failed);
	if (slot)
		read_slot(&s, slot, &n.failed);
	open->faultin = fault;
	open->faultin_slot = s.id;
	open->faultin_flags = s.flags;
	open->faultin_base = s.base_gfn << 12;
	open->faultin_npages = s.npages;
	if (n.failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_FAULTIN);
	return 0;
}

static __always_inline void on_faultin_exit(struct now *n, s32 ret)
{
	struct kvmprobe_event *e;
	struct open_calls *open;
	u64 fault;

	if (resume(n))
		return;
	open = &n->st->open;
	fault = open->faultin;
	if (!fault)
		return;
	open->faultin = 0;
	if (!KEEP_ALL && !kvmprobe_candidate(KVMPROBE_FAULTIN, 0, open->faultin_slot))
		return;
	e = begin(n->st, KVMPROBE_FAULTIN, KVMPROBE_AT_FAULTIN);
	e->addr = read_u64(fault + OFF_FAULT_GFN, &n->failed) << 12;
	e->value = open->faultin_base;
	e->gen = open->faultin_npages;
	e->aux = (u32)ret;
	e->slot = open->faultin_slot;
	e->flags |= open->faultin_flags;
	e->kind = faultin_result(read_u64(fault + OFF_FAULT_PFN, &n->failed), ret);
}

/* Tracepoint kvm_mmu_spte_requested(fault): after the faultin function, for faults that go on. */
static __always_inline void on_spte_requested(struct now *n, u64 fault)
{
	struct kvmprobe_event *e;
	struct slot s = {};
	u64 slot, gfn;

	if (resume(n))
		return;
	gfn = read_u64(fault + OFF_FAULT_GFN, &n->failed);
	slot = read_u64(fault + OFF_FAULT_SLOT, &n->failed);
	e = begin(n->st, KVMPROBE_FAULTIN, KVMPROBE_AT_SPTE_REQUESTED);
	e->addr = gfn << 12;
	e->kind = faultin_result(read_u64(fault + OFF_FAULT_PFN, &n->failed), 0);
	if (slot) {
		read_slot(&s, slot, &n->failed);
		e->slot = s.id;
		e->flags |= s.flags;
		e->value = s.base_gfn << 12;
		e->gen = s.npages;
	} else {
		read_now(n, n->st->kvm, n->st->flags);
		look_up(e, n, gfn);
	}
}

static __always_inline int on_noslot_entry(u64 vcpu, u64 fault)
{
	struct now n = {};

	if (resume(&n) || n.vcpu != vcpu)
		return 0;
	if (n.st->open.noslot)
		count_of(n.st->vm, KVMPROBE_LOST_EXIT, KVMPROBE_FILL);
	n.st->open.noslot = 0;
	/* handle_abnormal_pfn() (6.1) is also called for ordinary pages, whose slot is not NULL. */
	if (NOSLOT_IS_HANDLE_ABNORMAL_PFN && read_u64(fault + OFF_FAULT_SLOT, &n.failed))
		return 0;
	n.st->open.noslot = fault;
	n.st->open.noslot_gfn = read_u64(fault + OFF_FAULT_GFN, &n.failed);
	if (n.failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_FILL);
	return 0;
}

/*
 * A negative return means not filled; otherwise vcpu_cache_mmio_info() was called, which writes nothing
 * while a memslot update is in progress: then the cache does not hold this gfn.
 */
static __always_inline void on_noslot_exit(struct now *n, s32 ret)
{
	struct kvmprobe_event *e;
	struct mmio_cache c = {};

	if (resume(n) || !n->st->open.noslot)
		return;
	n->st->open.noslot = 0;
	if (ret < 0 || read_cache(&c, n) || c.gfn != n->st->open.noslot_gfn)
		return;
	read_now(n, n->st->kvm, n->st->flags);
	e = begin(n->st, KVMPROBE_FILL, KVMPROBE_AT_NOSLOT);
	n->st->filled_in = rewritten(&c, &n->st->cache) || !updating(n) ? n->smm + 1 : 0;
	fill_in_cache(e, n, &c);
	remember_sample(n, &c);
}

#ifdef WITH_KPROBE
int kprobe_fault_entry(struct pt_regs *ctx)
{
	struct now n = {};

	if (on_fault_entry(&n, PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), PT_REGS_PARM3(ctx)) == UNKNOWN) {
		interrupt(KVMPROBE_AT_PAGE_FAULT);
		introduce_kprobe.call(ctx, 0);
		count(KVMPROBE_LOST_STATE, KVMPROBE_FAULT);
	}
	finish(&n, KVMPROBE_LIFECYCLE);
	return 0;
}

int kprobe_fault_exit(struct pt_regs *ctx)
{
	struct now n = {};

	on_fault_exit(&n, PT_REGS_RC(ctx));
	finish(&n, KVMPROBE_FAULT);
	return 0;
}

int kprobe_faultin_entry(struct pt_regs *ctx)
{
	return on_faultin_entry(PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx));
}

int kprobe_faultin_exit(struct pt_regs *ctx)
{
	struct now n = {};

	on_faultin_exit(&n, PT_REGS_RC(ctx));
	finish(&n, KVMPROBE_FAULTIN);
	return 0;
}

int kprobe_noslot_entry(struct pt_regs *ctx)
{
	return on_noslot_entry(PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx));
}

int kprobe_noslot_exit(struct pt_regs *ctx)
{
	struct now n = {};

	on_noslot_exit(&n, PT_REGS_RC(ctx));
	finish(&n, KVMPROBE_FILL);
	return 0;
}
#endif

#ifdef WITH_FENTRY
/* The same by fentry and fexit, whose context is an array like a raw tracepoint's: the arguments and,
 * at exit, the return value behind them.  BCC finds the target in the program's name. */
int FENTRY_FAULT(struct bpf_raw_tracepoint_args *ctx)
{
	/* Tail calls between fentry programs need one target, so introduce() is compiled in here. */
	struct now n = {};

	if (on_fault_entry(&n, ctx->args[0], ctx->args[1], ctx->args[2]) == UNKNOWN &&
	    !introduce(ctx->args[0], KVMPROBE_AT_PAGE_FAULT))
		on_fault_entry(&n, ctx->args[0], ctx->args[1], ctx->args[2]);
	finish(&n, KVMPROBE_LIFECYCLE);
	return 0;
}

int FEXIT_FAULT(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	on_fault_exit(&n, ctx->args[5]);
	finish(&n, KVMPROBE_FAULT);
	return 0;
}

int FENTRY_FAULTIN(struct bpf_raw_tracepoint_args *ctx)
{
	return on_faultin_entry(ctx->args[0], ctx->args[1]);
}

int FEXIT_FAULTIN(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	on_faultin_exit(&n, ctx->args[FAULTIN_ARGS]);
	finish(&n, KVMPROBE_FAULTIN);
	return 0;
}

int FENTRY_NOSLOT(struct bpf_raw_tracepoint_args *ctx)
{
	return on_noslot_entry(ctx->args[0], ctx->args[1]);
}

int FEXIT_NOSLOT(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	on_noslot_exit(&n, ctx->args[3]);
	finish(&n, KVMPROBE_FILL);
	return 0;
}
#endif

#ifdef WITH_PAGE_FAULT_TP
int tp_kvm_page_fault(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	if (on_page_fault_tp(&n, ctx->args[0], ctx->args[1], ctx->args[2]) == UNKNOWN) {
		interrupt(KVMPROBE_AT_PAGE_FAULT_TP);
		introduce_tp.call(ctx, 0);
		count(KVMPROBE_LOST_STATE, KVMPROBE_FAULT);
	}
	finish(&n, KVMPROBE_LIFECYCLE);
	return 0;
}
#endif

#ifdef WITH_SPTE_REQUESTED
int tp_kvm_mmu_spte_requested(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	on_spte_requested(&n, ctx->args[0]);
	finish(&n, KVMPROBE_FAULTIN);
	return 0;
}
#endif
