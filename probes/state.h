/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What the programs share: the ring, the counters, and the state of threads, vCPUs and VMs.
 *
 * A vcpu_state is written by the thread that runs the vCPU and by nobody else, so nothing here needs
 * a lock.  All tables are of fixed size: a vCPU whose state gave way is simply seen for the first time again.
 */

/*
 * The rings.  Their sizes in pages are powers of two, chosen by the session.  What a verdict may turn on
 * (CANDIDATE) goes into the reserve where the first has no room, so that a flood of other events does not
 * push it out.
 */
BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_RINGBUF_OUTPUT(reserve, RESERVE_PAGES);

/*
 * What each VM has taken of both rings since the last drain, by its number modulo SHARES (two VMs may share
 * a share).  One VM gets half of a ring at most: the others find room beside one that floods.
 */
#define SHARES 4096
struct share {
	u64 epoch; /* config.epoch at the last event */
	u64 taken[2];
};
BPF_ARRAY(shares, struct share, SHARES);

/* Counters by cause and observation, one set a CPU; cause 0 counts what was sent. */
#define CAUSES 7
#define TYPES 16
#define SITES 32
struct counters {
	u64 n[CAUSES * TYPES];
};
BPF_PERCPU_ARRAY(counters, struct counters, 1);

/* Losses known to be one VM's; counter 0 counts them all.  Where this table is full they are the host's. */
struct loss_key {
	u32 vm;
	u32 counter; /* as in struct counters */
};
BPF_TABLE("hash", struct loss_key, u64, vm_losses, 4096);

/* Set by the session before anything is attached; `epoch` is counted up by each drain. */
struct config {
	u32 on;                 /* 0: attached, but not recording yet */
	u32 tgid;               /* record this process only; 0: all */
	u32 vcpu;               /* record vCPUs with this id only; 0xffffffff: all */
	u32 generation_by_diff; /* no function probe reports generations */
	u32 fill_by_diff;       /* no function probe reports no-slot faults */
	u32 vm_by_clock;        /* no function probe reports the end of VMs */
	u32 epoch;
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

/* Function entries whose exit has not been seen. */
struct open_calls {
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

struct vcpu_state {
	u64 vcpu; /* struct kvm_vcpu; 0: none */
	u64 kvm;
	u64 emulate_ctxt;           /* vcpu->arch.emulate_ctxt, which never changes */
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
	struct kvmprobe_event held; /* MMIO waits for the userspace exit, MATCH for the MMIO that may follow */
#define QUEUE 8 /* no run has more than 6 */
	struct kvmprobe_event queue[QUEUE]; /* what this run of a program sends at its end */
	struct slot_memo memo;
	struct open_calls open;
	u32 vm;
	u32 seq;
	u32 tgid;
	u32 tid;
	u32 flags;                  /* level and address space at the last arrival */
	u32 sampled_flags;          /* the same at the last sample of the cache */
	u32 refill_flags;           /* the same when the refill was announced */
	u16 id;
	u8 holds;                   /* type of the event in `held`; 0: none */
	u8 queued;                  /* events in `queue` */
	u8 read_waits;              /* user space will answer an unsatisfied read */
	u8 matched;                 /* the cache was believed during this instruction */
	u8 refill;                  /* site of a fill to be read back at the next sample; 0: none */
	u8 smm_seen;
	u8 filled_in;               /* address space in which `cache` was filled, plus 1; 0: not known */
	u8 replaced;                /* another vCPU lies at this address now */
	u8 level_told;              /* WATCH: that it enters L2 was told */
	u8 roams;                   /* its thread has run another vCPU since: only `threads` tells which it runs */
};
#define VCPUS 16384
/* By number modulo VCPUS: so the vCPU that came VCPUS vCPUs ago gives way. */
BPF_ARRAY(states, struct vcpu_state, VCPUS);
BPF_TABLE("lru_hash", u64, u32, vcpus, VCPUS);
/* Numbers for new vCPUs, kept full by the drain as vm_numbers is. */
BPF_QUEUE(vcpu_numbers, u32, VM_NUMBERS);
BPF_ARRAY(fresh_vcpu, struct vcpu_state, 1); /* all zero, never written */

/* A thread and the vCPU that it last arrived with. */
BPF_TABLE("lru_hash", u32, u64, threads, 16384);

/* The same of the thread that last arrived on this CPU: most programs need no look at `threads`. */
struct running {
	u64 pid_tgid;
	u64 vcpu;
	u32 n; /* place in `states` */
};
BPF_PERCPU_ARRAY(running, struct running, 1);

static __always_inline struct vcpu_state *find_vcpu(u64 vcpu)
{
	u32 *n = vcpus.lookup(&vcpu);
	struct vcpu_state *st;

	if (!n)
		return 0;
	st = states.lookup(n);
	return st && st->vcpu == vcpu ? st : 0;
}

static __always_inline void forget_vcpu(struct vcpu_state *st)
{
	u64 vcpu = st->vcpu;

	st->vcpu = 0;
	vcpus.delete(&vcpu);
}

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
	u64 clock;    /* its kvmclock_offset when a vCPU was first seen; 0: none was */
};
BPF_TABLE("lru_hash", struct vm_key, struct vm_state, vms, 8192);
/* Numbers for new VMs, kept full by the drain: BPF before v3 has no atomic fetch-and-add. */
BPF_QUEUE(vm_numbers, u32, VM_NUMBERS);

static __always_inline void count(u32 cause, u8 type)
{
	int zero = 0;
	struct counters *c = counters.lookup(&zero);

	if (c)
		c->n[cause * TYPES + (type & (TYPES - 1))]++;
}

static __always_inline struct config *get_config(void)
{
	int zero = 0;

	return config.lookup(&zero);
}

/* Count a loss: as the VM's where there is one. */
static __always_inline void count_of(u32 vm, u32 cause, u8 type)
{
	struct loss_key key = {.vm = vm, .counter = cause * TYPES + type};
	u64 *n, zero = 0;

	if (vm) {
		vm_losses.insert(&key, &zero);
		n = vm_losses.lookup(&key);
		if (n) {
			__sync_fetch_and_add(n, 1);
			count(0, 0);
			return;
		}
	}
	count(cause, type);
}

/* Whether a VM may have one more record of a ring. */
static __always_inline int has_share(struct share *share, u32 ring, u64 records)
{
	return share && share->taken[ring] < records / 2;
}

/* Send an event that is complete; without room it is lost and counted. */
static __always_inline void send(struct kvmprobe_event *e)
{
	struct config *cfg = get_config();
	struct kvmprobe_event *record = 0;
	u32 i = e->vm % SHARES;
	struct share *share = shares.lookup(&i);
	u32 ring = 0;

	if (cfg && share && share->epoch != cfg->epoch) {
		share->epoch = cfg->epoch;
		share->taken[0] = share->taken[1] = 0;
	}
	if (has_share(share, 0, RING_RECORDS))
		record = events.ringbuf_reserve(sizeof(*record));
	if (!record && (e->flags & KVMPROBE_F_CANDIDATE) && has_share(share, 1, RESERVE_RECORDS)) {
		record = reserve.ringbuf_reserve(sizeof(*record));
		ring = 1;
	}
	if (!record) {
		count_of(e->vm, KVMPROBE_LOST_RING, e->type);
		return;
	}
	*record = *e;
	events.ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	if (share)
		__sync_fetch_and_add(&share->taken[ring], 1);
	count(0, e->type);
}

/* Send an event that belongs to no vCPU. */
static __always_inline void send_now(struct kvmprobe_event *e)
{
	e->flags |= KVMPROBE_F_CANDIDATE;
	e->ts = bpf_ktime_get_ns();
	send(e);
}

/* Whether an event that no rule needs is of use. */
#define KEEP_ALL (!WATCH || FLIGHT)

#if FLIGHT
/* The last events of each vCPU, shipped or not: the oldest is overwritten. */
struct flight {
	u64 n;   /* written so far; user space trusts no event that may have been overwritten meanwhile */
	u32 seq; /* of the next event here, where nothing is left out */
	u32 unused;
	struct kvmprobe_event events[FLIGHT_EVENTS];
};
BPF_TABLE("lru_hash", u64, struct flight, flights, FLIGHT_VCPUS);
BPF_ARRAY(fresh_flight, struct flight, 1); /* all zero, never written */

static __always_inline struct flight *get_flight(u64 vcpu)
{
	struct flight *f = flights.lookup(&vcpu), *fresh;
	int zero = 0;

	if (f)
		return f;
	fresh = fresh_flight.lookup(&zero);
	if (fresh)
		flights.update(&vcpu, fresh);
	return flights.lookup(&vcpu);
}

static __always_inline void keep_in_flight(struct flight *f, const struct kvmprobe_event *e)
{
	struct kvmprobe_event *kept = &f->events[f->n & (FLIGHT_EVENTS - 1)];

	*kept = *e;
	kept->seq = e->vcpu == 0xffff ? 0 : f->seq++;
	f->n++;
}
#endif

/*
 * Does watch mode leave this event out?  Of the candidates no rule needs the change of level, which some
 * guests make at every exit: that the vCPU enters L2 is told once.
 */
static __always_inline int left_out(struct vcpu_state *st, const struct kvmprobe_event *e)
{
	if (!WATCH)
		return 0;
	if (e->type == KVMPROBE_SMM || (e->type == KVMPROBE_NESTING && st->level_told))
		return 1;
	if (e->type == KVMPROBE_NESTING)
		st->level_told = 1;
	return !(e->flags & KVMPROBE_F_CANDIDATE);
}

/*
 * Send what a run has queued.  One loop at the end of each program: compiled at every place that makes an
 * event, sending would be most of every program.  The events of one run lie a nanosecond apart, so that
 * their time orders those of both rings.
 */
static __always_inline void ship(u64 vcpu, struct vcpu_state *st)
{
	u32 queued;
	u64 now;
#if FLIGHT
	struct flight *f;
#endif

	if (!st || !st->queued)
		return;
	queued = st->queued;
	st->queued = 0;
	now = bpf_ktime_get_ns();
#if FLIGHT
	f = get_flight(vcpu);
#endif
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < QUEUE; i++) {
		struct kvmprobe_event *e = &st->queue[i];

		if (i >= queued)
			break;
		e->ts = now + i;
		if (kvmprobe_candidate(e->type, e->flags, e->slot))
			e->flags |= KVMPROBE_F_CANDIDATE;
#if FLIGHT
		if (f) {
			struct flight *known = f;

			/* Or LLVM computes with the pointer ahead of the test, which the verifier refuses. */
			asm volatile("" : "+r"(known));
			keep_in_flight(known, e);
		}
#endif
		if (left_out(st, e))
			continue;
		if (e->vcpu != 0xffff)
			e->seq = st->seq++;
		send(e);
	}
}

/* A function's exit that is still open when its vCPU enters the guest was missed. */
static __always_inline void count_missed_exits(struct vcpu_state *st)
{
	if (st->open.fault_ts)
		count_of(st->vm, KVMPROBE_LOST_EXIT, KVMPROBE_FAULT);
	if (st->open.faultin)
		count_of(st->vm, KVMPROBE_LOST_EXIT, KVMPROBE_FAULTIN);
	if (st->open.noslot)
		count_of(st->vm, KVMPROBE_LOST_EXIT, KVMPROBE_FILL);
	st->open.fault_ts = st->open.faultin = st->open.noslot = 0;
}

/* A place in the queue: ship() gives the event its time and its seq. */
static __always_inline struct kvmprobe_event *place(struct vcpu_state *st)
{
	struct kvmprobe_event *e = &st->queue[st->queued & (QUEUE - 1)];

	st->queued++;
	__builtin_memset(e, 0, sizeof(*e));
	e->slot = -1;
	return e;
}

/* Start an event of a vCPU, in the queue. */
static __always_inline struct kvmprobe_event *begin(struct vcpu_state *st, u8 type, u8 site)
{
	struct kvmprobe_event *e = place(st);

	e->vm = st->vm;
	e->vcpu = st->id;
	e->type = type;
	e->site = site;
	e->flags = st->flags;
	return e;
}

/* Start an event of a VM, in the queue of a vCPU. */
static __always_inline struct kvmprobe_event *begin_vm(struct vcpu_state *st, u32 vm, u8 type, u8 site)
{
	struct kvmprobe_event *e = place(st);

	e->vm = vm;
	e->vcpu = 0xffff;
	e->type = type;
	e->site = site;
	return e;
}

/* Take the event that was started last out of the queue: it says nothing new. */
static __always_inline void drop(struct vcpu_state *st)
{
	st->queued--;
}

/* Queue the event that was held. */
static __always_inline void release(struct vcpu_state *st)
{
	if (!st->holds)
		return;
	st->holds = 0;
	*place(st) = st->held;
}
