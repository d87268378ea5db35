/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What a vCPU is doing (level, address space, generations) and its MMIO cache: reading it, comparing it,
 * looking up the memslot behind it, and sampling it.
 */

/* What one run of a program knows about its vCPU. */
struct now {
	u64 vcpu; /* struct kvm_vcpu */
	struct vcpu_state *st; /* 0: nothing to tell */
	u32 failed; /* not 0: memory could not be read */
	struct memslots slots; /* of the vCPU's address space */
	u64 gen0;              /* generation of address space 0 */
	u32 smm;
};

/*
 * Level, address space and kind of MMU, as flags.  `guest_mode` is stat.guest_mode, which is written where
 * KVM sets and clears the guest-mode flag (enter_guest_mode(), leave_guest_mode()); root_role is 4 bytes:
 * direct is bit 7, smm the last byte (union kvm_mmu_page_role).
 */
static __always_inline u32 make_flags(u64 vcpu, u64 guest_mode, u32 *failed)
{
	/* from vcpu->arch.mmu to the role of arch.root_mmu behind it, in one read: it mostly points there */
	struct {
		u64 mmu;
		u32 words[(OFF_VCPU_ROOT_ROLE - OFF_VCPU_MMU - 8) / 4 + 1];
	} m;
	u32 flags = KVMPROBE_F_AS_KNOWN, role;
	u64 mmu;

	note(failed, bpf_probe_read_kernel(&m, sizeof(m), (void *)(vcpu + OFF_VCPU_MMU)));
	mmu = m.mmu;
	role = m.words[(OFF_VCPU_ROOT_ROLE - OFF_VCPU_MMU - 8) / 4];
	if (mmu != vcpu + OFF_VCPU_ROOT_ROLE - OFF_MMU_ROOT_ROLE)
		role = read_u32(mmu + OFF_MMU_ROOT_ROLE, failed);
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
	if (guest_mode)
		flags |= KVMPROBE_F_L2;
	return flags;
}

static __always_inline void read_now(struct now *n, u64 kvm, u32 flags)
{
	struct memslots zero;

	n->smm = !!(flags & KVMPROBE_F_SMM);
	read_memslots(&n->slots, kvm, n->smm, &n->failed);
	n->gen0 = n->slots.gen;
	if (n->smm) {
		read_memslots(&zero, kvm, 0, &n->failed);
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
	find_by_gfn(&s, &n->slots, gfn, &n->failed);
	read_memslots(&again, n->st->kvm, n->smm, &n->failed);
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

static __always_inline int read_cache(struct mmio_cache *c, struct now *n)
{
	long error = bpf_probe_read_kernel(c, sizeof(*c), (void *)(n->vcpu + OFF_VCPU_MMIO_CACHE));

	note(&n->failed, error);
	return error ? -1 : 0;
}

/*
 * KVM writes nothing into the cache while the memslots change that it goes by: an entry found unchanged may
 * be the one of before.
 */
static __always_inline int updating(const struct now *n)
{
	return (n->slots.gen | n->gen0) >> 63;
}

/* Whether the cache was written since it was sampled: gva alone going to 0 is a clear. */
static __always_inline int rewritten(const struct mmio_cache *c, const struct mmio_cache *sampled)
{
	return c->gfn != sampled->gfn || c->gen != sampled->gen || c->access != sampled->access ||
	       (c->gva != sampled->gva && c->gva);
}

/* Whether the cache's entry was filled in the other address space: known only of the entry last sampled. */
static __always_inline u32 compare_fill(const struct now *n, const struct mmio_cache *c)
{
	const struct vcpu_state *st = n->st;

	if (!st->filled_in || c->gfn != st->cache.gfn || c->gen != st->cache.gen)
		return 0;
	return KVMPROBE_F_FILL_AS_KNOWN | (st->filled_in - 1 != n->smm ? KVMPROBE_F_OTHER_AS : 0);
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

/* The cache was looked at: what is found different later came after this. */
static __always_inline void remember_look(struct now *n)
{
	struct vcpu_state *st = n->st;

	st->sampled_gen = n->slots.gen;
	st->sampled_exits = st->exits;
	st->sampled_flags = st->flags;
}

static __always_inline void remember_sample(struct now *n, const struct mmio_cache *c)
{
	struct vcpu_state *st = n->st;

	st->cache = *c;
	remember_look(n);
}

/*
 * Sample the cache.  At first sight it is a CACHE event, whatever it holds: an entry poisoned before the
 * recording is not missed.  Later, changed contents, or a fill announced by a tracepoint, make a FILL;
 * unchanged contents in a new context (level, address space, generation) make a CACHE event where memory
 * stands behind the gfn.  A fill that left all as it was is an event only where it is a candidate.
 */
static __always_inline void sample_cache(struct now *n, u8 site)
{
	struct vcpu_state *st = n->st;
	struct mmio_cache c = {};
	struct kvmprobe_event *e;
	int changed, moved, sure, first = st->refill == KVMPROBE_AT_FIRST_SIGHT;

	if (read_cache(&c, n))
		return;
	changed = rewritten(&c, &st->cache);
	moved = ((st->flags ^ st->sampled_flags) & (KVMPROBE_F_L2 | KVMPROBE_F_SMM)) ||
		st->sampled_gen != n->slots.gen;
	if (!changed && !st->refill && !(moved && c.gfn)) {
		remember_look(n);
		return;
	}
	e = begin(st, !first && (changed || st->refill) ? KVMPROBE_FILL : KVMPROBE_CACHE, st->refill ?: site);
	if (e->type == KVMPROBE_FILL) {
		/* A fill found later: whose it was is sure only if the vCPU has not changed level or
		 * address space since, and left the guest at most once. */
		sure = !((st->flags ^ (st->refill ? st->refill_flags : st->sampled_flags)) &
			 (KVMPROBE_F_L2 | KVMPROBE_F_SMM)) &&
		       (st->refill || st->exits <= st->sampled_exits + 1);
		if (!sure)
			e->flags &= ~(KVMPROBE_F_LEVEL_KNOWN | KVMPROBE_F_L2 | KVMPROBE_F_AS_KNOWN |
				      KVMPROBE_F_SMM);
		st->filled_in = sure && (changed || !updating(n)) ? n->smm + 1 : 0;
	} else {
		e->flags |= compare_fill(n, &c);
	}
	fill_in_cache(e, n, &c);
	st->refill = 0;
	remember_sample(n, &c);
	if (!first && !changed && !(e->type == KVMPROBE_FILL && moved) &&
	    !kvmprobe_candidate(e->type, e->flags, e->slot))
		drop(st);
}
