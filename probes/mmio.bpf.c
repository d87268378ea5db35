/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The MMIO cache at work: EMULATE, FILL and CACHE by sampling, MATCH, MMIO and SPTE.
 */

#define EXIT_MMIO 6 /* KVM_EXIT_MMIO */

/*
 * kvm_emulate_insn(vcpu, failed): after decoding, before an operand is touched, with SRCU held: the
 * place where the cache is sampled.  With `failed` it is the second time for the same instruction.
 */
static __always_inline int on_emulate_insn(struct now *n, u64 vcpu, u8 failed)
{
	int answer = arrive(n, vcpu, KVMPROBE_AT_EMULATE_INSN, !failed);
	struct kvmprobe_event *e;

	if (answer)
		return answer;
	sample_cache(n, KVMPROBE_AT_EMULATE_INSN);
	n->st->matched = 0;
	if (!KEEP_ALL)
		return 0;
	e = begin(n->st, KVMPROBE_EMULATE, KVMPROBE_AT_EMULATE_INSN);
	e->addr = read_u64(n->st->emulate_ctxt + OFF_CTXT_EIP, &n->failed);
	e->value = read_u32(n->st->emulate_ctxt + OFF_CTXT_INSN, &n->failed);
	if (failed)
		e->flags |= KVMPROBE_F_FAILED;
	return 0;
}

/* kvm_entry(vcpu, …): SRCU is not held here, so a lookup may be unstable and then says so. */
static __always_inline int on_entry(struct now *n, u64 vcpu)
{
	int answer = arrive(n, vcpu, KVMPROBE_AT_ENTRY, 0);

	if (answer)
		return answer;
	count_missed_exits(n->st);
	sample_cache(n, KVMPROBE_AT_ENTRY);
	return 0;
}

/*
 * Was there no memory at a gfn when the instruction began?  Then the access is MMIO rightly, whatever memslot
 * has come since, and the cache is as it was sampled then.  Not asked of a vCPU that was in SMM: there
 * the cache may be believed in the wrong address space.
 */
static __always_inline int is_hole(const struct vcpu_state *st, u64 gfn)
{
	const struct slot_memo *memo = &st->memo;

	return memo->valid && memo->gfn == gfn && memo->gen == st->gen && memo->id < 0 && !st->smm_seen;
}

/*
 * Start the event of an access in `held`: what it says of the access, the cache and the slot.  Returns
 * whether it is of use.
 */
static __always_inline int hold(struct now *n, u8 type, u8 site, u64 gpa)
{
	struct kvmprobe_event *e = &n->st->held;
	struct mmio_cache c = {};

	if (is_hole(n->st, gpa >> 12)) {
		if (!KEEP_ALL)
			return 0;
		n->slots.gen = n->gen0 = n->st->gen;
		c = n->st->cache;
	} else {
		read_now(n, n->st->kvm, n->st->flags);
		if (read_cache(&c, n))
			return 0;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->vm = n->st->vm;
	e->vcpu = n->st->id;
	e->type = type;
	e->site = site;
	e->flags = n->st->flags | compare_gen(n, c.gen) | compare_fill(n, &c);
	e->addr = gpa;
	e->gen = c.gen;
	e->aux = (u32)n->slots.gen;
	e->slot = -1;
	look_up(e, n, gpa >> 12);
	if (!KEEP_ALL && !kvmprobe_candidate(type, e->flags, e->slot))
		return 0;
	n->st->holds = type;
	return 1;
}

/*
 * vcpu_match_mmio(gva, gpa, write, gpa_match): the cache was believed.  Where that matters to no rule, the
 * MMIO that follows says it too (MATCHED), and takes its place.
 */
static __always_inline void on_match(struct now *n, u64 gva, u64 gpa, u8 write, u8 by_gpa)
{
	struct vcpu_state *st;

	if (resume(n))
		return;
	st = n->st;
	release(st);
	st->matched = 1;
	if (!hold(n, KVMPROBE_MATCH, KVMPROBE_AT_MATCH_MMIO, gpa))
		return;
	st->held.value = gva;
	if (write)
		st->held.flags |= KVMPROBE_F_WRITE;
	if (by_gpa)
		st->held.flags |= KVMPROBE_F_BY_GPA;
}

/*
 * kvm_mmio(type, len, gpa, val): an access emulated as MMIO.  The event is held in the vCPU's state for
 * the userspace exit that may follow.  The answer to an unsatisfied read is the same access again.
 */
static __always_inline void on_mmio(struct now *n, u32 type, u32 len, u64 gpa)
{
	struct vcpu_state *st;

	if (resume(n))
		return;
	st = n->st;
	if (type == KVMPROBE_MMIO_READ && st->read_waits) {
		st->read_waits = 0;
		return;
	}
	if (st->holds != KVMPROBE_MATCH || (st->held.addr ^ gpa) >> 12 ||
	    kvmprobe_candidate(KVMPROBE_MATCH, st->held.flags, st->held.slot))
		release(st);
	st->holds = 0;
	st->read_waits = type == KVMPROBE_MMIO_UNSATISFIED_READ;
	if (!hold(n, KVMPROBE_MMIO, KVMPROBE_AT_MMIO, gpa))
		return;
	if (type == KVMPROBE_MMIO_WRITE)
		st->held.flags |= KVMPROBE_F_WRITE;
	if (st->matched)
		st->held.flags |= KVMPROBE_F_MATCHED;
	st->held.kind = (u8)type;
	st->held.len = (u8)len;
}

/* kvm_userspace_exit(reason, errno): the reason means something only without an error. */
static __always_inline void on_userspace_exit(struct now *n, u32 reason, s32 error)
{
	if (resume(n))
		return;
	if (n->st->holds == KVMPROBE_MMIO && reason == EXIT_MMIO && error >= 0) {
		n->st->held.flags |= KVMPROBE_F_TO_USERSPACE;
		n->st->held.value = reason;
	}
	release(n->st);
}

/*
 * handle_mmio_page_fault(addr, gfn, access): the cache is refilled right after this, and mark_mmio_spte
 * (sptep, gfn, spte) is traced right after a fill.  Either way the contents are read back at the
 * kvm_emulate_insn that follows in the same exit.
 */
static __always_inline void on_refill(u8 site)
{
	struct now n = {};

	if (resume(&n))
		return;
	n.st->refill = site;
	n.st->refill_flags = n.st->flags;
}

static __always_inline void on_mark_spte(struct now *n, u64 sptep, u64 gfn, u64 new_spte)
{
	struct config *cfg = get_config();
	struct kvmprobe_event *e;
	u64 old;

	if (!cfg || resume(n))
		return;
	old = read_u64(sptep, &n->failed);
	e = begin(n->st, KVMPROBE_SPTE, KVMPROBE_AT_MARK_MMIO_SPTE);
	e->kind = KVMPROBE_SPTE_MARKED;
	e->addr = gfn << 12;
	e->value = new_spte;
	e->gen = old & ~0x000ffffffffff000ULL; /* what a present SPTE maps is no business of ours */
	e->aux = (u32)sptep & 0x3fffffff;
	/* SPTE_MMU_PRESENT is bit 11 (since v5.15); bit 63 is set in an empty SPTE (since v6.8) */
	if ((old & (1 << 11)) && !(old >> 63) && old != new_spte)
		e->flags |= KVMPROBE_F_PRESENT;
	if (cfg->fill_by_diff) {
		n->st->refill = KVMPROBE_AT_MARK_MMIO_SPTE;
		n->st->refill_flags = n->st->flags;
	}
}

static __always_inline void on_check_spte(struct now *n, u64 spte, u32 kvm_gen, u32 spte_gen)
{
	struct kvmprobe_event *e;

	if (!KEEP_ALL || resume(n))
		return;
	e = begin(n->st, KVMPROBE_SPTE, KVMPROBE_AT_CHECK_MMIO_SPTE);
	e->kind = kvm_gen == spte_gen ? KVMPROBE_SPTE_VALID : KVMPROBE_SPTE_STALE;
	if (n->st->open.fault_ts && (n->st->flags & KVMPROBE_F_DIRECT))
		e->addr = n->st->open.fault_addr & ~0xfffULL;
	e->value = spte;
	e->gen = (u64)kvm_gen << 32 | spte_gen;
}

int tp_kvm_emulate_insn(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	if (on_emulate_insn(&n, ctx->args[0], ctx->args[1]) == UNKNOWN) {
		interrupt(KVMPROBE_AT_EMULATE_INSN);
		introduce_tp.call(ctx, 0);
		count(KVMPROBE_LOST_STATE, KVMPROBE_EMULATE);
	}
	finish(&n, KVMPROBE_LIFECYCLE);
	return 0;
}

int tp_kvm_entry(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	if (on_entry(&n, ctx->args[0]) == UNKNOWN) {
		interrupt(KVMPROBE_AT_ENTRY);
		introduce_tp.call(ctx, 0);
		count(KVMPROBE_LOST_STATE, KVMPROBE_CACHE);
	}
	finish(&n, KVMPROBE_LIFECYCLE);
	return 0;
}

int tp_vcpu_match_mmio(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	on_match(&n, ctx->args[0], ctx->args[1], ctx->args[2], ctx->args[3]);
	finish(&n, KVMPROBE_MATCH);
	return 0;
}

int tp_kvm_mmio(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	on_mmio(&n, ctx->args[0], ctx->args[1], ctx->args[2]);
	finish(&n, KVMPROBE_MMIO);
	return 0;
}

int tp_kvm_userspace_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	on_userspace_exit(&n, ctx->args[0], ctx->args[1]);
	finish(&n, KVMPROBE_MMIO);
	return 0;
}

int tp_handle_mmio_page_fault(struct bpf_raw_tracepoint_args *ctx)
{
	on_refill(KVMPROBE_AT_MMIO_SPTE);
	return 0;
}

int tp_mark_mmio_spte(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	on_mark_spte(&n, ctx->args[0], ctx->args[1], ctx->args[2]);
	finish(&n, KVMPROBE_SPTE);
	return 0;
}

int tp_check_mmio_spte(struct bpf_raw_tracepoint_args *ctx)
{
	struct now n = {};

	on_check_spte(&n, ctx->args[0], ctx->args[1], ctx->args[2]);
	finish(&n, KVMPROBE_SPTE);
	return 0;
}
