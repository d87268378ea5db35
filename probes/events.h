/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The event: the one record that leaves the kernel, and the only definition of it.
 *
 * probes/schema.py reads this file to derive the numpy dtype, the Arrow schema, the names of
 * observations, sites and flags, and docs/events.md.  It understands what stands here: one
 * struct, and enums whose every member has a value and a comment.  A test compiles this header and
 * compares sizes, offsets and values.
 *
 * 56 bytes, and 8 of the ring's own header: one cache line.  Every field means one thing for all
 * observations that carry it (the table below), so that a capture is plain columns.  No kernel
 * pointer and no data of a guest enters an event.
 */
#ifndef KVMPROBE_EVENTS_H
#define KVMPROBE_EVENTS_H

#define KVMPROBE_SCHEMA_MAJOR 1
#define KVMPROBE_SCHEMA_MINOR 1

struct kvmprobe_event {
	u64 ts;    /* CLOCK_MONOTONIC, ns, taken after the record was reserved */
	u32 vm;    /* number of the VM, from 1, never reused in a capture; 0: no VM */
	u32 seq;   /* per vCPU, written by its own thread, advanced for lost records too */
	u16 vcpu;  /* vcpu->vcpu_id; 0xffff: no vCPU */
	u8 type;   /* the observation: enum kvmprobe_type */
	u8 site;   /* where it was seen: enum kvmprobe_site */
	u32 flags; /* enum kvmprobe_flag */
	u64 addr;  /* gpa, or what the table says */
	u64 value; /* see the table */
	u64 gen;   /* mmio_gen of the cache, or what the table says */
	u32 aux;   /* low 32 bits of the current generation, or what the table says */
	s16 slot;  /* memslot id at addr in the vCPU's address space; -1: none (with SLOT_KNOWN) or not looked up */
	u8 kind;   /* see the table */
	u8 len;    /* see the table */
};

/*
 * What the fields say, observation by observation ("-": 0).  FILL, CACHE, MATCH and MMIO carry the
 * whole predicate a rule needs, read in one run of one program on the vCPU's own thread.
 *
 * | type       | addr          | value             | gen            | aux               | slot | kind            | len   |
 * |------------|---------------|-------------------|----------------|-------------------|------|-----------------|-------|
 * | FAULT      | gpa or gva    | error code        | duration, ns   | return, s32       | -    | fault result    | -     |
 * | FAULTIN    | gpa           | slot's base gpa   | slot's npages  | return, s32       | id   | faultin result  | -     |
 * | FILL       | mmio_gfn as gpa | mmio_gva        | mmio_gen       | current gen, low  | id   | mmio_access     | -     |
 * | CACHE      | mmio_gfn as gpa | mmio_gva        | mmio_gen       | current gen, low  | id   | mmio_access     | -     |
 * | MATCH      | gpa           | gva               | mmio_gen       | current gen, low  | id   | -               | -     |
 * | MMIO       | gpa           | exit reason, errno << 32 | mmio_gen | current gen, low | id   | mmio type       | bytes |
 * | EMULATE    | rip           | first opcode bytes, 4 | -          | -                 | -    | -               | -     |
 * | SPTE       | gfn as gpa    | new SPTE          | old SPTE without its pfn, or kvm_gen << 32 and spte_gen | sptep, low 30 bits | - | spte change | - |
 * | MEMSLOT    | base gpa      | npages            | generation     | slot flags        | id   | memslot change  | as_id |
 * | GENERATION | -             | generation before | generation     | -                 | -    | -               | as_id |
 * | NESTING    | -             | -                 | -              | -                 | -    | 1 entered L2, 0 left | - |
 * | SMM        | -             | -                 | -              | -                 | -    | 1 entered, 0 left | -   |
 * | LIFECYCLE  | process or thread start, ns | comm or name, bytes 0-7 | comm or name, bytes 8-15 | tgid or tid | - | lifecycle change | address spaces, or part of the name |
 * | LOSS       | records       | -                 | -              | CPU, or 0xffffffff: not told | -    | the observation | loss cause |
 */

enum kvmprobe_type {
	KVMPROBE_FAULT = 1,       /* a fault reached kvm_mmu_page_fault() */
	KVMPROBE_FAULTIN = 2,     /* which memslot a fault resolved to, and whether it was kept */
	KVMPROBE_FILL = 3,        /* the MMIO cache was written */
	KVMPROBE_CACHE = 4,       /* the MMIO cache as found: at first sight, or in a new context */
	KVMPROBE_MATCH = 5,       /* the MMIO cache was believed */
	KVMPROBE_MMIO = 6,        /* an access was emulated as MMIO */
	KVMPROBE_EMULATE = 7,     /* KVM began to emulate an instruction */
	KVMPROBE_SPTE = 8,        /* an MMIO SPTE was made or checked */
	KVMPROBE_MEMSLOT = 9,     /* a memslot was created, moved, deleted, reflagged or found */
	KVMPROBE_GENERATION = 10, /* the memslot generation moved */
	KVMPROBE_NESTING = 11,    /* the vCPU entered or left L2 */
	KVMPROBE_SMM = 12,        /* the vCPU entered or left SMM (address space 1) */
	KVMPROBE_LIFECYCLE = 13,  /* a VM or vCPU was seen for the first time, or went */
	KVMPROBE_LOSS = 14,       /* records that were lost since the last such record */
};

enum kvmprobe_site {
	KVMPROBE_AT_PAGE_FAULT = 1,        /* entry and exit of kvm_mmu_page_fault() */
	KVMPROBE_AT_PAGE_FAULT_TP = 2,     /* tracepoint kvm_page_fault */
	KVMPROBE_AT_FAULTIN = 3,           /* entry and exit of the faultin function */
	KVMPROBE_AT_SPTE_REQUESTED = 4,    /* tracepoint kvm_mmu_spte_requested */
	KVMPROBE_AT_NOSLOT = 5,            /* exit of the no-slot function */
	KVMPROBE_AT_MMIO_SPTE = 6,         /* tracepoint handle_mmio_page_fault */
	KVMPROBE_AT_MARK_MMIO_SPTE = 7,    /* tracepoint mark_mmio_spte */
	KVMPROBE_AT_CHECK_MMIO_SPTE = 8,   /* tracepoint check_mmio_spte */
	KVMPROBE_AT_EMULATE_INSN = 9,      /* tracepoint kvm_emulate_insn */
	KVMPROBE_AT_ENTRY = 10,            /* tracepoint kvm_entry */
	KVMPROBE_AT_MATCH_MMIO = 11,       /* tracepoint vcpu_match_mmio */
	KVMPROBE_AT_MMIO = 12,             /* tracepoint kvm_mmio */
	KVMPROBE_AT_RSVD = 13,             /* entry of kvm_mmu_page_fault(), reserved bit set: KVM's own predicate */
	KVMPROBE_AT_COMMIT_MEMSLOT = 14,   /* entry of kvm_arch_commit_memory_region() */
	KVMPROBE_AT_MEMSLOTS_UPDATED = 15, /* entry of kvm_arch_memslots_updated() */
	KVMPROBE_AT_FIRST_SIGHT = 16,      /* the first event of a VM or vCPU */
	KVMPROBE_AT_VCPU_DESTROY = 17,     /* entry of kvm_arch_vcpu_destroy() */
	KVMPROBE_AT_VM_DESTROY = 18,       /* entry of kvm_destroy_vm() */
	KVMPROBE_AT_DRAIN = 19,            /* made by the drain in user space */
	KVMPROBE_AT_NESTED_TP = 20,        /* nested tracepoints of another tool's trace */
};

enum kvmprobe_flag {
	KVMPROBE_F_L2 = 1 << 0,            /* in guest mode: the access or fill belongs to L2 */
	KVMPROBE_F_LEVEL_KNOWN = 1 << 1,   /* L2 says L1 or L2; without this flag the level is unknown */
	KVMPROBE_F_SMM = 1 << 2,           /* address space 1 */
	KVMPROBE_F_AS_KNOWN = 1 << 3,      /* SMM says which address space */
	KVMPROBE_F_DIRECT = 1 << 4,        /* the vCPU's MMU is direct: not shadow paging */
	KVMPROBE_F_NESTED_MMU = 1 << 5,    /* the vCPU's MMU is guest_mmu: L1 gives L2 nested EPT or NPT */
	KVMPROBE_F_WRITE = 1 << 6,         /* the access writes */
	KVMPROBE_F_UNSTABLE = 1 << 7,      /* memslots changed during the lookup: the event convicts nobody */
	KVMPROBE_F_SLOT_KNOWN = 1 << 8,    /* slot was looked up */
	KVMPROBE_F_SLOT_READONLY = 1 << 9, /* the slot is KVM_MEM_READONLY */
	KVMPROBE_F_SLOT_INVALID = 1 << 10, /* the slot is KVM_MEMSLOT_INVALID: being deleted or moved */
	KVMPROBE_F_SLOT_PRESUMED = 1 << 11, /* slot was inferred, not looked up in the kernel */
	KVMPROBE_F_BY_GPA = 1 << 12,       /* MATCH: by gpa; without it by gva */
	KVMPROBE_F_TO_USERSPACE = 1 << 13, /* MMIO: left to the VMM */
	KVMPROBE_F_FAILED = 1 << 14,       /* EMULATE: the instruction could not be emulated */
	KVMPROBE_F_BELIEVED = 1 << 15,     /* FAULT: a reserved-bit fault for which the cache is believed; MATCH at RSVD says under which generation */
	KVMPROBE_F_GEN_KNOWN = 1 << 16,    /* GEN_IS_AS0 and GEN_IS_CURRENT say something */
	KVMPROBE_F_GEN_IS_AS0 = 1 << 17,   /* mmio_gen equals the generation of address space 0 */
	KVMPROBE_F_GEN_IS_CURRENT = 1 << 18, /* mmio_gen equals the generation of the vCPU's address space */
	KVMPROBE_F_TWO_AS = 1 << 19,       /* the VM has two address spaces */
	KVMPROBE_F_SMM_SEEN = 1 << 20,     /* the vCPU was in SMM at some time */
	KVMPROBE_F_MATCHED = 1 << 21,      /* MMIO: the cache was believed in the same emulation */
	KVMPROBE_F_PRESENT = 1 << 22,      /* SPTE: the old SPTE was present and differs from the new */
	KVMPROBE_F_CANDIDATE = 1 << 23,    /* could matter to a rule: see kvmprobe_candidate() */
	KVMPROBE_F_FILL_AS_KNOWN = 1 << 24, /* CACHE, MATCH, MMIO: OTHER_AS says something (since 1.1) */
	KVMPROBE_F_OTHER_AS = 1 << 25,     /* CACHE, MATCH, MMIO: the cache was filled in the other address space */
	KVMPROBE_F_STUCK = 1 << 26,        /* FAULT: in a long row of equal faults without progress (since 1.1) */
};

enum kvmprobe_fault_result {
	KVMPROBE_FAULT_UNKNOWN = 0,   /* the exit was not seen */
	KVMPROBE_FAULT_USERSPACE = 1, /* kvm_mmu_page_fault() returned 0 */
	KVMPROBE_FAULT_RESUMED = 2,   /* it returned more than 0 */
	KVMPROBE_FAULT_ERROR = 3,     /* it returned less than 0 */
};

enum kvmprobe_faultin_result {
	KVMPROBE_FAULTIN_UNKNOWN = 0, /* the exit was not seen */
	KVMPROBE_FAULTIN_KEPT = 1,    /* a pfn was found */
	KVMPROBE_FAULTIN_NOSLOT = 2,  /* routed to no-slot: pfn is KVM_PFN_NOSLOT */
	KVMPROBE_FAULTIN_ERROR = 3,   /* an error pfn, or to be retried */
};

enum kvmprobe_mmio_type {
	KVMPROBE_MMIO_UNSATISFIED_READ = 0, /* KVM_TRACE_MMIO_READ_UNSATISFIED */
	KVMPROBE_MMIO_READ = 1,             /* KVM_TRACE_MMIO_READ: an in-kernel device answered */
	KVMPROBE_MMIO_WRITE = 2,            /* KVM_TRACE_MMIO_WRITE */
};

enum kvmprobe_spte_change {
	KVMPROBE_SPTE_MARKED = 1, /* an MMIO SPTE is being made */
	KVMPROBE_SPTE_VALID = 2,  /* checked: its generation is current */
	KVMPROBE_SPTE_STALE = 3,  /* checked: its generation is old */
};

enum kvmprobe_memslot_change {
	KVMPROBE_MEMSLOT_CREATED = 0,    /* KVM_MR_CREATE */
	KVMPROBE_MEMSLOT_DELETED = 1,    /* KVM_MR_DELETE */
	KVMPROBE_MEMSLOT_MOVED_FROM = 2, /* KVM_MR_MOVE, the old place */
	KVMPROBE_MEMSLOT_REFLAGGED = 3,  /* KVM_MR_FLAGS_ONLY */
	KVMPROBE_MEMSLOT_MOVED_TO = 4,   /* KVM_MR_MOVE, the new place */
	KVMPROBE_MEMSLOT_FOUND = 5,      /* there already, at first sight of the VM or its new generation */
};

enum kvmprobe_lifecycle_change {
	KVMPROBE_VM_SEEN = 1,   /* first event of a VM; aux: tgid */
	KVMPROBE_VCPU_SEEN = 2, /* first event of a vCPU; aux: tid */
	KVMPROBE_VCPU_GONE = 3, /* destroyed, or its place taken by another; aux: tid */
	KVMPROBE_VM_GONE = 4,   /* destroyed; aux: tgid */
	KVMPROBE_VM_NAMED = 5,  /* made by the drain: 16 bytes of the VMM's name for the VM; len: which 16 (since 1.1) */
};

enum kvmprobe_loss_cause {
	KVMPROBE_LOST_RING = 1,      /* the ring was full */
	KVMPROBE_LOST_EXIT = 2,      /* an entry found the last entry still open: its exit was missed */
	KVMPROBE_LOST_STATE = 3,     /* a state table was full */
	KVMPROBE_LOST_RECURSION = 4, /* the kernel skipped the program: counted by the kernel */
	KVMPROBE_LOST_READ = 5,      /* kernel memory could not be read */
	KVMPROBE_LOST_WRITER = 6,    /* drained, but the writer could not keep up */
};

/* Slot ids from here on are KVM's own (KVM_USER_MEM_SLOTS, since v5.15). */
#define KVMPROBE_SLOT_TSS 32764      /* TSS_PRIVATE_MEMSLOT */
#define KVMPROBE_SLOT_APIC 32765     /* APIC_ACCESS_PAGE_PRIVATE_MEMSLOT */
#define KVMPROBE_SLOT_IDENTITY 32766 /* IDENTITY_PAGETABLE_PRIVATE_MEMSLOT */

/*
 * Could this event make a difference to a rule, whatever came before it?  The live detector steps
 * over such events only.  Bulk types matter only where memory stands behind the address, or where the
 * MMIO cache meets SMM (CVE-2026-99082); the rest are rare.  analysis/candidates.py says the same over
 * columns, and a test compares the two.
 */
static inline int kvmprobe_candidate(u8 type, u32 flags, s16 slot)
{
	switch (type) {
	case KVMPROBE_EMULATE:
	case KVMPROBE_SPTE:
		return !!(flags & KVMPROBE_F_PRESENT);
	case KVMPROBE_FAULT:
		return !!(flags & KVMPROBE_F_STUCK);
	case KVMPROBE_FAULTIN:
		return slot >= KVMPROBE_SLOT_TSS;
	case KVMPROBE_FILL:
		return slot >= 0 || (flags & KVMPROBE_F_SMM);
	case KVMPROBE_MATCH:
		return slot >= 0 || (flags & KVMPROBE_F_OTHER_AS) ||
		       (flags & (KVMPROBE_F_SMM_SEEN | KVMPROBE_F_GEN_IS_CURRENT)) == KVMPROBE_F_SMM_SEEN;
	case KVMPROBE_CACHE:
	case KVMPROBE_MMIO:
		return slot >= 0;
	default:
		return 1;
	}
}

#endif /* KVMPROBE_EVENTS_H */
