/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Which vCPU an event belongs to and what that vCPU is doing: identity, level, address space,
 * generations, and the sample of its MMIO cache.
 */

/* What one run of a program knows about its vCPU. */
struct now {
	u64 vcpu; /* struct kvm_vcpu */
	struct vcpu_state *st;
	struct memslots slots; /* of the vCPU's address space */
	u64 gen0;              /* generation of address space 0 */
	u32 smm;
};

/*
 * Level, address space and kind of MMU, as flags.  stat.guest_mode is written where KVM sets and
 * clears the guest-mode flag (enter_guest_mode(), leave_guest_mode()); root_role is 4 bytes: direct
 * is bit 7, smm the last byte (union kvm_mmu_page_role).
 */
static __always_inline u32 read_flags(u64 vcpu, u8 type)
{
	u64 mmu = read_u64(vcpu + OFF_VCPU_MMU, type);
	u32 role = read_u32(mmu + OFF_MMU_ROOT_ROLE, type);
	u32 flags = KVMPROBE_F_AS_KNOWN;

	if (role & (1 << 7))
		flags |= KVMPROBE_F_DIRECT;
	if (ADDRESS_SPACES > 1) {
		flags |= KVMPROBE_F_TWO_AS;
		if (role >> 24)
			flags |= KVMPROBE_F_SMM;
	}
	if (mmu == vcpu + OFF_VCPU_GUEST_MMU)
		flags |= KVMPROBE_F_NESTED_MMU;
	flags |= KVMPROBE_F_LEVEL_KNOWN;
	if (read_u64(vcpu + OFF_VCPU_GUEST_MODE, type))
		flags |= KVMPROBE_F_L2;
	return flags;
}

static __always_inline void read_now(struct now *n, u64 kvm, u8 type)
{
	struct memslots zero;

	n->smm = !!(n->st->flags & KVMPROBE_F_SMM);
	read_memslots(&n->slots, kvm, n->smm, type);
	n->gen0 = n->slots.gen;
	if (n->smm) {
		read_memslots(&zero, kvm, 0, type);
		n->gen0 = zero.gen;
	}
}

/* Look up the slot at a gfn for an event: id, flags, and whether the memslots stood still. */
static __always_inline void look_up(struct kvmprobe_event *e, struct now *n, u64 gfn)
{
	struct slot_memo *memo = &n->st->memo;
	struct memslots again;
	struct slot s = {};

	if (memo->valid && memo->gfn == gfn && memo->gen == n->slots.gen && memo->smm == n->smm) {
		e->slot = memo->id;
		e->flags |= memo->flags;
		return;
	}
	find_by_gfn(&s, &n->slots, gfn, e->type);
	read_memslots(&again, n->st->kvm, n->smm, e->type);
	if (again.address != n->slots.address || again.gen != n->slots.gen || again.gen >> 63)
		s.flags |= KVMPROBE_F_UNSTABLE;
	e->slot = s.id;
	e->flags |= s.flags;
	memo->valid = !(s.flags & KVMPROBE_F_UNSTABLE);
	memo->gfn = gfn;
	memo->gen = n->slots.gen;
	memo->flags = s.flags;
	memo->id = s.id;
	memo->smm = n->smm;
}

/* How mmio_gen compares with the generations a kernel may hold it against (CVE-2026-99082). */
static __always_inline u32 compare_gen(const struct now *n, u64 mmio_gen)
{
	u32 flags = KVMPROBE_F_GEN_KNOWN;

	if (mmio_gen == n->gen0)
		flags |= KVMPROBE_F_GEN_IS_AS0;
	if (mmio_gen == n->slots.gen)
		flags |= KVMPROBE_F_GEN_IS_CURRENT;
	return flags;
}

static __always_inline int read_cache(struct mmio_cache *c, u64 vcpu, u8 type)
{
	if (bpf_probe_read_kernel(c, sizeof(*c), (void *)(vcpu + OFF_VCPU_MMIO_CACHE))) {
		count(KVMPROBE_LOST_READ, type);
		return -1;
	}
	return 0;
}

/* A FILL or CACHE event from the cache's contents. */
static __always_inline void fill_in_cache(struct kvmprobe_event *e, struct now *n,
					  const struct mmio_cache *c)
{
	e->addr = c->gfn << 12;
	e->value = c->gva;
	e->gen = c->gen;
	e->aux = (u32)n->slots.gen;
	e->kind = (u8)c->access;
	e->flags |= compare_gen(n, c->gen);
	look_up(e, n, c->gfn);
}

static __always_inline void remember_sample(struct now *n, const struct mmio_cache *c)
{
	struct vcpu_state *st = n->st;

	st->cache = *c;
	st->sampled_gen = n->slots.gen;
	st->sampled_exits = st->exits;
	st->sampled_flags = st->flags;
}

/*
 * Sample the cache.  At first sight it is a CACHE event, whatever it holds: an entry poisoned before the
 * recording is not missed.  Later, changed contents, or a fill announced by a tracepoint, make a FILL;
 * unchanged contents in a new context (level, address space, generation) make a CACHE event where memory
 * stands behind the gfn.
 */
static __always_inline void sample_cache(struct now *n, u8 site)
{
	struct vcpu_state *st = n->st;
	struct mmio_cache c = {};
	struct kvmprobe_event e = {};
	int changed, moved, first = st->refill == KVMPROBE_AT_FIRST_SIGHT;

	if (read_cache(&c, n->vcpu, KVMPROBE_CACHE))
		return;
	changed = c.gfn != st->cache.gfn || c.gen != st->cache.gen || c.access != st->cache.access ||
		  (c.gva != st->cache.gva && c.gva); /* gva alone going to 0 is a clear */
	moved = ((st->flags ^ st->sampled_flags) & (KVMPROBE_F_L2 | KVMPROBE_F_SMM)) ||
		st->sampled_gen != n->slots.gen;
	if (!changed && !st->refill && !(moved && c.gfn))
		return;
	e.type = !first && (changed || st->refill) ? KVMPROBE_FILL : KVMPROBE_CACHE;
	start(&e, st, e.type, st->refill ?: site);
	/* A fill found later: whose it was is sure only if the vCPU has not changed level since and
	 * left the guest at most once. */
	if (changed && !st->refill &&
	    (((st->flags ^ st->sampled_flags) & KVMPROBE_F_L2) || st->exits > st->sampled_exits + 1))
		e.flags &= ~(KVMPROBE_F_LEVEL_KNOWN | KVMPROBE_F_L2);
	fill_in_cache(&e, n, &c);
	st->refill = 0;
	remember_sample(n, &c);
	if (e.type == KVMPROBE_CACHE && e.slot < 0 && !first)
		return;
	e.seq = st->seq++;
	send(&e);
}

static __always_inline u64 leader_start(u8 type)
{
	u64 task = bpf_get_current_task();
	u64 leader = read_u64(task + OFF_TASK_GROUP_LEADER, type);

	return read_u64(leader + OFF_TASK_START_TIME, type);
}

/* Report internal slots not reported before. */
static __always_inline void report_internal_slots(struct vm_state *vm, u64 kvm)
{
#pragma clang loop unroll(disable)
	for (u32 as = 0; as < ADDRESS_SPACES; as++) {
		struct memslots m = {};

		read_memslots(&m, kvm, as, KVMPROBE_MEMSLOT);
#pragma clang loop unroll(disable)
		for (u32 i = 0; i < 3; i++) {
			u32 bit = 1U << (as * 3 + i);
			struct kvmprobe_event e = {};
			struct slot s = {};

			find_by_id(&s, &m, KVMPROBE_SLOT_TSS + i, KVMPROBE_MEMSLOT);
			if (s.id < 0) {
				vm->internal &= ~bit;
				continue;
			}
			if (vm->internal & bit)
				continue;
			vm->internal |= bit;
			e.vm = vm->vm;
			e.vcpu = 0xffff;
			e.type = KVMPROBE_MEMSLOT;
			e.site = KVMPROBE_AT_FIRST_SIGHT;
			e.flags = s.flags;
			e.addr = s.base_gfn << 12;
			e.value = s.npages;
			e.gen = m.gen;
			e.aux = s.raw_flags;
			e.slot = s.id;
			e.kind = KVMPROBE_MEMSLOT_FOUND;
			e.len = as;
			send(&e);
		}
	}
}

static __always_inline void make_vm_key(struct vm_key *key, u64 kvm)
{
	key->kvm = kvm;
	key->start = leader_start(KVMPROBE_LIFECYCLE);
	key->tgid = bpf_get_current_pid_tgid() >> 32;
	key->unused = 0;
}

/* The VM's state, numbered at its first sight. */
static __always_inline struct vm_state *get_vm(const struct vm_key *key)
{
	struct vm_state *vm = vms.lookup((struct vm_key *)key);
	struct kvmprobe_event e = {};
	struct vm_state fresh = {};

	if (vm)
		return vm;
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
	e.vm = vm->vm;
	e.vcpu = 0xffff;
	e.type = KVMPROBE_LIFECYCLE;
	e.site = KVMPROBE_AT_FIRST_SIGHT;
	e.slot = -1;
	e.kind = KVMPROBE_VM_SEEN;
	e.len = ADDRESS_SPACES;
	e.addr = key->start;
	e.aux = key->tgid;
	if (bpf_probe_read_kernel(&e.value, 16, (void *)(read_u64(bpf_get_current_task() + OFF_TASK_GROUP_LEADER,
								  KVMPROBE_LIFECYCLE) + OFF_TASK_COMM)))
		count(KVMPROBE_LOST_READ, KVMPROBE_LIFECYCLE);
	send(&e);
	return vm;
}

static __always_inline void send_lifecycle(struct vcpu_state *st, u8 kind, u8 site)
{
	struct kvmprobe_event e = {};
	u64 task = bpf_get_current_task();

	begin(&e, st, KVMPROBE_LIFECYCLE, site);
	e.kind = kind;
	e.aux = st->tid;
	e.len = ADDRESS_SPACES;
	if (kind == KVMPROBE_VCPU_SEEN) {
		e.addr = read_u64(task + OFF_TASK_START_TIME, e.type);
		bpf_get_current_comm(&e.value, 16);
	}
	send(&e);
}

/* A state for a vCPU seen for the first time. */
static __always_inline struct vcpu_state *new_vcpu(u64 vcpu, u64 kvm)
{
	int zero = 0;
	struct vcpu_state *st = fresh_vcpu.lookup(&zero);

	if (!st)
		return 0;
	vcpus.update(&vcpu, st);
	st = vcpus.lookup(&vcpu);
	if (!st) {
		count(KVMPROBE_LOST_STATE, KVMPROBE_LIFECYCLE);
		return 0;
	}
	st->kvm = kvm;
	st->id = (u16)read_u32(vcpu + OFF_VCPU_ID, KVMPROBE_LIFECYCLE);
	return st;
}

static __always_inline void send_change(struct vcpu_state *st, u8 type, u8 site, u8 kind)
{
	struct kvmprobe_event e = {};

	begin(&e, st, type, site);
	e.kind = kind;
	send(&e);
}

/* The generation moved since this vCPU was last seen, and no function probe says so. */
static __always_inline void send_generation(struct now *n, u64 before, u8 site)
{
	struct kvmprobe_event e = {};

	begin(&e, n->st, KVMPROBE_GENERATION, site);
	e.value = before;
	e.gen = n->slots.gen;
	e.len = (u8)n->smm;
	send(&e);
}

/*
 * A program that is given its vCPU begins here: it binds thread and vCPU, tells a new vCPU at an old
 * address from the old one, reports what changed since the last arrival, and returns 0, or -1 when
 * the event is not to be recorded.  `emulating`: at kvm_emulate_insn, before the instruction is counted.
 */
static __always_inline int arrive(struct now *n, u64 vcpu, u8 site, int emulating)
{
	u64 pid_tgid = bpf_get_current_pid_tgid();
	u32 tid = (u32)pid_tgid, tgid = pid_tgid >> 32, before, flags;
	struct config *cfg = get_config();
	struct thread_state *thread;
	struct vcpu_state *st;
	u64 kvm, exits, insns, gen_before;
	struct vm_state *vm;
	struct vm_key key;
	int first, moved;

	if (!cfg || !cfg->on || (cfg->tgid && cfg->tgid != tgid))
		return -1;
	if (cfg->vcpu != ~0U && cfg->vcpu != read_u32(vcpu + OFF_VCPU_ID, KVMPROBE_LIFECYCLE))
		return -1;
	thread = threads.lookup(&tid);
	if (!thread) {
		struct thread_state fresh = {};

		fresh.vcpu = vcpu;
		threads.update(&tid, &fresh);
	} else {
		thread->vcpu = vcpu;
	}
	kvm = read_u64(vcpu + OFF_VCPU_KVM, KVMPROBE_LIFECYCLE);
	exits = read_u64(vcpu + OFF_VCPU_EXITS, KVMPROBE_LIFECYCLE);
	insns = emulating ? read_u64(vcpu + OFF_VCPU_INSNS, KVMPROBE_LIFECYCLE) : 0;
	st = vcpus.lookup(&vcpu);
	/* KVM's counters of one vCPU never go back; insn_emulation is counted after this tracepoint, so
	 * it also never stands still from one instruction to the next. */
	if (st && (st->kvm != kvm || st->tgid != tgid || exits < st->exits ||
		   (emulating && st->insns > insns))) {
		send_lifecycle(st, KVMPROBE_VCPU_GONE, KVMPROBE_AT_FIRST_SIGHT);
		st = 0;
	}
	first = !st;
	if (first)
		st = new_vcpu(vcpu, kvm);
	if (!st)
		return -1;
	flush_mmio(st);
	n->vcpu = vcpu;
	n->st = st;
	before = st->flags;
	gen_before = st->gen;
	flags = read_flags(vcpu, KVMPROBE_NESTING);
	st->smm_seen |= !!(flags & KVMPROBE_F_SMM);
	if (st->smm_seen)
		flags |= KVMPROBE_F_SMM_SEEN;
	st->flags = flags;
	st->exits = exits;
	if (emulating)
		st->insns = insns + 1;
	st->tgid = tgid;
	st->tid = tid;
	read_now(n, kvm, KVMPROBE_GENERATION);
	st->gen = n->slots.gen;
	moved = cfg->generation_by_diff && gen_before != st->gen && !((before ^ flags) & KVMPROBE_F_SMM);
	if (first || moved) {
		make_vm_key(&key, kvm);
		vm = get_vm(&key);
		if (!vm) {
			vcpus.delete(&vcpu);
			return -1;
		}
		st->vm = vm->vm;
		report_internal_slots(vm, kvm);
	}
	if (first) {
		st->sampled_flags = flags;
		st->refill = KVMPROBE_AT_FIRST_SIGHT;
		send_lifecycle(st, KVMPROBE_VCPU_SEEN, KVMPROBE_AT_FIRST_SIGHT);
		return 0;
	}
	if ((before ^ flags) & KVMPROBE_F_L2)
		send_change(st, KVMPROBE_NESTING, site, !!(flags & KVMPROBE_F_L2));
	if ((before ^ flags) & KVMPROBE_F_SMM)
		send_change(st, KVMPROBE_SMM, site, !!(flags & KVMPROBE_F_SMM));
	if (moved)
		send_generation(n, gen_before, site);
	return 0;
}

/*
 * A program that is not given its vCPU takes the one its thread last arrived with.  Nothing is known
 * before a first arrival: such an access began before the recording.
 */
static __always_inline struct thread_state *current_thread(void)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();

	return threads.lookup(&tid);
}

static __always_inline int resume(struct now *n, u64 vcpu, u8 type)
{
	struct vcpu_state *st = vcpus.lookup(&vcpu);

	if (!st || st->tgid != bpf_get_current_pid_tgid() >> 32)
		return -1;
	n->vcpu = vcpu;
	n->st = st;
	read_now(n, st->kvm, type);
	return 0;
}
