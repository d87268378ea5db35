# SPDX-License-Identifier: MIT
"""What probes/*.h and *.bpf.c make of what the model does: rows of dtype EVENT.

Each method stands for the program of the same place and says the same in Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import (
    EVENT,
    NO_VCPU,
    SLOT_TSS,
    FaultinResult,
    FaultResult,
    LifecycleChange,
    LossCause,
    MemslotChange,
    MmioType,
    Site,
    SpteChange,
    Type,
)
from tests.model.kernel import EXIT_MMIO, PFERR_RSVD, Vcpu
from tests.model.memslots import IN_PROGRESS, Slot, Vm
from tests.model.rows import (
    AS_KNOWN,
    BELIEVED,
    BY_GPA,
    CANDIDATE,
    DIRECT,
    FILL_AS_KNOWN,
    FIRST_SIGHT,
    GEN_KNOWN,
    IS_AS0,
    IS_CURRENT,
    L2,
    LEVEL_KNOWN,
    MATCHED,
    NESTED_MMU,
    OTHER_AS,
    PRESENT,
    SMM,
    SMM_SEEN,
    TO_USERSPACE,
    TWO_AS,
    UNSTABLE,
    WRITE,
    Row,
    VcpuState,
    candidate,
    slot_flags,
)
from tests.model.truth import PFN_ERROR, PFN_NOSLOT


@dataclass
class Probes:
    """The programs and their state: one recording.

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
        cache, old, first = vcpu.cache, st.cache, st.refill == FIRST_SIGHT
        changed = (cache.gfn, cache.gen, cache.access) != (old.gfn, old.gen, old.access)
        changed = changed or (cache.gva != old.gva and cache.gva != 0)
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

    # mmio.bpf.c

    def entry(self, vcpu: Vcpu) -> None:
        if at := self._arrive(vcpu, Site.ENTRY):
            self._sample(vcpu, *at, int(Site.ENTRY))

    def emulate_insn(self, vcpu: Vcpu) -> None:
        if at := self._arrive(vcpu, Site.EMULATE_INSN):
            self._sample(vcpu, *at, int(Site.EMULATE_INSN))
            at[0].matched = False
            self._send(self._begin(at[0], Type.EMULATE, Site.EMULATE_INSN, addr=0x1000))

    def match(self, vcpu: Vcpu, gva: int, gpa: int, write: bool, by_gpa: bool) -> None:
        if at := self._resume(vcpu):
            st, now = at
            self._flush(st)
            st.matched = True
            gen = vcpu.cache.gen
            row = Row(st.vm, st.id, int(Type.MATCH), int(Site.MATCH_MMIO), st.flags)
            row.addr, row.value, row.gen = gpa, gva, gen
            row.aux = now & 0xFFFFFFFF
            row.flags |= self._compare(vcpu, now, gen) | self._compare_fill(vcpu, st)
            row.flags |= WRITE * write | BY_GPA * by_gpa
            self._look_up(row, vcpu, st, now, gpa >> 12)
            st.held = row

    def mmio(self, vcpu: Vcpu, kind: int, size: int, gpa: int) -> None:
        at = self._resume(vcpu)
        if at is None:
            return
        st, now = at
        if kind == MmioType.READ and st.read_waits:
            st.read_waits = False
            return
        held = st.held
        same = held and held.type == Type.MATCH and held.addr >> 12 == gpa >> 12
        if held and same and not candidate(held):
            st.held = None  # MATCHED says it
        self._flush(st)
        row = Row(st.vm, st.id, int(Type.MMIO), int(Site.MMIO), st.flags)
        row.addr, row.gen, row.aux = gpa, vcpu.cache.gen, now & 0xFFFFFFFF
        row.kind, row.len = kind, size
        row.flags |= self._compare(vcpu, now, vcpu.cache.gen) | self._compare_fill(vcpu, st)
        row.flags |= WRITE * (kind == MmioType.WRITE) | MATCHED * st.matched
        self._look_up(row, vcpu, st, now, gpa >> 12)
        st.held = row
        st.read_waits = kind == MmioType.UNSATISFIED_READ

    def userspace_exit(self, vcpu: Vcpu, reason: int) -> None:
        at = self._resume(vcpu)
        if at is None or at[0].held is None:
            return
        if at[0].held.type == Type.MMIO and reason == EXIT_MMIO:
            at[0].held.flags |= TO_USERSPACE
            at[0].held.value = reason
        self._flush(at[0])

    def handle_mmio_page_fault(self, vcpu: Vcpu, gfn: int) -> None:
        if at := self._resume(vcpu):
            at[0].refill, at[0].refill_flags = int(Site.MMIO_SPTE), at[0].flags

    def mark_mmio_spte(self, vcpu: Vcpu, gfn: int, old: int, new: int) -> None:
        if at := self._resume(vcpu):
            st = at[0]
            kept = old & ~0x000FFFFFFFFFF000
            row = self._begin(st, Type.SPTE, Site.MARK_MMIO_SPTE, addr=gfn << 12, value=new)
            row.kind, row.gen, row.aux = int(SpteChange.MARKED), kept, gfn << 3 & 0x3FFFFFFF
            row.flags |= PRESENT * bool(old & 1 << 11 and not old >> 63 and old != new)
            self._send(row)
            if not self.functions:
                st.refill, st.refill_flags = int(Site.MARK_MMIO_SPTE), st.flags

    def check_mmio_spte(self, vcpu: Vcpu, spte: int, now: int, then: int) -> None:
        if at := self._resume(vcpu):
            st = at[0]
            row = self._begin(st, Type.SPTE, Site.CHECK_MMIO_SPTE, value=spte)
            row.kind = int(SpteChange.VALID if now == then else SpteChange.STALE)
            row.addr = st.fault[0] & ~0xFFF if st.fault and st.flags & DIRECT else 0
            row.gen = now << 32 | then
            self._send(row)

    # faults.bpf.c

    def fault_entry(self, vcpu: Vcpu, addr: int, error: int) -> None:
        if not self.functions:
            return
        at = self._arrive(vcpu, Site.PAGE_FAULT)
        if at is None:
            return
        st, now = at
        if st.fault:
            self._count(LossCause.EXIT, Type.FAULT)
        if error & PFERR_RSVD:
            self._sample(vcpu, st, now, int(Site.RSVD))
        flags = st.flags
        st.matched = False
        if error & PFERR_RSVD:
            flags |= self._test_rsvd(vcpu, st, now, addr)
        st.fault = addr, error, flags

    def _test_rsvd(self, vcpu: Vcpu, st: VcpuState, now: int, addr: int) -> int:
        cache = vcpu.cache
        gen = self._compare(vcpu, now, cache.gen)
        if vcpu.mmu_is_nested or not gen & (IS_AS0 | IS_CURRENT):
            return 0
        if st.flags & DIRECT:
            if not cache.gfn or cache.gfn != addr >> 12:
                return 0
        elif not cache.gva or cache.gva != addr & ~0xFFF:
            return 0
        row = self._begin(st, Type.MATCH, Site.RSVD, value=cache.gva, gen=cache.gen)
        row.addr, row.aux = cache.gfn << 12 | addr & 0xFFF, now & 0xFFFFFFFF
        row.flags |= gen | self._compare_fill(vcpu, st) | BY_GPA * bool(st.flags & DIRECT)
        self._look_up(row, vcpu, st, now, cache.gfn)
        if candidate(row):
            self._send(row)
        else:  # FAULT says BELIEVED, and MMIO MATCHED
            st.seq -= 1
        st.matched = True
        return BELIEVED

    def fault_exit(self, vcpu: Vcpu, ret: int) -> None:
        if not self.functions or self._skipped(Type.FAULT):
            return
        at = self._resume(vcpu)
        if at is None or at[0].fault is None:
            return
        st = at[0]
        (addr, error, flags), st.fault = at[0].fault, None
        if ret:
            self._flush(st)
        row = self._begin(st, Type.FAULT, Site.PAGE_FAULT, addr=addr, value=error, aux=ret)
        row.flags = flags | WRITE * bool(error & 2)
        row.gen = 500
        row.kind = int(FaultResult.RESUMED if ret else FaultResult.USERSPACE)
        self._send(row)

    def page_fault(self, vcpu: Vcpu, addr: int, error: int) -> None:
        if not self.functions and (at := self._arrive(vcpu, Site.PAGE_FAULT_TP)):
            site = Site.PAGE_FAULT_TP
            self._send(self._begin(at[0], Type.FAULT, site, addr=addr, value=error))

    def faultin_entry(self, vcpu: Vcpu, gfn: int, slot: Slot | None) -> None:
        if self.functions and (at := self._resume(vcpu)):
            if at[0].faultin:
                self._count(LossCause.EXIT, Type.FAULTIN)
            at[0].faultin = (slot,)

    def faultin_exit(self, vcpu: Vcpu, gfn: int, pfn: int, ret: int) -> None:
        if not self.functions or self._skipped(Type.FAULTIN):
            return
        at = self._resume(vcpu)
        if at is None or at[0].faultin is None:
            return
        (slot,), at[0].faultin = at[0].faultin, None
        self._send(self._faultin(at[0], Site.FAULTIN, gfn, slot, pfn, ret))

    def _faultin(
        self, st: VcpuState, site: Site, gfn: int, slot: Slot | None, pfn: int, ret: int
    ) -> Row:
        row = self._begin(st, Type.FAULTIN, site, addr=gfn << 12, aux=ret)
        row.flags |= slot_flags(slot)
        if slot:
            row.slot, row.value, row.gen = slot.id, slot.base << 12, slot.pages
        error = FaultinResult.ERROR if ret or pfn & PFN_ERROR else FaultinResult.KEPT
        row.kind = int(FaultinResult.NOSLOT if pfn & PFN_NOSLOT else error)
        return row

    def spte_requested(self, vcpu: Vcpu, gfn: int, slot: Slot | None, pfn: int) -> None:
        if not self.functions and (at := self._resume(vcpu)):
            st, now = at
            row = self._faultin(st, Site.SPTE_REQUESTED, gfn, slot, pfn, 0)
            if slot is None:
                row.flags = st.flags
                self._look_up(row, vcpu, st, now, gfn)
            self._send(row)

    def noslot_entry(self, vcpu: Vcpu, gfn: int) -> None:
        if self.functions and (at := self._resume(vcpu)):
            if at[0].noslot is not None:
                self._count(LossCause.EXIT, Type.FILL)
            at[0].noslot = gfn

    def noslot_exit(self, vcpu: Vcpu, ret: int) -> None:
        if not self.functions or self._skipped(Type.FILL):
            return
        at = self._resume(vcpu)
        if at is None or at[0].noslot is None:
            return
        st, now = at
        gfn, st.noslot = st.noslot, None
        if vcpu.cache.gfn != gfn:
            return
        row = self._begin(st, Type.FILL, Site.NOSLOT)
        st.filled_in = None if self._updating(vcpu, now) else vcpu.as_id
        self._in_cache(row, vcpu, st, now)
        self._remember(vcpu, st, now)
        self._send(row)

    # memslots.bpf.c

    def _memslot(
        self, vm: Vm, number: int, as_id: int, slot: Slot, kind: MemslotChange, site: Site
    ) -> None:
        row = Row(number, NO_VCPU, int(Type.MEMSLOT), int(site), slot_flags(slot))
        row.addr, row.value, row.gen = slot.base << 12, slot.pages, vm.gens[as_id]
        row.aux = 2 * slot.readonly | slot.logged | slot.invalid << 16
        row.slot, row.kind, row.len = slot.id, int(kind), as_id
        self._send(row)

    def memslots_updated(self, vm: Vm, gen: int) -> None:
        if not self.functions or not self._wanted(vm) or (number := self._number(vm)) is None:
            return
        n = vm.kind.address_spaces
        row = Row(number, NO_VCPU, int(Type.GENERATION), int(Site.MEMSLOTS_UPDATED))
        row.value, row.gen, row.len = gen - n, gen, gen & (n - 1)
        self._send(row)

    def commit_memslot(
        self, vm: Vm, as_id: int, old: Slot | None, new: Slot | None, change: MemslotChange
    ) -> None:
        if not self.functions or not self._wanted(vm) or (number := self._number(vm)) is None:
            return
        site = Site.COMMIT_MEMSLOT
        if old and change in (MemslotChange.DELETED, MemslotChange.MOVED_FROM):
            self._memslot(vm, number, as_id, old, change, site)
        if new:
            moved = change == MemslotChange.MOVED_FROM
            what = MemslotChange.MOVED_TO if moved else change
            self._memslot(vm, number, as_id, new, what, site)

    def vcpu_destroy(self, vcpu: Vcpu) -> None:
        st = self.vcpus.pop(vcpu, None)
        if st:
            self._flush(st)
            site = Site.VCPU_DESTROY if self.functions else Site.FIRST_SIGHT
            self._lifecycle(st, LifecycleChange.VCPU_GONE, int(site))

    def vm_destroy(self, vm: Vm) -> None:
        if not self.functions or vm.kvm not in self.vms or vm.kvm in self.gone:
            return
        self.gone.add(vm.kvm)
        kind = int(LifecycleChange.VM_GONE)
        row = Row(self.vms[vm.kvm], NO_VCPU, int(Type.LIFECYCLE), int(Site.VM_DESTROY), kind=kind)
        self._send(row)

    # What the drain gives.

    def finish(self) -> NDArray[Any]:
        """Return all rows; MMIO records that still wait for a userspace exit are never sent."""
        out = np.zeros(len(self.rows), EVENT)
        for name in EVENT.names or ():
            out[name] = [getattr(row, name) for row in self.rows]
        return out
