# SPDX-License-Identifier: MIT
"""What probes/*.h keep between events: who runs, what was sampled, and how a row is made and sent.

Each method stands for the function of the same place and says the same in Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from kvmprobe.probes.schema import (
    NO_VCPU,
    SLOT_TSS,
    LifecycleChange,
    LossCause,
    MemslotChange,
    Site,
    Type,
)
from tests.model.kernel import Vcpu
from tests.model.memslots import IN_PROGRESS, Slot, Vm
from tests.model.rows import (
    AS_KNOWN,
    CANDIDATE,
    DIRECT,
    FILL_AS_KNOWN,
    FIRST_SIGHT,
    GEN_KNOWN,
    IS_AS0,
    IS_CURRENT,
    L2,
    LEVEL_KNOWN,
    NESTED_MMU,
    OTHER_AS,
    SMM,
    SMM_SEEN,
    TWO_AS,
    UNSTABLE,
    Row,
    VcpuState,
    candidate,
    slot_flags,
)
from tests.model.terms import Cache


@dataclass
class State:
    """What the programs of one recording keep and share.

    `functions`: kprobes or fentry work; without them only raw tracepoints see anything.
    `start`: begin to record after so many calls.  `skip_exits`: chance that an exit is missed.
    """

    functions: bool = True
    start: int = 0
    skip_exits: float = 0.0
    random: Random = field(default_factory=lambda: Random(0))

    def __post_init__(self) -> None:
        self.on = False
        self.calls = 0
        self.rows: list[Row] = []
        self.lost: dict[tuple[int, int], int] = {}
        self.vms: dict[int, int] = {}
        self.gone: set[int] = set()
        self.internal: dict[int, set[tuple[int, int]]] = {}
        self.vcpus: dict[Vcpu, VcpuState] = {}
        self.numbers = 0

    # What every program does.

    def _wanted(self, vm: Vm) -> bool:
        """Count the call, and begin to record when it is time."""
        self.calls += 1
        if not self.on and self.calls > self.start:
            self.on = vm.truth.on = True
            vm.steps += 1  # what began before can't be seen in full
        return self.on

    def _count(self, cause: LossCause, kind: Type) -> None:
        key = int(kind), int(cause)
        self.lost[key] = self.lost.get(key, 0) + 1

    def _send(self, row: Row) -> None:
        if candidate(row):
            row.flags |= CANDIDATE
        row.ts = 1_000_000 + 1000 * len(self.rows)
        self.rows.append(row)

    def _begin(self, st: VcpuState, what: Type, site: int, **fields: int) -> Row:
        row = Row(st.vm, st.id, int(what), int(site), **{"flags": st.flags} | fields)
        row.seq, st.seq = st.seq, st.seq + 1
        return row

    def _flags(self, vcpu: Vcpu) -> int:
        flags = AS_KNOWN | LEVEL_KNOWN
        flags |= DIRECT * vcpu.direct | L2 * vcpu.l2 | NESTED_MMU * vcpu.mmu_is_nested
        if vcpu.kind.address_spaces > 1:
            flags |= TWO_AS | SMM * vcpu.smm
        return flags

    def _compare(self, vcpu: Vcpu, now: int, gen: int) -> int:
        return GEN_KNOWN | IS_AS0 * (gen == vcpu.vm.gens[0]) | IS_CURRENT * (gen == now)

    def _compare_fill(self, vcpu: Vcpu, st: VcpuState) -> int:
        cache, sampled = vcpu.cache, st.cache
        if st.filled_in is None or (cache.gfn, cache.gen) != (sampled.gfn, sampled.gen):
            return 0
        return FILL_AS_KNOWN | OTHER_AS * (st.filled_in != vcpu.as_id)

    def _look_up(self, row: Row, vcpu: Vcpu, st: VcpuState, now: int, gfn: int) -> None:
        """The slot at a gfn; `now`: the generation that the program read at its beginning."""
        key = gfn, now, vcpu.smm
        if st.memo and st.memo[0] == key:
            row.slot, row.flags = st.memo[1], row.flags | st.memo[2]
            return
        slot = vcpu.find(gfn)
        vcpu.vm.preempt()
        again = vcpu.vm.gens[vcpu.as_id]
        flags = slot_flags(slot) | UNSTABLE * (again != now or bool(again & IN_PROGRESS))
        row.slot, row.flags = slot.id if slot else -1, row.flags | flags
        st.memo = None if flags & UNSTABLE else (key, row.slot, flags)

    @staticmethod
    def _updating(vcpu: Vcpu, now: int) -> bool:
        """updating()"""
        return bool((now | vcpu.vm.gens[0]) & IN_PROGRESS)

    @staticmethod
    def _rewritten(cache: Cache, old: Cache) -> bool:
        """rewritten()"""
        changed = (cache.gfn, cache.gen, cache.access) != (old.gfn, old.gen, old.access)
        return changed or (cache.gva != old.gva and cache.gva != 0)

    def _in_cache(self, row: Row, vcpu: Vcpu, st: VcpuState, now: int) -> None:
        cache = vcpu.cache
        row.addr, row.value, row.gen = cache.gfn << 12, cache.gva, cache.gen
        row.aux, row.kind = now & 0xFFFFFFFF, cache.access
        row.flags |= self._compare(vcpu, now, cache.gen)
        self._look_up(row, vcpu, st, now, cache.gfn)

    def _remember(self, vcpu: Vcpu, st: VcpuState, now: int) -> None:
        st.cache = vcpu.cache
        self._remember_look(st, now)

    def _remember_look(self, st: VcpuState, now: int) -> None:
        st.sampled_gen, st.sampled_exits, st.sampled_flags = now, st.exits, st.flags

    def _sample(self, vcpu: Vcpu, st: VcpuState, now: int, site: int) -> None:
        """sample_cache()"""
        cache, first = vcpu.cache, st.refill == FIRST_SIGHT
        changed = self._rewritten(cache, st.cache)
        moved = bool((st.flags ^ st.sampled_flags) & (L2 | SMM)) or st.sampled_gen != now
        if not changed and not st.refill and not (moved and cache.gfn):
            self._remember_look(st, now)
            return
        kind = Type.FILL if not first and (changed or st.refill) else Type.CACHE
        row = Row(st.vm, st.id, int(kind), st.refill or int(site), st.flags)
        if kind is Type.FILL:
            since = st.refill_flags if st.refill else st.sampled_flags
            sure = not (st.flags ^ since) & (L2 | SMM)
            sure = sure and bool(st.refill or st.exits <= st.sampled_exits + 1)
            if not sure:
                row.flags &= ~(LEVEL_KNOWN | L2 | AS_KNOWN | SMM)
            known = sure and (changed or not self._updating(vcpu, now))
            st.filled_in = vcpu.as_id if known else None
        else:
            row.flags |= self._compare_fill(vcpu, st)
        self._in_cache(row, vcpu, st, now)
        st.refill = 0
        self._remember(vcpu, st, now)
        news = first or changed or (kind is Type.FILL and moved)
        if not news and not candidate(row):
            return
        row.seq, st.seq = st.seq, st.seq + 1
        self._send(row)

    def _flush(self, st: VcpuState) -> None:
        if st.held is None:
            return
        row, st.held = st.held, None
        row.seq, st.seq = st.seq, st.seq + 1
        self._send(row)

    # Arrivals.

    def _number(self, vm: Vm) -> int | None:
        """get_vm()"""
        if vm.kvm in self.gone:
            return None
        if vm.kvm not in self.vms:
            self.numbers += 1
            self.vms[vm.kvm] = self.numbers
            name = int.from_bytes(b"model\0\0\0", "little")
            self._send(
                Row(self.numbers, NO_VCPU, int(Type.LIFECYCLE), FIRST_SIGHT,
                    kind=int(LifecycleChange.VM_SEEN), len=vm.kind.address_spaces,
                    value=name, aux=vm.kvm, addr=1)
            )  # fmt: skip
        return self.vms[vm.kvm]

    def _lifecycle(self, st: VcpuState, kind: LifecycleChange, site: int) -> None:
        self._send(self._begin(st, Type.LIFECYCLE, site, kind=int(kind), aux=st.tid))

    def _arrive(self, vcpu: Vcpu, site: Site) -> tuple[VcpuState, int] | None:
        if not self._wanted(vcpu.vm):
            return None
        st = self.vcpus.get(vcpu)
        if st is None or st.tid != vcpu.tid:
            st = self._introduce(vcpu, st, int(site))
            if st is None:
                return None
        flags, now = self._flags(vcpu), vcpu.vm.gens[vcpu.as_id]
        before = st.flags
        if not self.functions and st.gen != now and not (before ^ flags) & SMM:
            self._introduce(vcpu, st, int(site))
        st.gen = now
        self._flush(st)
        st.smm_seen |= bool(flags & SMM)
        st.flags = flags | SMM_SEEN * st.smm_seen
        st.exits = vcpu.exits
        for kind, flag in ((Type.NESTING, L2), (Type.SMM, SMM)):
            if (before ^ flags) & flag:
                self._send(self._begin(st, kind, int(site), kind=int(bool(flags & flag))))
        return st, now

    def _introduce(self, vcpu: Vcpu, st: VcpuState | None, site: int) -> VcpuState | None:
        number = self._number(vcpu.vm)
        if number is None:
            return None
        known = st is not None
        if st is not None:
            self._flush(st)
        else:
            flags = self._flags(vcpu)
            flags |= SMM_SEEN * bool(flags & SMM)
            st = VcpuState(number, vcpu.id, vcpu.tid, flags, smm_seen=bool(flags & SMM))
            self.vcpus[vcpu] = st
            self._lifecycle(st, LifecycleChange.VCPU_SEEN, FIRST_SIGHT)
        if st.tid != vcpu.tid:  # open calls are the thread's
            st.tid, st.fault, st.faultin, st.noslot = vcpu.tid, None, None, None
        now = vcpu.vm.gens[vcpu.as_id]
        if known and st.gen != now:
            self._send(
                self._begin(st, Type.GENERATION, site, value=st.gen, gen=now, len=int(vcpu.smm))
            )
        st.gen = now
        if not known:
            st.refill = FIRST_SIGHT
            vcpu.vm.truth.sample(vcpu)  # first sight is wherever the recording begins
            self._sample(vcpu, st, now, FIRST_SIGHT)
        self._internal_slots(vcpu.vm, number)
        return st

    def _internal_slots(self, vm: Vm, number: int) -> None:
        """report_internal_slots()"""
        reported = self.internal.setdefault(number, set())
        for as_id, slots in enumerate(vm.slots):
            there = {s.id: s for s in slots if s.id >= SLOT_TSS}
            reported -= {(as_id, n) for a, n in reported if a == as_id and n not in there}
            for n, s in sorted(there.items()):
                if (as_id, n) not in reported:
                    reported.add((as_id, n))
                    self._memslot(vm, number, as_id, s, MemslotChange.FOUND, Site.FIRST_SIGHT)

    def _memslot(
        self, vm: Vm, number: int, as_id: int, slot: Slot, kind: MemslotChange, site: Site
    ) -> None:
        row = Row(number, NO_VCPU, int(Type.MEMSLOT), int(site), slot_flags(slot))
        row.addr, row.value, row.gen = slot.base << 12, slot.pages, vm.gens[as_id]
        row.aux = 2 * slot.readonly | slot.logged | slot.invalid << 16
        row.slot, row.kind, row.len = slot.id, int(kind), as_id
        self._send(row)

    def _resume(self, vcpu: Vcpu) -> tuple[VcpuState, int] | None:
        if not self._wanted(vcpu.vm):
            return None
        st = self.vcpus.get(vcpu)
        return None if st is None or st.tid != vcpu.tid else (st, vcpu.vm.gens[vcpu.as_id])

    def _skipped(self, kind: Type) -> bool:
        """Whether this exit is missed; the kernel counts that."""
        if self.skip_exits and self.random.random() < self.skip_exits:
            self._count(LossCause.RECURSION, kind)
            return True
        return False
