/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The MMIO cache at work: EMULATE, FILL and CACHE by sampling, MATCH, MMIO and SPTE.
 */

#define EXIT_MMIO 6 /* KVM_EXIT_MMIO */

/*
 * kvm_emulate_insn(vcpu, failed): after decoding, before an operand is touched, with SRCU held: the
 * place where the cache is sampled.  With `failed` it is the second time for the same instruction.
 */
static __always_inline int on_emulate_insn(u64 vcpu, u8 failed)
{
	struct kvmprobe_event e = {};
	struct now n = {};
	int answer = arrive(&n, vcpu, KVMPROBE_AT_EMULATE_INSN, !failed);
	u64 ctxt;

	if (answer)
		return answer;
	sample_cache(&n, KVMPROBE_AT_EMULATE_INSN);
	n.st->matched = 0;
	begin(&e, n.st, KVMPROBE_EMULATE, KVMPROBE_AT_EMULATE_INSN);
	ctxt = read_u64(n.vcpu + OFF_VCPU_EMULATE_CTXT, e.type);
	e.addr = read_u64(ctxt + OFF_CTXT_EIP, e.type);
	e.value = read_u32(ctxt + OFF_CTXT_INSN, e.type);
	if (failed)
		e.flags |= KVMPROBE_F_FAILED;
	send(&e);
	return 0;
}

/* kvm_entry(vcpu, …): SRCU is not held here, so a lookup may be unstable and then says so. */
static __always_inline int on_entry(u64 vcpu)
{
	struct now n = {};
	int answer = arrive(&n, vcpu, KVMPROBE_AT_ENTRY, 0);
	struct thread_state *thread;

	if (answer)
		return answer;
	thread = current_thread();
	if (thread)
		count_missed_exits(thread);
	sample_cache(&n, KVMPROBE_AT_ENTRY);
	return 0;
}

/* vcpu_match_mmio(gva, gpa, write, gpa_match): the cache was believed. */
static __always_inline int on_match(u64 gva, u64 gpa, u8 write, u8 by_gpa)
{
	struct thread_state *thread = current_thread();
	struct kvmprobe_event e = {};
	struct mmio_cache c = {};
	struct now n = {};

	if (!thread || resume(&n, thread->vcpu, KVMPROBE_MATCH) || read_cache(&c, n.vcpu, KVMPROBE_MATCH))
		return 0;
	n.st->matched = 1;
	begin(&e, n.st, KVMPROBE_MATCH, KVMPROBE_AT_MATCH_MMIO);
	e.addr = gpa;
	e.value = gva;
	e.gen = c.gen;
	e.aux = (u32)n.slots.gen;
	e.flags |= compare_gen(&n, c.gen) | compare_fill(&n, &c);
	if (write)
		e.flags |= KVMPROBE_F_WRITE;
	if (by_gpa)
		e.flags |= KVMPROBE_F_BY_GPA;
	look_up(&e, &n, gpa >> 12);
	send(&e);
	return 0;
}

/*
 * kvm_mmio(type, len, gpa, val): an access emulated as MMIO.  The record waits in the vCPU's state for
 * the userspace exit that may follow.  The answer to an unsatisfied read is the same access again.
 */
static __always_inline int on_mmio(u32 type, u32 len, u64 gpa)
{
	struct thread_state *thread = current_thread();
	struct kvmprobe_event *e;
	struct mmio_cache c = {};
	struct vcpu_state *st;
	struct now n = {};

	if (!thread || resume(&n, thread->vcpu, KVMPROBE_MMIO))
		return 0;
	st = n.st;
	if (type == KVMPROBE_MMIO_READ && st->read_waits) {
		st->read_waits = 0;
		return 0;
	}
	flush_mmio(st);
	if (read_cache(&c, n.vcpu, KVMPROBE_MMIO))
		return 0;
	e = &st->mmio;
	e->vm = st->vm;
	e->vcpu = st->id;
	e->type = KVMPROBE_MMIO;
	e->site = KVMPROBE_AT_MMIO;
	e->flags = st->flags | compare_gen(&n, c.gen) | compare_fill(&n, &c);
	if (type == KVMPROBE_MMIO_WRITE)
		e->flags |= KVMPROBE_F_WRITE;
	if (st->matched)
		e->flags |= KVMPROBE_F_MATCHED;
	e->addr = gpa;
	e->value = 0;
	e->gen = c.gen;
	e->aux = (u32)n.slots.gen;
	e->kind = (u8)type;
	e->len = (u8)len;
	e->slot = -1;
	look_up(e, &n, gpa >> 12);
	st->mmio_waits = 1;
	st->read_waits = type == KVMPROBE_MMIO_UNSATISFIED_READ;
	return 0;
}

/* kvm_userspace_exit(reason, errno): the reason means something only without an error. */
static __always_inline int on_userspace_exit(u32 reason, s32 error)
{
	struct thread_state *thread = current_thread();
	struct vcpu_state *st;
	u64 vcpu;

	if (!thread)
		return 0;
	vcpu = thread->vcpu;
	st = vcpus.lookup(&vcpu);
	if (!st || !st->mmio_waits)
		return 0;
	if (reason == EXIT_MMIO && error >= 0) {
		st->mmio.flags |= KVMPROBE_F_TO_USERSPACE;
		st->mmio.value = reason;
	}
	flush_mmio(st);
	return 0;
}

/*
 * handle_mmio_page_fault(addr, gfn, access): the cache is refilled right after this, and mark_mmio_spte
 * (sptep, gfn, spte) is traced right after a fill.  Either way the contents are read back at the
 * kvm_emulate_insn that follows in the same exit.
 */
static __always_inline int on_refill(u8 site)
{
	struct thread_state *thread = current_thread();
	struct vcpu_state *st;
	u64 vcpu;

	if (!thread)
		return 0;
	vcpu = thread->vcpu;
	st = vcpus.lookup(&vcpu);
	if (st) {
		st->refill = site;
		st->refill_flags = st->flags;
	}
	return 0;
}

static __always_inline int on_mark_spte(u64 sptep, u64 gfn, u64 new_spte)
{
	struct thread_state *thread = current_thread();
	struct config *cfg = get_config();
	struct kvmprobe_event e = {};
	struct now n = {};
	u64 old;

	if (!thread || !cfg || resume(&n, thread->vcpu, KVMPROBE_SPTE))
		return 0;
	old = read_u64(sptep, KVMPROBE_SPTE);
	begin(&e, n.st, KVMPROBE_SPTE, KVMPROBE_AT_MARK_MMIO_SPTE);
	e.kind = KVMPROBE_SPTE_MARKED;
	e.addr = gfn << 12;
	e.value = new_spte;
	e.gen = old & ~0x000ffffffffff000ULL; /* what a present SPTE maps is no business of ours */
	e.aux = (u32)sptep & 0x3fffffff;
	/* SPTE_MMU_PRESENT is bit 11 (since v5.15); bit 63 is set in an empty SPTE (since v6.8) */
	if ((old & (1 << 11)) && !(old >> 63) && old != new_spte)
		e.flags |= KVMPROBE_F_PRESENT;
	send(&e);
	if (cfg->fill_by_diff) {
		n.st->refill = KVMPROBE_AT_MARK_MMIO_SPTE;
		n.st->refill_flags = n.st->flags;
	}
	return 0;
}

static __always_inline int on_check_spte(u64 spte, u32 kvm_gen, u32 spte_gen)
{
	struct thread_state *thread = current_thread();
	struct kvmprobe_event e = {};
	struct now n = {};

	if (!thread || resume(&n, thread->vcpu, KVMPROBE_SPTE))
		return 0;
	begin(&e, n.st, KVMPROBE_SPTE, KVMPROBE_AT_CHECK_MMIO_SPTE);
	e.kind = kvm_gen == spte_gen ? KVMPROBE_SPTE_VALID : KVMPROBE_SPTE_STALE;
	e.addr = thread->fault_ts && (n.st->flags & KVMPROBE_F_DIRECT) ? thread->fault_addr & ~0xfffULL : 0;
	e.value = spte;
	e.gen = (u64)kvm_gen << 32 | spte_gen;
	send(&e);
	return 0;
}

int tp_kvm_emulate_insn(struct bpf_raw_tracepoint_args *ctx)
{
	if (on_emulate_insn(ctx->args[0], ctx->args[1]) == UNKNOWN) {
		interrupt(KVMPROBE_AT_EMULATE_INSN);
		introduce_tp.call(ctx, 0);
		count(KVMPROBE_LOST_STATE, KVMPROBE_EMULATE);
	}
	return 0;
}

int tp_kvm_entry(struct bpf_raw_tracepoint_args *ctx)
{
	if (on_entry(ctx->args[0]) == UNKNOWN) {
		interrupt(KVMPROBE_AT_ENTRY);
		introduce_tp.call(ctx, 0);
		count(KVMPROBE_LOST_STATE, KVMPROBE_CACHE);
	}
	return 0;
}

int tp_vcpu_match_mmio(struct bpf_raw_tracepoint_args *ctx)
{
	return on_match(ctx->args[0], ctx->args[1], ctx->args[2], ctx->args[3]);
}

int tp_kvm_mmio(struct bpf_raw_tracepoint_args *ctx)
{
	return on_mmio(ctx->args[0], ctx->args[1], ctx->args[2]);
}

int tp_kvm_userspace_exit(struct bpf_raw_tracepoint_args *ctx)
{
	return on_userspace_exit(ctx->args[0], ctx->args[1]);
}

int tp_handle_mmio_page_fault(struct bpf_raw_tracepoint_args *ctx)
{
	return on_refill(KVMPROBE_AT_MMIO_SPTE);
}

int tp_mark_mmio_spte(struct bpf_raw_tracepoint_args *ctx)
{
	return on_mark_spte(ctx->args[0], ctx->args[1], ctx->args[2]);
}

int tp_check_mmio_spte(struct bpf_raw_tracepoint_args *ctx)
{
	return on_check_spte(ctx->args[0], ctx->args[1], ctx->args[2]);
}
