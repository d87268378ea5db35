/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What `kvmprobe stat` keeps in the kernel: rows of counts and times, and one state a vCPU thread.
 *
 * No event leaves the kernel: user space reads the maps.  Everything is an LRU of fixed size, so memory
 * is bounded whatever guests do; totals tell what gave way.  The numbers TABLE_, FAULT_ and so on are
 * generated from kvmprobe/stat/model.py.
 */

#define ROWS 16384
#define PAGES 8192
#define PENDING 8

/* Set before anything is attached. */
struct config {
	u32 on;   /* 0: attached, but not counting yet */
	u32 tgid; /* this process only; 0: all */
};
BPF_ARRAY(config, struct config, 1);

/* What a row counts; the fields are those of kvmprobe.stat.model.KEY. */
struct stat_key {
	u64 what; /* exit reason, or gpa of a page */
	u32 vm;
	u16 vcpu;
	s16 slot; /* SLOT_HOLE, SLOT_UNKNOWN, or the memslot's id */
	u8 table;
	u8 level; /* 1 or 2 */
	u8 a;     /* see kvmprobe/stat/model.py */
	u8 unused;
	u32 n;    /* of a pending key: how often; of a row's: 0 */
};

struct stat_row {
	u64 count;
	u64 timed; /* how many exits `total` sums up */
	u64 total; /* ns */
	u64 min;
	u64 max;
	u32 histogram[BUCKETS];
};
BPF_TABLE("lru_hash", struct stat_key, struct stat_row, rows, ROWS);
/* Pages are apart: a guest that touches many throws out pages only. */
BPF_TABLE("lru_hash", struct stat_key, struct stat_row, pages, PAGES);
BPF_ARRAY(fresh_row, struct stat_row, 1); /* all zero, never written */

/* What was counted and made, one set a CPU: what rows don't have any more, was evicted. */
struct stat_totals {
	u64 events[TABLES];
	u64 rows_made;
	u64 pages_made;
	u64 failed; /* reads of kernel memory, and places in a full table */
};
BPF_PERCPU_ARRAY(totals, struct stat_totals, 1);

/* A thread and the vCPU it runs; written by that thread alone. */
struct stat_thread {
	u64 vcpu;
	u64 kvm;
	u64 exits;       /* the vCPU's own counters when last looked at: they never go back */
	u64 emulated;
	u64 exit_ts;     /* ns; 0: no exit is open */
	u64 reason;      /* of the open exit */
	u64 insns;       /* emulated since the last entry */
	u64 gen[2];      /* last seen generation, by address space */
	u64 first_gen[2];
	u64 memo_gfn;    /* the last lookup of a gfn */
	u64 memo_gen;
	struct stat_key pending[PENDING]; /* not counted yet: see keep() */
	u32 vm;
	u32 n_pending;
	u16 id;
	s16 memo_slot;
	u8 memo_as;
	u8 level;        /* at the last exit */
	u8 entered;      /* level at the last entry; 0: none seen */
	u8 filler;       /* level that filled the MMIO cache; 0: not seen */
	u8 gens_seen;    /* bit per address space */
	u8 read_waits;   /* user space will answer an unsatisfied read */
	u8 fault;        /* FAULT_SEEN and what followed, of the fault not yet counted */
	u8 isa;
};
BPF_TABLE("lru_hash", u32, struct stat_thread, threads, 16384);
BPF_ARRAY(fresh_thread, struct stat_thread, 1);

/*
 * The thread that emulates on this CPU without an exit, and what it emulated: such instructions come by
 * the million, and a look at this is cheaper than a lookup of the thread.
 */
struct stat_emulating {
	u64 pid_tgid;
	u64 vcpu;
	u64 emulated; /* the vCPU's own counter */
	u64 insns;
};
BPF_PERCPU_ARRAY(emulating, struct stat_emulating, 1);

struct vm_key {
	u64 kvm;
	u64 start; /* of the process, ns */
	u64 clock; /* kvmclock_offset: another VM at the same address has another */
	u32 tgid;
	u32 unused;
};
struct stat_vm {
	u32 vm;
	char comm[16];
};
BPF_TABLE("lru_hash", struct vm_key, struct stat_vm, vms, 8192);
BPF_QUEUE(vm_numbers, u32, VM_NUMBERS);

static __always_inline struct stat_totals *get_totals(void)
{
	int zero = 0;

	return totals.lookup(&zero);
}

static __always_inline void count_failure(void)
{
	struct stat_totals *t = get_totals();

	if (t)
		t->failed++;
}

/*
 * The bucket of a time: 8 of 32 ns each, then 8 to every power of two, so a bucket is never wider than
 * an eighth of its lower end.
 */
static __always_inline u32 bucket_of(u64 ns)
{
	u32 power = 8;
	u64 rest = ns >> 8;

	if (!rest)
		return ns >> 5;
	if (rest >> 16) {
		power += 16;
		rest >>= 16;
	}
	if (rest >> 8) {
		power += 8;
		rest >>= 8;
	}
	if (rest >> 4) {
		power += 4;
		rest >>= 4;
	}
	if (rest >> 2) {
		power += 2;
		rest >>= 2;
	}
	if (rest >> 1)
		power += 1;
	power = 8 * (power - 7) + ((ns >> (power - 3)) & 7);
	return power < BUCKETS ? power : BUCKETS - 1;
}

/* Add to a row, made if need be. */
static __always_inline void add_to_row(const struct stat_key *key, u64 n, int timed, u64 ns, u32 bucket)
{
	struct stat_totals *t = get_totals();
	struct stat_row *row, *fresh;
	u64 at = bucket;
	int zero = 0;

	if (!t)
		return;
	t->events[key->table & (TABLES - 1)] += n;
	if (key->table == TABLE_MMIO)
		row = pages.lookup((struct stat_key *)key);
	else
		row = rows.lookup((struct stat_key *)key);
	if (!row) {
		fresh = fresh_row.lookup(&zero);
		if (!fresh)
			return;
		if (key->table == TABLE_MMIO) {
			pages.update((struct stat_key *)key, fresh);
			row = pages.lookup((struct stat_key *)key);
			t->pages_made++;
		} else {
			rows.update((struct stat_key *)key, fresh);
			row = rows.lookup((struct stat_key *)key);
			t->rows_made++;
		}
		if (!row) {
			t->failed++;
			return;
		}
	}
	row->count += n;
	if (!timed)
		return;
	if (!row->timed || ns < row->min)
		row->min = ns;
	if (ns > row->max)
		row->max = ns;
	row->timed++;
	row->total += ns;
	/* The compiler knows that the mask changes nothing; the verifier does not, and 6.1's wants it. */
	asm volatile("" : "+r"(at));
	row->histogram[at & (BUCKETS - 1)]++;
}

/* Start a key of what happens on a thread's vCPU. */
static __always_inline void make_key(struct stat_key *key, const struct stat_thread *st, u8 table)
{
	key->vm = st->vm;
	key->vcpu = st->id;
	key->slot = SLOT_HOLE;
	key->table = table;
	key->level = st->level;
}

/*
 * Keep what a key says for the next entry, which knows the time of the exit.  Where no exit is open (VMX
 * emulates invalid guest state without one) it stays until there is one, which spares lookups of rows;
 * user space adds what is kept.  What finds no place is counted at once, without a time.
 */
static __always_inline void keep(struct stat_thread *st, struct stat_key *key)
{
	u32 n = st->n_pending;
	struct stat_key *kept;

#pragma unroll
	for (u32 i = 0; i < PENDING; i++) {
		kept = &st->pending[i];
		if (i < n && kept->what == key->what && kept->table == key->table && kept->a == key->a &&
		    kept->slot == key->slot && kept->level == key->level && kept->n != ~0U) {
			kept->n++;
			return;
		}
	}
	if (n < PENDING) {
		key->n = 1;
		st->pending[n & (PENDING - 1)] = *key;
		st->n_pending = n + 1;
		return;
	}
	add_to_row(key, 1, 0, 0, 0);
}
