/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What the programs share: the ring, the counters, and the state of threads, vCPUs and VMs.
 *
 * A vcpu_state is written by the thread that runs the vCPU and by nobody else, so nothing here needs
 * a lock.  The state tables are LRU: an evicted vCPU is simply seen for the first time again.
 */

/* The ring.  Its size in pages is a power of two, chosen by the session. */
BPF_RINGBUF_OUTPUT(events, RING_PAGES);

/* Counters by cause and observation, one set a CPU; cause 0 counts what was sent. */
#define CAUSES 7
#define TYPES 16
#define SITES 32
struct counters {
	u64 n[CAUSES * TYPES];
};
BPF_PERCPU_ARRAY(counters, struct counters, 1);

/* Set by the session before anything is attached. */
struct config {
	u32 on;                 /* 0: attached, but not recording yet */
	u32 tgid;               /* record this process only; 0: all */
	u32 vcpu;               /* record vCPUs with this id only; 0xffffffff: all */
	u32 generation_by_diff; /* no function probe reports generations */
	u32 fill_by_diff;       /* no function probe reports no-slot faults */
};
BPF_ARRAY(config, struct config, 1);

/* The MMIO cache, as it lies in struct kvm_vcpu_arch (the session checks that against BTF). */
struct mmio_cache {
	u64 gva;
	u32 access;
	u32 unused;
	u64 gfn;
	u64 gen;
};

/* The last lookup of a gfn, valid for one generation of one address space. */
struct slot_memo {
	u64 gfn;
	u64 gen;
	u32 flags;
	s16 id;
	u8 smm;
	u8 valid;
};

struct vcpu_state {
	u64 kvm;
	u64 exits;                  /* stat.exits at the last arrival */
	u64 insns;                  /* stat.insn_emulation at the last emulated instruction */
	u64 gen;                    /* generation of the vCPU's address space at the last arrival */
	struct mmio_cache cache;    /* as last sampled */
	u64 sampled_gen;            /* generation of the vCPU's address space at that sample */
	u64 sampled_exits;          /* stat.exits at that sample */
	u64 fault_addr;             /* the last fault, for a row of equal ones */
	u64 fault_error;
	u64 row;                    /* faults like it in a row, without progress */
	u64 row_start;              /* ns */
	u64 row_told;               /* how long the row was when last reported; 0: not yet */
	u64 pf_taken;               /* KVM's counters at the last fault */
	u64 pf_progress;
	struct kvmprobe_event mmio; /* waits for the userspace exit that may follow */
	struct slot_memo memo;
	u32 vm;
	u32 seq;
	u32 tgid;
	u32 tid;
	u32 flags;                  /* level and address space at the last arrival */
	u32 sampled_flags;          /* the same at the last sample of the cache */
	u32 refill_flags;           /* the same when the refill was announced */
	u16 id;
	u8 mmio_waits;              /* mmio holds a record */
	u8 read_waits;              /* user space will answer an unsatisfied read */
	u8 matched;                 /* the cache was believed during this instruction */
	u8 refill;                  /* site of a fill to be read back at the next sample; 0: none */
	u8 smm_seen;
	u8 filled_in;               /* address space in which `cache` was filled, plus 1; 0: not known */
	u8 replaced;                /* another vCPU lies at this address now */
};
BPF_TABLE("lru_hash", u64, struct vcpu_state, vcpus, 16384);
BPF_ARRAY(fresh_vcpu, struct vcpu_state, 1); /* all zero, never written */

/* A thread: the vCPU it runs, and function entries whose exit has not been seen. */
struct thread_state {
	u64 vcpu;
	u64 fault_ts; /* 0: none open */
	u64 fault_addr;
	u64 fault_error;
	u64 faultin;  /* struct kvm_page_fault of an open faultin call */
	u64 faultin_base;
	u64 faultin_npages;
	u64 noslot;   /* the same of an open no-slot call */
	u64 noslot_gfn;
	u32 fault_flags;
	u32 faultin_flags;
	s16 faultin_slot;
};
BPF_TABLE("lru_hash", u32, struct thread_state, threads, 16384);

struct vm_key {
	u64 kvm;
	u64 start; /* of the process, ns */
	u32 tgid;
	u32 unused;
};
struct vm_state {
	u32 vm;
	u32 internal; /* bit per (address space, internal slot) already reported */
	u64 gone;     /* being destroyed: a generation that all later ones of this VM exceed; 0: no */
};
BPF_TABLE("lru_hash", struct vm_key, struct vm_state, vms, 8192);
/* Numbers for new VMs, kept full by the drain: BPF before v3 has no atomic fetch-and-add. */
BPF_QUEUE(vm_numbers, u32, VM_NUMBERS);

static __always_inline void count(u32 cause, u8 type)
{
	int zero = 0;
	struct counters *c = counters.lookup(&zero);
	u32 i = cause * TYPES + type;

	if (c && i < CAUSES * TYPES)
		c->n[i]++;
}

static __always_inline struct config *get_config(void)
{
	int zero = 0;

	return config.lookup(&zero);
}

/* Send an event; its time is taken once its place in the ring is sure. */
static __always_inline void send(struct kvmprobe_event *e)
{
	struct kvmprobe_event *record;

	if (kvmprobe_candidate(e->type, e->flags, e->slot))
		e->flags |= KVMPROBE_F_CANDIDATE;
	record = events.ringbuf_reserve(sizeof(*record));
	if (!record) {
		count(KVMPROBE_LOST_RING, e->type);
		return;
	}
	*record = *e;
	record->ts = bpf_ktime_get_ns();
	count(0, e->type);
	events.ringbuf_submit(record, BPF_RB_NO_WAKEUP);
}

/* A function's exit that is still open when its thread enters the guest was missed. */
static __always_inline void count_missed_exits(struct thread_state *thread)
{
	if (thread->fault_ts)
		count(KVMPROBE_LOST_EXIT, KVMPROBE_FAULT);
	if (thread->faultin)
		count(KVMPROBE_LOST_EXIT, KVMPROBE_FAULTIN);
	if (thread->noslot)
		count(KVMPROBE_LOST_EXIT, KVMPROBE_FILL);
	thread->fault_ts = thread->faultin = thread->noslot = 0;
}

/* Start an event of a vCPU that may come to nothing: it has no seq yet. */
static __always_inline void start(struct kvmprobe_event *e, struct vcpu_state *st, u8 type, u8 site)
{
	e->vm = st->vm;
	e->vcpu = st->id;
	e->type = type;
	e->site = site;
	e->flags = st->flags;
	e->slot = -1;
}

/* Start an event of a vCPU. */
static __always_inline void begin(struct kvmprobe_event *e, struct vcpu_state *st, u8 type, u8 site)
{
	start(e, st, type, site);
	e->seq = st->seq++;
}

/* Send the MMIO record that waited for a userspace exit.  Its time is taken now, so that time never
 * goes back within a vCPU. */
static __always_inline void flush_mmio(struct vcpu_state *st)
{
	if (!st->mmio_waits)
		return;
	st->mmio_waits = 0;
	st->mmio.seq = st->seq++;
	send(&st->mmio);
}
