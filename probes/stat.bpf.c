/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The programs of `kvmprobe stat`, all on raw tracepoints.  What happens between kvm_exit and kvm_entry is
 * kept in the thread's state and counted at kvm_entry, with the time from one to the other.
 */

static __always_inline u8 read_level(u64 vcpu)
{
	return read_u64(vcpu + OFF_VCPU_GUEST_MODE, 0) ? 2 : 1;
}

static __always_inline u32 read_address_space(u64 vcpu)
{
	u64 mmu;

	if (ADDRESS_SPACES == 1)
		return 0;
	mmu = read_u64(vcpu + OFF_VCPU_MMU, 0);
	return !!(read_u32(mmu + OFF_MMU_ROOT_ROLE, 0) >> 24);
}

/* Read the memslots of the vCPU's address space, and keep their generation; returns the address space. */
static __always_inline u32 see_memslots(struct stat_thread *st, struct memslots *m)
{
	u32 as = read_address_space(st->vcpu) & 1;

	read_memslots(m, st->kvm, as, 0);
	if (m->gen >> 63) /* memslots are changing */
		return as;
	if (!(st->gens_seen & (1 << as))) {
		st->gens_seen |= 1 << as;
		st->first_gen[as] = m->gen;
	}
	st->gen[as] = m->gen;
	return as;
}

static __always_inline s16 slot_of(struct stat_thread *st, u64 gfn)
{
	struct memslots m = {}, again = {};
	u32 as = see_memslots(st, &m), failed = 0;
	struct slot s = {};

	if (m.gen >> 63)
		return SLOT_UNKNOWN;
	/* an address space is part of its generations: one is even, the other odd */
	if (st->memo_gfn == gfn && st->memo_gen == m.gen && st->memo_as == as + 1)
		return st->memo_slot;
	find_by_gfn(&s, &m, gfn, &failed);
	read_memslots(&again, st->kvm, as, &failed);
	if (failed)
		count_failure();
	if (failed || again.address != m.address || again.gen != m.gen || (s.flags & KVMPROBE_F_UNSTABLE))
		return SLOT_UNKNOWN;
	st->memo_gfn = gfn;
	st->memo_gen = m.gen;
	st->memo_as = as + 1;
	st->memo_slot = s.id;
	return s.id;
}

static __always_inline struct stat_thread *current_thread(void)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();

	return threads.lookup(&tid);
}

/* Count what was kept of the open exit; without `timed` the exit's end was not seen. */
static __always_inline void count_pending(struct stat_thread *st, int timed, u64 ns)
{
	u32 bucket = bucket_of(ns), n = st->n_pending;
	struct stat_key key;

#pragma clang loop unroll(disable)
	for (u32 i = 0; i < PENDING; i++) {
		if (i < n) {
			u64 times;

			key = st->pending[i & (PENDING - 1)];
			times = key.n;
			key.n = 0;
			add_to_row(&key, times, timed, ns, bucket);
		}
	}
	st->n_pending = 0;
	if (st->insns) {
		struct stat_key insns = {};

		make_key(&insns, st, TABLE_EMULATE);
		add_to_row(&insns, st->insns, timed, ns, bucket);
		st->insns = 0;
	}
}

/* A thread that brings a vCPU for the first time: who it is.  Another vCPU's state is counted first. */
static __always_inline struct stat_thread *introduce(u64 vcpu, u32 tid, u32 tgid)
{
	struct stat_thread *st = threads.lookup(&tid), *fresh;
	struct vm_key key = {};
	struct stat_vm *vm, new_vm = {};
	struct memslots m = {};
	int zero = 0;
	u64 leader;

	if (st)
		count_pending(st, 0, 0);
	fresh = fresh_thread.lookup(&zero);
	if (!fresh)
		return 0;
	leader = read_u64(bpf_get_current_task() + OFF_TASK_GROUP_LEADER, 0);
	key.kvm = read_u64(vcpu + OFF_VCPU_KVM, 0);
	key.clock = read_u64(key.kvm + OFF_KVM_CLOCK, 0);
	key.start = read_u64(leader + OFF_TASK_START_TIME, 0);
	key.tgid = tgid;
	vm = vms.lookup(&key);
	if (!vm) {
		if (vm_numbers.pop(&new_vm.vm)) {
			count_failure();
			return 0;
		}
		bpf_probe_read_kernel(new_vm.comm, sizeof(new_vm.comm), (void *)(leader + OFF_TASK_COMM));
		vms.update(&key, &new_vm);
		vm = vms.lookup(&key);
		if (!vm)
			return 0;
	}
	threads.update(&tid, fresh);
	st = threads.lookup(&tid);
	if (!st)
		return 0;
	st->vcpu = vcpu;
	st->kvm = key.kvm;
	st->vm = vm->vm;
	st->id = (u16)read_u32(vcpu + OFF_VCPU_ID, 0);
	st->level = read_level(vcpu);
	see_memslots(st, &m);
	return st;
}

#define ANY (~0ULL)

/*
 * A program that is given its vCPU begins here; 0: not to be counted.  `exits` and `emulated` are counters of
 * the vCPU, ANY where they were not looked at.  One that went back is another vCPU's, of another VM.
 */
static __always_inline struct stat_thread *arrive(u64 vcpu, u64 exits, u64 emulated)
{
	u64 pid_tgid = bpf_get_current_pid_tgid();
	u32 tid = (u32)pid_tgid;
	struct stat_thread *st = threads.lookup(&tid);
	struct config *cfg;
	int zero = 0;

	if (!st || st->vcpu != vcpu || exits < st->exits || emulated < st->emulated) {
		cfg = config.lookup(&zero);
		if (!cfg || !cfg->on || (cfg->tgid && cfg->tgid != pid_tgid >> 32))
			return 0;
		st = introduce(vcpu, tid, pid_tgid >> 32);
		if (!st)
			return 0;
	}
	if (exits != ANY)
		st->exits = exits;
	if (emulated != ANY)
		st->emulated = emulated + 1; /* the instruction is counted later */
	return st;
}

/* How a fault ended, by what followed it before the next fault or entry; result_of() is the same rule. */
static __always_inline void close_fault(struct stat_thread *st)
{
	struct stat_key key = {};
	u8 fault = st->fault;

	if (!fault)
		return;
	st->fault = 0;
	make_key(&key, st, TABLE_FAULT);
	if (fault & FAULT_NOSLOT)
		key.a = RESULT_NO_SLOT;
	else if (fault & FAULT_KEPT)
		key.a = RESULT_FIXED;
	else if (fault & FAULT_EMULATED)
		key.a = fault & FAULT_RSVD ? RESULT_MMIO : RESULT_EMULATED;
	else
		key.a = RESULT_RETRY;
	keep(st, &key);
}

/* The reason of an exit: it lies in the vendor's own structures. */
static __always_inline u64 read_reason(u64 vcpu, u32 isa)
{
#ifdef OFF_VMX_REASON
	if (isa == 1) /* KVM_ISA_VMX */
		return read_u32(vcpu + OFF_VMX_REASON, 0);
#endif
#ifdef OFF_SVM_VMCB
	if (isa == 2) /* KVM_ISA_SVM */
		return read_u32(read_u64(vcpu + OFF_SVM_VMCB, 0) + OFF_VMCB_EXIT_CODE, 0);
#endif
	return REASON_UNKNOWN;
}

/* Give what was emulated on this CPU to its thread. */
static __always_inline void settle(struct stat_emulating *e)
{
	u32 tid = (u32)e->pid_tgid;
	struct stat_thread *st;

	e->vcpu = 0;
	if (!e->insns)
		return;
	st = threads.lookup(&tid);
	if (st) /* it may run on another CPU now */
		__sync_fetch_and_add(&st->insns, e->insns);
	e->insns = 0;
}

#define EPT_MISCONFIG 49

/* kvm_exit(vcpu, isa).  The time is taken first, as perf takes it: what this program does is part of the exit. */
int tp_kvm_exit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 now = bpf_ktime_get_ns();
	struct stat_thread *st = arrive(ctx->args[0], ANY, ANY);
	struct stat_emulating *e;
	int zero = 0;

	if (!st)
		return 0;
	e = emulating.lookup(&zero);
	if (e && e->vcpu)
		settle(e);
	if (st->n_pending || st->insns) /* of before the exit, or of one without an entry */
		count_pending(st, 0, 0);
	st->level = read_level(st->vcpu);
	st->isa = ctx->args[1];
	st->reason = read_reason(st->vcpu, st->isa);
	/* VMX has no kvm_page_fault for these; KVM's fast MMIO bus comes before the fault */
	st->fault = st->isa == 1 && (u16)st->reason == EPT_MISCONFIG ? FAULT_SEEN | FAULT_RSVD : 0;
	st->exit_ts = now;
	return 0;
}

/* kvm_entry(vcpu, …) */
int tp_kvm_entry(struct bpf_raw_tracepoint_args *ctx)
{
	u64 now = bpf_ktime_get_ns(), ns = 0;
	u64 exits = read_u64(ctx->args[0] + OFF_VCPU_EXITS, 0);
	struct stat_thread *st = arrive(ctx->args[0], exits, ANY);
	struct stat_key key = {};
	struct memslots m = {};
	u8 level;

	if (!st)
		return 0;
	if (st->exit_ts)
		ns = now - st->exit_ts;
	close_fault(st);
	level = read_level(st->vcpu);
	see_memslots(st, &m);
	if (st->entered && st->entered != level) {
		make_key(&key, st, TABLE_NESTING);
		key.level = 2;
		key.a = level == 2;
		add_to_row(&key, 1, !!st->exit_ts, ns, bucket_of(ns));
	}
	st->entered = level;
	count_pending(st, !!st->exit_ts, ns);
	if (st->exit_ts) {
		struct stat_key of_exit = {};

		make_key(&of_exit, st, TABLE_EXIT);
		of_exit.what = st->reason;
		of_exit.a = st->isa;
		add_to_row(&of_exit, 1, 1, ns, bucket_of(ns));
	}
	st->exit_ts = 0;
	st->level = level;
	return 0;
}

/* kvm_emulate_insn(vcpu, failed): `failed` is the second time for the same instruction. */
int tp_kvm_emulate_insn(struct bpf_raw_tracepoint_args *ctx)
{
	u64 vcpu = ctx->args[0], pid_tgid = bpf_get_current_pid_tgid();
	struct stat_emulating *e;
	struct stat_key key = {};
	struct stat_thread *st;
	u64 emulated;
	int zero = 0;

	e = emulating.lookup(&zero);
	if (!e)
		return 0;
	emulated = read_u64(vcpu + OFF_VCPU_INSNS, 0);
	if (e->vcpu == vcpu && e->pid_tgid == pid_tgid && !(u8)ctx->args[1] && emulated >= e->emulated) {
		e->emulated = emulated;
		e->insns++;
		return 0;
	}
	settle(e);
	/* the second time for one instruction finds the counter as it was the first time */
	st = arrive(vcpu, ANY, (u8)ctx->args[1] ? ANY : emulated);
	if (!st)
		return 0;
	if ((u8)ctx->args[1]) {
		make_key(&key, st, TABLE_EMULATE);
		key.a = 1;
		keep(st, &key);
		return 0;
	}
	if (!st->exit_ts) {
		e->vcpu = vcpu;
		e->pid_tgid = pid_tgid;
		e->emulated = emulated;
	}
	st->insns++;
	if (st->fault)
		st->fault |= FAULT_EMULATED;
	return 0;
}

/* vcpu_match_mmio(gva, gpa, write, gpa_match) */
int tp_vcpu_match_mmio(struct bpf_raw_tracepoint_args *ctx)
{
	struct stat_thread *st = current_thread();
	struct stat_key key = {};

	if (!st)
		return 0;
	make_key(&key, st, TABLE_HIT);
	key.a = st->filler;
	key.slot = slot_of(st, ctx->args[1] >> 12);
	keep(st, &key);
	return 0;
}

/* kvm_mmio(type, len, gpa, val): the answer to an unsatisfied read is the same access again. */
int tp_kvm_mmio(struct bpf_raw_tracepoint_args *ctx)
{
	struct stat_thread *st = current_thread();
	u32 type = ctx->args[0];
	struct stat_key key = {};
	u64 gpa = ctx->args[2];

	if (!st)
		return 0;
	if (type == KVMPROBE_MMIO_READ && st->read_waits) {
		st->read_waits = 0;
		return 0;
	}
	st->read_waits = type == KVMPROBE_MMIO_UNSATISFIED_READ;
	make_key(&key, st, TABLE_MMIO);
	key.what = gpa & ~0xfffULL;
	key.a = type == KVMPROBE_MMIO_WRITE;
	key.slot = slot_of(st, gpa >> 12);
	keep(st, &key);
	return 0;
}

static __always_inline void note_fill(struct stat_thread *st, u64 gfn, u8 how)
{
	struct stat_key key = {};

	st->filler = st->level;
	make_key(&key, st, TABLE_FILL);
	key.a = how;
	key.slot = slot_of(st, gfn);
	keep(st, &key);
}

/* handle_mmio_page_fault(addr, gfn, access): the cache is refilled from an MMIO SPTE right after this. */
int tp_handle_mmio_page_fault(struct bpf_raw_tracepoint_args *ctx)
{
	struct stat_thread *st = current_thread();

	if (st)
		note_fill(st, ctx->args[1], FILL_FROM_SPTE);
	return 0;
}

/* mark_mmio_spte(sptep, gfn, spte) */
int tp_mark_mmio_spte(struct bpf_raw_tracepoint_args *ctx)
{
	struct stat_thread *st = current_thread();
	struct stat_key key = {};

	if (!st)
		return 0;
	make_key(&key, st, TABLE_SPTE);
	key.a = KVMPROBE_SPTE_MARKED;
	keep(st, &key);
	return 0;
}

/* check_mmio_spte(spte, kvm_gen, spte_gen) */
int tp_check_mmio_spte(struct bpf_raw_tracepoint_args *ctx)
{
	struct stat_thread *st = current_thread();
	struct stat_key key = {};

	if (!st)
		return 0;
	make_key(&key, st, TABLE_SPTE);
	key.a = (u32)ctx->args[1] == (u32)ctx->args[2] ? KVMPROBE_SPTE_VALID : KVMPROBE_SPTE_STALE;
	keep(st, &key);
	return 0;
}

/* kvm_page_fault(vcpu, address, error code) */
int tp_kvm_page_fault(struct bpf_raw_tracepoint_args *ctx)
{
	struct stat_thread *st = arrive(ctx->args[0], ANY, ANY);

	if (!st)
		return 0;
	close_fault(st);
	/* VMX hands over an exit qualification here, in which bit 3 is another thing */
	st->fault = st->isa != 1 && (ctx->args[2] & 8) ? FAULT_SEEN | FAULT_RSVD : FAULT_SEEN;
	return 0;
}

/* kvm_fast_mmio(gpa): an EPT misconfiguration that was no fault after all. */
int tp_kvm_fast_mmio(struct bpf_raw_tracepoint_args *ctx)
{
	struct stat_thread *st = current_thread();

	if (st)
		st->fault = 0;
	return 0;
}

/*
 * kvm_mmu_spte_requested(fault): behind the lookup of the memslot.  A fault without one has just filled
 * the cache (kvm_handle_noslot_fault(), handle_abnormal_pfn()).
 */
int tp_kvm_mmu_spte_requested(struct bpf_raw_tracepoint_args *ctx)
{
	struct stat_thread *st = current_thread();
	u64 fault = ctx->args[0];

	if (!st)
		return 0;
	if (!(read_u64(fault + OFF_FAULT_PFN, 0) >> 63)) { /* KVM_PFN_NOSLOT */
		st->fault |= st->fault ? FAULT_KEPT : 0;
		return 0;
	}
	st->fault |= st->fault ? FAULT_NOSLOT : 0;
	note_fill(st, read_u64(fault + OFF_FAULT_GFN, 0), FILL_FROM_FAULT);
	return 0;
}
