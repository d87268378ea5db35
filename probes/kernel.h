/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * Reading KVM's structures.  No kernel header is included: every OFF_ and SIZE_ comes from BTF, in a
 * prelude that the session generates.  A read that fails gives 0 and is noted in `*failed`, which each
 * program counts once at its end: a branch at every read would double the verifier's work and the code.
 */

static __always_inline void note(u32 *failed, long error)
{
	if (failed) /* known when it is compiled */
		*failed |= (u32)error;
}

static __always_inline u64 read_u64(u64 address, u32 *failed)
{
	u64 v = 0;

	note(failed, bpf_probe_read_kernel(&v, sizeof(v), (void *)address));
	return v;
}

static __always_inline u32 read_u32(u64 address, u32 *failed)
{
	u32 v = 0;

	note(failed, bpf_probe_read_kernel(&v, sizeof(v), (void *)address));
	return v;
}

/* The memslots of one address space, as this program finds them. */
struct memslots {
	u64 address; /* struct kvm_memslots */
	u64 gen;
};

static __always_inline void read_memslots(struct memslots *m, u64 kvm, u32 smm, u32 *failed)
{
	m->address = read_u64(kvm + OFF_KVM_MEMSLOTS + 8 * (u64)(smm & (ADDRESS_SPACES - 1)), failed);
	m->gen = read_u64(m->address + OFF_MEMSLOTS_GENERATION, failed);
}

/* A memslot, with KVMPROBE_F_SLOT_* flags; id -1: none. */
struct slot {
	u64 base_gfn;
	u64 npages;
	u32 raw_flags;
	u32 flags;
	s16 id;
	u16 as_id;
};

static __always_inline void read_slot(struct slot *s, u64 address, u32 *failed)
{
	s->base_gfn = read_u64(address + OFF_SLOT_BASE_GFN, failed);
	s->npages = read_u64(address + OFF_SLOT_NPAGES, failed);
	s->raw_flags = read_u32(address + OFF_SLOT_FLAGS, failed);
	s->id = (s16)read_u32(address + OFF_SLOT_ID, failed);
	s->as_id = (u16)(read_u32(address + OFF_SLOT_ID, failed) >> 16);
	s->flags = KVMPROBE_F_SLOT_KNOWN;
	if (s->raw_flags & 2) /* KVM_MEM_READONLY */
		s->flags |= KVMPROBE_F_SLOT_READONLY;
	if (s->raw_flags & (1 << 16)) /* KVM_MEMSLOT_INVALID */
		s->flags |= KVMPROBE_F_SLOT_INVALID;
}

/* The slots of an address space are kept in two trees of which node_idx says the active one. */
static __always_inline u64 active_index(u64 memslots, u32 *failed)
{
	return read_u32(memslots + OFF_MEMSLOTS_NODE_IDX, failed) & 1;
}

/*
 * The slot of a gfn: a walk of the red-black tree, as search_memslots() does.  32 steps reach every
 * leaf of a tree of 32,767 slots (its depth is at most 2 log2(n + 1) = 30).
 */
static __always_inline void find_by_gfn(struct slot *s, const struct memslots *m, u64 gfn, u32 *failed)
{
	u64 node = read_u64(m->address + OFF_MEMSLOTS_GFN_TREE, failed);
	u64 back = OFF_SLOT_GFN_NODE + SIZE_GFN_NODE * active_index(m->address, failed);
	u64 range[2];

	s->id = -1;
	s->flags = KVMPROBE_F_SLOT_KNOWN;
#pragma clang loop unroll(disable)
	for (int i = 0; i < 32; i++) {
		if (!node)
			return;
		range[0] = range[1] = 0;
		note(failed, bpf_probe_read_kernel(range, sizeof(range), (void *)(node - back + OFF_SLOT_BASE_GFN)));
		if (gfn < range[0]) {
			node = read_u64(node + OFF_RB_LEFT, failed);
		} else if (gfn < range[0] + range[1]) {
			read_slot(s, node - back, failed);
			return;
		} else {
			node = read_u64(node + OFF_RB_RIGHT, failed);
		}
	}
	s->flags |= KVMPROBE_F_UNSTABLE;
}

/* The slot with an id: a walk of its hash bucket, as id_to_memslot() does. */
static __always_inline void find_by_id(struct slot *s, const struct memslots *m, u32 id, u32 *failed)
{
	u64 bucket = (u32)(id * 0x61C88647U) >> 25; /* hash_min(id, 7) */
	u64 node = read_u64(m->address + OFF_MEMSLOTS_ID_HASH + 8 * bucket, failed);
	u64 back = OFF_SLOT_ID_NODE + SIZE_ID_NODE * active_index(m->address, failed);

	s->id = -1;
	s->flags = KVMPROBE_F_SLOT_KNOWN;
#pragma clang loop unroll(disable)
	for (int i = 0; i < 16; i++) {
		if (!node)
			return;
		if ((u16)read_u32(node - back + OFF_SLOT_ID, failed) == id) {
			read_slot(s, node - back, failed);
			return;
		}
		node = read_u64(node, failed);
	}
}
