/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * MEMSLOT and GENERATION, and the end of vCPUs and VMs.  These run on whatever thread makes the change,
 * of a VM that may not have been seen: then it is numbered here.
 */

static __always_inline int wanted(void)
{
	struct config *cfg = get_config();

	return cfg && cfg->on && (!cfg->tgid || cfg->tgid == bpf_get_current_pid_tgid() >> 32);
}

/* A VM met for the first time by a change of its memslots, or at its end. */
static __always_inline void send_vm(u32 vm, const struct vm_key *key, u8 kind, u8 site, u32 *failed)
{
	struct kvmprobe_event e = {};

	e.vm = vm;
	e.vcpu = 0xffff;
	e.type = KVMPROBE_LIFECYCLE;
	e.site = site;
	e.slot = -1;
	tell_vm(&e, key, kind, failed);
	send_now(&e);
}

static __always_inline void send_memslot(u32 vm, const struct slot *s, u64 gen, u8 change)
{
	struct kvmprobe_event e = {};

	e.vm = vm;
	e.vcpu = 0xffff;
	e.type = KVMPROBE_MEMSLOT;
	e.site = KVMPROBE_AT_COMMIT_MEMSLOT;
	e.flags = s->flags;
	e.addr = s->base_gfn << 12;
	e.value = s->npages;
	e.gen = gen;
	e.aux = s->raw_flags;
	e.slot = s->id;
	e.kind = change;
	e.len = (u8)s->as_id;
	send_now(&e);
}

/* kvm_arch_commit_memory_region(kvm, old, new, change): `new` is NULL when a slot is deleted. */
static __always_inline int on_commit_memslot(u64 kvm, u64 old, u64 new, u32 change, u32 *failed)
{
	struct memslots m = {};
	struct vm_state *vm;
	struct slot s = {};
	struct vm_key key;
	int is_new;

	if (!wanted())
		return 0;
	read_slot(&s, new ?: old, failed);
	read_memslots(&m, kvm, s.as_id, failed);
	make_vm_key(&key, kvm, failed);
	vm = get_vm(&key, m.gen, &is_new);
	if (!vm)
		return 0;
	if (is_new)
		send_vm(vm->vm, &key, KVMPROBE_VM_SEEN, KVMPROBE_AT_FIRST_SIGHT, failed);
	if (change == KVMPROBE_MEMSLOT_DELETED || change == KVMPROBE_MEMSLOT_MOVED_FROM) {
		read_slot(&s, old, failed);
		send_memslot(vm->vm, &s, m.gen, (u8)change);
	}
	if (change == KVMPROBE_MEMSLOT_DELETED || !new)
		return 0;
	read_slot(&s, new, failed);
	send_memslot(vm->vm, &s, m.gen, change == KVMPROBE_MEMSLOT_MOVED_FROM ? KVMPROBE_MEMSLOT_MOVED_TO : (u8)change);
	return 0;
}

/*
 * kvm_arch_memslots_updated(kvm, gen): once per activation, gen without the in-progress bit.  With two
 * address spaces its lowest bit is the index of the one that changed (generations start at the index and
 * go up by the number of address spaces).
 */
static __always_inline int on_memslots_updated(u64 kvm, u64 gen, u32 *failed)
{
	struct kvmprobe_event e = {};
	struct vm_state *vm;
	struct vm_key key;
	int is_new;

	if (!wanted())
		return 0;
	make_vm_key(&key, kvm, failed);
	vm = get_vm(&key, gen, &is_new);
	if (!vm)
		return 0;
	if (is_new)
		send_vm(vm->vm, &key, KVMPROBE_VM_SEEN, KVMPROBE_AT_FIRST_SIGHT, failed);
	e.vm = vm->vm;
	e.vcpu = 0xffff;
	e.type = KVMPROBE_GENERATION;
	e.site = KVMPROBE_AT_MEMSLOTS_UPDATED;
	e.slot = -1;
	e.value = gen - ADDRESS_SPACES;
	e.gen = gen;
	e.len = gen & (ADDRESS_SPACES - 1);
	send_now(&e);
	return 0;
}

static __always_inline int on_vcpu_destroy(u64 vcpu, u32 *failed)
{
	struct vcpu_state *st = find_vcpu(vcpu);

	if (!st)
		return 0;
	release(st);
	tell_lifecycle(st, KVMPROBE_VCPU_GONE, KVMPROBE_AT_VCPU_DESTROY, failed);
	ship(vcpu, st);
	forget_vcpu(st);
	return 0;
}

static __always_inline int on_vm_destroy(u64 kvm, u32 *failed)
{
	struct memslots first = {}, second = {};
	struct vm_state *vm;
	struct vm_key key;

	make_vm_key(&key, kvm, failed);
	vm = vms.lookup(&key);
	if (!vm || vm->gone)
		return 0;
	send_vm(vm->vm, &key, KVMPROBE_VM_GONE, KVMPROBE_AT_VM_DESTROY, failed);
	read_memslots(&first, kvm, 0, failed);
	read_memslots(&second, kvm, ADDRESS_SPACES - 1, failed);
	/* 1 where it never had a slot */
	vm->gone = (first.gen < second.gen ? first.gen : second.gen) ?: 1;
	return 0;
}

/* A thread that ends takes its vCPU's identity with it: the next process may get the same addresses. */
static __always_inline int on_thread_exit(void)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();
	u64 *bound = threads.lookup(&tid);
	struct vcpu_state *st;

	if (!bound)
		return 0;
	st = find_vcpu(*bound);
	if (st && st->tid == tid) {
		release(st);
		tell_lifecycle(st, KVMPROBE_VCPU_GONE, KVMPROBE_AT_FIRST_SIGHT, 0);
		ship(st->vcpu, st);
		forget_vcpu(st);
	}
	threads.delete(&tid);
	return 0;
}

#ifdef WITH_KPROBE
int kprobe_commit_memslot(struct pt_regs *ctx)
{
	u32 failed = 0;

	on_commit_memslot(PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), PT_REGS_PARM3(ctx), PT_REGS_PARM4(ctx), &failed);
	if (failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_MEMSLOT);
	return 0;
}

int kprobe_memslots_updated(struct pt_regs *ctx)
{
	u32 failed = 0;

	on_memslots_updated(PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx), &failed);
	if (failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_MEMSLOT);
	return 0;
}

int kprobe_vcpu_destroy(struct pt_regs *ctx)
{
	u32 failed = 0;

	on_vcpu_destroy(PT_REGS_PARM1(ctx), &failed);
	if (failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_LIFECYCLE);
	return 0;
}

int kprobe_vm_destroy(struct pt_regs *ctx)
{
	u32 failed = 0;

	on_vm_destroy(PT_REGS_PARM1(ctx), &failed);
	if (failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_LIFECYCLE);
	return 0;
}
#endif

#ifdef WITH_FENTRY
int FENTRY_COMMIT_MEMSLOT(struct bpf_raw_tracepoint_args *ctx)
{
	u32 failed = 0;

	on_commit_memslot(ctx->args[0], ctx->args[1], ctx->args[2], ctx->args[3], &failed);
	if (failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_MEMSLOT);
	return 0;
}

int FENTRY_MEMSLOTS_UPDATED(struct bpf_raw_tracepoint_args *ctx)
{
	u32 failed = 0;

	on_memslots_updated(ctx->args[0], ctx->args[1], &failed);
	if (failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_MEMSLOT);
	return 0;
}

int FENTRY_VCPU_DESTROY(struct bpf_raw_tracepoint_args *ctx)
{
	u32 failed = 0;

	on_vcpu_destroy(ctx->args[0], &failed);
	if (failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_LIFECYCLE);
	return 0;
}

int FENTRY_VM_DESTROY(struct bpf_raw_tracepoint_args *ctx)
{
	u32 failed = 0;

	on_vm_destroy(ctx->args[0], &failed);
	if (failed)
		count(KVMPROBE_LOST_READ, KVMPROBE_LIFECYCLE);
	return 0;
}
#endif

int tp_sched_process_exit(struct bpf_raw_tracepoint_args *ctx)
{
	return on_thread_exit();
}
