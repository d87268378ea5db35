/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Which vCPU an event belongs to: VMs and vCPUs at first sight, threads, and what changed since a vCPU was
 * last met.
 */

static __always_inline u64 leader_start(u32 *failed)
{
	u64 task = bpf_get_current_task();
	u64 leader = read_u64(task + OFF_TASK_GROUP_LEADER, failed);

	return read_u64(leader + OFF_TASK_START_TIME, failed);
}

/* Report internal slots not reported before, through the queue of a vCPU: at most 6. */
static __always_inline void report_internal_slots(struct vcpu_state *st, struct vm_state *vm, u64 kvm, u32 *failed)
{
#pragma clang loop unroll(disable)
	for (u32 as = 0; as < ADDRESS_SPACES; as++) {
		struct memslots m = {};

		read_memslots(&m, kvm, as, failed);
#pragma clang loop unroll(disable)
		for (u32 i = 0; i < 3; i++) {
			u32 bit = 1U << (as * 3 + i);
			struct kvmprobe_event *e;
			struct slot s = {};

			find_by_id(&s, &m, KVMPROBE_SLOT_TSS + i, failed);
			if (s.id < 0) {
				vm->internal &= ~bit;
				continue;
			}
			if (vm->internal & bit)
				continue;
			vm->internal |= bit;
			e = begin_vm(st, vm->vm, KVMPROBE_MEMSLOT, KVMPROBE_AT_FIRST_SIGHT);
			e->flags = s.flags;
			e->addr = s.base_gfn << 12;
			e->value = s.npages;
			e->gen = m.gen;
			e->aux = s.raw_flags;
			e->slot = s.id;
			e->kind = KVMPROBE_MEMSLOT_FOUND;
			e->len = as;
		}
	}
}

static __always_inline void make_vm_key(struct vm_key *key, u64 kvm, u32 *failed)
{
	key->kvm = kvm;
	key->start = leader_start(failed);
	key->tgid = bpf_get_current_pid_tgid() >> 32;
	key->unused = 0;
}

/*
 * The VM's state, numbered at its first sight.  KVM deletes memslots while it destroys a VM, and then the
 * same process may get the same address for the next one, whose generations begin anew: an activation with
 * a higher generation belongs to the old VM and is not reported; `gen` 0 is a vCPU that runs.  `*is_new`:
 * the caller tells of it.
 */
static __always_inline struct vm_state *get_vm(const struct vm_key *key, u64 gen, int *is_new)
{
	struct vm_state *vm = vms.lookup((struct vm_key *)key);
	struct vm_state fresh = {};

	*is_new = 0;
	if (vm && !vm->gone)
		return vm;
	if (vm && gen > vm->gone)
		return 0;
	if (vm_numbers.pop(&fresh.vm)) {
		count(KVMPROBE_LOST_STATE, KVMPROBE_LIFECYCLE);
		return 0;
	}
	vms.update((struct vm_key *)key, &fresh);
	vm = vms.lookup((struct vm_key *)key);
	if (!vm) {
		count(KVMPROBE_LOST_STATE, KVMPROBE_LIFECYCLE);
		return 0;
	}
	*is_new = 1;
	return vm;
}

/*
 * Is another VM at this address now?  kvm_arch_init_vm() takes the time for kvmclock_offset, in ns, and nothing
 * but KVM_SET_CLOCK changes it: that would make two of one VM, so it is asked only where the end of a VM
 * is not seen, and only by a vCPU that is not known.
 */
static __always_inline int is_another(struct vm_state *vm, u64 kvm, u32 *failed)
{
	struct config *cfg = get_config();
	u64 before = vm->clock;

	vm->clock = read_u64(kvm + OFF_KVM_CLOCK, failed);
	return cfg && cfg->vm_by_clock && before && vm->clock != before;
}

/* What VM_SEEN and VM_GONE say of a VM. */
static __always_inline void tell_vm(struct kvmprobe_event *e, const struct vm_key *key, u8 kind, u32 *failed)
{
	u64 leader;

	e->kind = kind;
	e->addr = key->start;
	e->aux = key->tgid;
	if (kind != KVMPROBE_VM_SEEN)
		return;
	e->len = ADDRESS_SPACES;
	leader = read_u64(bpf_get_current_task() + OFF_TASK_GROUP_LEADER, failed);
	note(failed, bpf_probe_read_kernel(&e->value, 16, (void *)(leader + OFF_TASK_COMM)));
}

static __always_inline void tell_lifecycle(struct vcpu_state *st, u8 kind, u8 site, u32 *failed)
{
	struct kvmprobe_event *e = begin(st, KVMPROBE_LIFECYCLE, site);

	e->kind = kind;
	e->aux = st->tid;
	e->len = ADDRESS_SPACES;
	if (kind == KVMPROBE_VCPU_SEEN) {
		e->addr = read_u64(bpf_get_current_task() + OFF_TASK_START_TIME, failed);
		bpf_get_current_comm(&e->value, 16);
	}
}

/* A state for a vCPU seen for the first time; that of the one that was at its address goes. */
static __always_inline struct vcpu_state *new_vcpu(u64 vcpu, u64 kvm, u32 *failed)
{
	u32 zero = 0, n = 0;
	struct vcpu_state *st = find_vcpu(vcpu);

	if (st)
		st->vcpu = 0;
	st = fresh_vcpu.lookup(&zero);
	if (!st)
		return 0;
	if (vcpu_numbers.pop(&n)) {
		count(KVMPROBE_LOST_STATE, KVMPROBE_LIFECYCLE);
		return 0;
	}
	n &= VCPUS - 1;
	states.update(&n, st);
	vcpus.update(&vcpu, &n);
	st = states.lookup(&n);
	if (!st)
		return 0;
	st->vcpu = vcpu;
	st->kvm = kvm;
	st->emulate_ctxt = read_u64(vcpu + OFF_VCPU_EMULATE_CTXT, failed);
	st->id = (u16)read_u32(vcpu + OFF_VCPU_ID, failed);
	return st;
}

static __always_inline void tell_change(struct vcpu_state *st, u8 type, u8 site, u8 kind)
{
	begin(st, type, site)->kind = kind;
}

/* The generation moved since this vCPU was last seen, and no function probe says so. */
static __always_inline void tell_generation(struct now *n, u64 before, u8 site)
{
	struct kvmprobe_event *e = begin(n->st, KVMPROBE_GENERATION, site);

	e->value = before;
	e->gen = n->slots.gen;
	e->len = (u8)n->smm;
}

/* Bind this thread to a vCPU.  The one it ran before is told from it by `threads` alone from now on. */
static __always_inline void bind(u32 tid, u64 vcpu)
{
	u64 *bound = threads.lookup(&tid), before;
	struct vcpu_state *st;

	if (!bound) {
		threads.update(&tid, &vcpu);
		return;
	}
	before = *bound;
	if (before == vcpu)
		return;
	*bound = vcpu;
	st = find_vcpu(before);
	if (st)
		st->roams = 1;
}

/* The state of a vCPU that this thread is known to run, or 0. */
static __always_inline struct vcpu_state *known_vcpu(u64 vcpu, u64 pid_tgid)
{
	u32 tid = (u32)pid_tgid, zero = 0, n, *place;
	struct running *run = running.lookup(&zero);
	struct vcpu_state *st;

	if (!run)
		return 0;
	if (run->vcpu == vcpu && run->pid_tgid == pid_tgid) {
		n = run->n;
		st = states.lookup(&n);
		if (st && st->vcpu == vcpu && !st->roams)
			return st;
	}
	place = vcpus.lookup(&vcpu);
	if (!place || !threads.lookup(&tid))
		return 0;
	n = *place;
	st = states.lookup(&n);
	if (!st || st->vcpu != vcpu)
		return 0;
	bind(tid, vcpu);
	run->vcpu = vcpu;
	run->pid_tgid = pid_tgid;
	run->n = n;
	return st;
}

/* What arrive() answers. */
#define ARRIVED 0
#define NOT_WANTED 1 /* filtered out */
#define UNKNOWN 2    /* introduce the vCPU, then run the program again */

/* fentry's program at the fault has introduce() in it too: KVM's statistics have no room on its stack. */
#ifdef WITH_FENTRY
#define READ_STAT_AT_ONCE(site) ((site) != KVMPROBE_AT_PAGE_FAULT)
#else
#define READ_STAT_AT_ONCE(site) 1
#endif

/*
 * A program that is given its vCPU begins here: it binds thread and vCPU, tells a new vCPU at an old
 * address from the old one, and reports what changed since the last arrival.  What happens rarely and
 * takes long is done by introduce().  `emulating`: at kvm_emulate_insn, before the instruction is
 * counted.
 */
static __always_inline int arrive(struct now *n, u64 vcpu, u8 site, int emulating)
{
	u64 pid_tgid = bpf_get_current_pid_tgid();
	u32 tid = (u32)pid_tgid, tgid = pid_tgid >> 32, before, flags;
	struct config *cfg = get_config();
	struct vcpu_state *st;
	u64 kvm, exits, insns, guest_mode;

	if (!cfg || !cfg->on || (cfg->tgid && cfg->tgid != tgid))
		return NOT_WANTED;
	if (cfg->vcpu != ~0U && cfg->vcpu != read_u32(vcpu + OFF_VCPU_ID, &n->failed))
		return NOT_WANTED;
	st = known_vcpu(vcpu, pid_tgid);
	if (!st)
		return UNKNOWN;
	/* A vCPU begins with both counters at 0: one that is new at this address is told by them, unless
	 * nothing was counted on the one before. */
	kvm = st->kvm;
	if (!(emulating ? st->insns : st->exits))
		kvm = read_u64(vcpu + OFF_VCPU_KVM, &n->failed);
	if (READ_STAT_AT_ONCE(site)) {
		u64 stat[SIZE_VCPU_STAT / 8]; /* from exits to guest_mode */

		note(&n->failed, bpf_probe_read_kernel(stat, sizeof(stat), (void *)(vcpu + OFF_VCPU_STAT)));
		exits = stat[(OFF_VCPU_EXITS - OFF_VCPU_STAT) / 8];
		insns = stat[(OFF_VCPU_INSNS - OFF_VCPU_STAT) / 8];
		guest_mode = stat[(OFF_VCPU_GUEST_MODE - OFF_VCPU_STAT) / 8];
	} else {
		exits = read_u64(vcpu + OFF_VCPU_EXITS, &n->failed);
		insns = read_u64(vcpu + OFF_VCPU_INSNS, &n->failed);
		guest_mode = read_u64(vcpu + OFF_VCPU_GUEST_MODE, &n->failed);
	}
	/* KVM's counters of one vCPU never go back; insn_emulation is counted after this tracepoint, so
	 * it also never stands still from one instruction to the next. */
	st->replaced = st->kvm != kvm || st->tgid != tgid || exits < st->exits ||
		       (emulating && st->insns > insns);
	if (st->replaced || st->tid != tid)
		return UNKNOWN;
	flags = make_flags(vcpu, guest_mode, &n->failed);
	n->vcpu = vcpu;
	read_now(n, kvm, flags);
	before = st->flags;
	if (cfg->generation_by_diff && st->gen != n->slots.gen && !((before ^ flags) & KVMPROBE_F_SMM))
		return UNKNOWN;
	n->st = st;
	st->gen = n->slots.gen;
	release(st);
	st->smm_seen |= !!(flags & KVMPROBE_F_SMM);
	if (st->smm_seen)
		flags |= KVMPROBE_F_SMM_SEEN;
	st->flags = flags;
	st->exits = exits;
	if (emulating)
		st->insns = insns + 1;
	if ((before ^ flags) & KVMPROBE_F_L2)
		tell_change(st, KVMPROBE_NESTING, site, !!(flags & KVMPROBE_F_L2));
	if ((before ^ flags) & KVMPROBE_F_SMM)
		tell_change(st, KVMPROBE_SMM, site, !!(flags & KVMPROBE_F_SMM));
	return ARRIVED;
}

/*
 * What arrive() left: a vCPU that its thread has not brought before, or a generation that moved where no
 * function probe tells.  Binds the thread, numbers the VM, and reports who the vCPU is, the internal
 * slots of its VM, and its cache as found.  Returns 0 when arrive() will know the vCPU.
 */
static __always_inline int introduce(u64 vcpu, u8 site)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();
	struct vcpu_state *st;
	struct vm_state *vm;
	struct vm_key key;
	struct now n = {};
	int known, is_new;
	u32 before = 0; /* the VM that was at this address */

	make_vm_key(&key, read_u64(vcpu + OFF_VCPU_KVM, &n.failed), &n.failed);
	vm = get_vm(&key, 0, &is_new);
	if (!vm)
		return -1;
	bind(tid, vcpu);
	st = find_vcpu(vcpu);
	/* vCPUs go only with their VM: another vCPU at this address is another VM at that one. */
	if (is_another(vm, key.kvm, &n.failed) || (st && st->replaced && st->vm == vm->vm)) {
		before = vm->vm;
		vm->gone = 1;
		vm = get_vm(&key, 0, &is_new);
		if (!vm)
			return -1;
		is_another(vm, key.kvm, &n.failed);
	}
	known = st && !st->replaced && st->vm == vm->vm;
	if (st)
		release(st);
	if (st && !known) {
		tell_lifecycle(st, KVMPROBE_VCPU_GONE, KVMPROBE_AT_FIRST_SIGHT, &n.failed);
		ship(vcpu, st);
	}
	if (!known)
		st = new_vcpu(vcpu, key.kvm, &n.failed);
	if (!st)
		return -1;
	if (before)
		tell_vm(begin_vm(st, before, KVMPROBE_LIFECYCLE, KVMPROBE_AT_FIRST_SIGHT), &key,
			KVMPROBE_VM_GONE, &n.failed);
	if (is_new)
		tell_vm(begin_vm(st, vm->vm, KVMPROBE_LIFECYCLE, KVMPROBE_AT_FIRST_SIGHT), &key, KVMPROBE_VM_SEEN,
			&n.failed);
	n.vcpu = vcpu;
	n.st = st;
	st->tid = tid;
	if (!known) {
		st->vm = vm->vm;
		st->tgid = key.tgid;
		st->flags = make_flags(vcpu, read_u64(vcpu + OFF_VCPU_GUEST_MODE, &n.failed), &n.failed);
		st->smm_seen = !!(st->flags & KVMPROBE_F_SMM);
		if (st->smm_seen)
			st->flags |= KVMPROBE_F_SMM_SEEN;
		tell_lifecycle(st, KVMPROBE_VCPU_SEEN, KVMPROBE_AT_FIRST_SIGHT, &n.failed);
	}
	read_now(&n, key.kvm, st->flags);
	if (known && st->gen != n.slots.gen)
		tell_generation(&n, st->gen, site);
	st->gen = n.slots.gen;
	if (!known) {
		st->refill = KVMPROBE_AT_FIRST_SIGHT;
		sample_cache(&n, KVMPROBE_AT_FIRST_SIGHT);
	}
	ship(vcpu, st); /* the queue has no room for all */
	report_internal_slots(st, vm, key.kvm, &n.failed);
	ship(vcpu, st);
	if (n.failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_LIFECYCLE);
	return 0;
}

/*
 * introduce() is a program of its own, so that its bulk is compiled and verified once and not in every
 * program that arrives.  A program that meets an UNKNOWN vCPU calls it, and it calls the program again,
 * by its site.  Tail calls need programs of one type, hence two sets.
 */
BPF_PERCPU_ARRAY(interrupted, u32, 1);
BPF_PROG_ARRAY(introduce_tp, 1);
BPF_PROG_ARRAY(again_tp, SITES);

int tp_introduce(struct bpf_raw_tracepoint_args *ctx)
{
	int zero = 0;
	u32 *site = interrupted.lookup(&zero);

	if (site && !introduce(ctx->args[0], (u8)*site))
		again_tp.call(ctx, *site);
	return 0;
}

#ifdef WITH_KPROBE
BPF_PROG_ARRAY(introduce_kprobe, 1);
BPF_PROG_ARRAY(again_kprobe, SITES);

int kprobe_introduce(struct pt_regs *ctx)
{
	int zero = 0;
	u32 *site = interrupted.lookup(&zero);

	if (site && !introduce(PT_REGS_PARM1(ctx), (u8)*site))
		again_kprobe.call(ctx, *site);
	return 0;
}
#endif

/* Remember which program is to run again; a tail call that fails loses the event. */
static __always_inline void interrupt(u32 at)
{
	int zero = 0;
	u32 *site = interrupted.lookup(&zero);

	if (site)
		*site = at;
}

/* The end of every program that has a vCPU; `type`: what is lost when memory could not be read. */
static __always_inline void finish(struct now *n, u8 type)
{
	if (n->failed)
		count(KVMPROBE_LOST_READ, type);
	ship(n->vcpu, n->st);
}

/*
 * A program that is not given its vCPU, or does not look at what it does now, takes the one its thread last
 * arrived with.  Nothing is known before a first arrival: such an access began before the recording.
 */
static __always_inline int resume(struct now *n)
{
	u64 pid_tgid = bpf_get_current_pid_tgid(), *bound;
	u32 tid = (u32)pid_tgid, zero = 0, place;
	struct running *run = running.lookup(&zero);
	struct vcpu_state *st = 0;

	if (run && run->pid_tgid == pid_tgid) {
		place = run->n;
		st = states.lookup(&place);
		if (st && (st->vcpu != run->vcpu || st->roams))
			st = 0;
	}
	if (!st) {
		bound = threads.lookup(&tid);
		if (!bound)
			return -1;
		st = find_vcpu(*bound);
	}
	if (!st || st->tid != tid || st->tgid != pid_tgid >> 32)
		return -1;
	n->vcpu = st->vcpu;
	n->st = st;
	return 0;
}
