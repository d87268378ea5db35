# SPDX-License-Identifier: MIT
"""What probes/*.h and *.bpf.c make of what the model does: rows of dtype EVENT.

Each method stands for the program of the same place and says the same in Python.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import (
    EVENT,
    NO_VCPU,
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
from tests.model.kernel import Vcpu
from tests.model.memslots import Slot, Vm
from tests.model.rows import (
    BELIEVED,
    BY_GPA,
    DIRECT,
    FILL_AS_KNOWN,
    GEN_KNOWN,
    IS_AS0,
    IS_CURRENT,
    MATCHED,
    PRESENT,
    TO_USERSPACE,
    WRITE,
    Row,
    VcpuState,
    candidate,
    slot_flags,
)
from tests.model.state import State
from tests.model.terms import EXIT_MMIO, PFERR_RSVD
from tests.model.truth import PFN_ERROR, PFN_NOSLOT

_FIELDS = attrgetter(*(EVENT.names or ()))


class Probes(State):
    """The programs, each where KVM runs it."""

    def entry(self, vcpu: Vcpu) -> None:
        if at := self._arrive(vcpu, Site.ENTRY):
            self._sample(vcpu, *at, int(Site.ENTRY))

    def emulate_insn(self, vcpu: Vcpu) -> None:
        if at := self._arrive(vcpu, Site.EMULATE_INSN):
            self._sample(vcpu, *at, int(Site.EMULATE_INSN))
            at[0].matched = False
            self._send(self._begin(at[0], Type.EMULATE, Site.EMULATE_INSN, addr=0x1000))

    def _hold(self, vcpu: Vcpu, st: VcpuState, now: int, kind: Type, site: Site, gpa: int) -> Row:
        """hold()"""
        row = st.held = Row(st.vm, st.id, int(kind), int(site), st.flags)
        gen = vcpu.cache.gen
        memo = st.memo
        is_hole = memo and memo[0] == (gpa >> 12, st.gen, False) and memo[1] < 0 and not st.smm_seen
        if memo and is_hole:
            gen, now = st.cache.gen, st.gen
            row.addr, row.gen, row.aux = gpa, gen, now & 0xFFFFFFFF
            row.flags |= GEN_KNOWN | (IS_AS0 | IS_CURRENT) * (gen == now)
            row.flags |= FILL_AS_KNOWN * (st.filled_in is not None) | memo[2]
            row.slot = memo[1]
            return row
        row.addr, row.gen, row.aux = gpa, gen, now & 0xFFFFFFFF
        row.flags |= self._compare(vcpu, now, gen) | self._compare_fill(vcpu, st)
        self._look_up(row, vcpu, st, now, gpa >> 12)
        return row

    def match(self, vcpu: Vcpu, gva: int, gpa: int, write: bool, by_gpa: bool) -> None:
        if at := self._resume(vcpu):
            st, now = at
            self._flush(st)
            st.matched = True
            row = self._hold(vcpu, st, now, Type.MATCH, Site.MATCH_MMIO, gpa)
            row.value = gva
            row.flags |= WRITE * write | BY_GPA * by_gpa

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
        row = self._hold(vcpu, st, now, Type.MMIO, Site.MMIO, gpa)
        row.kind, row.len = kind, size
        row.flags |= WRITE * (kind == MmioType.WRITE) | MATCHED * st.matched
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
        known = self._rewritten(vcpu.cache, st.cache) or not self._updating(vcpu, now)
        st.filled_in = vcpu.as_id if known else None
        self._in_cache(row, vcpu, st, now)
        self._remember(vcpu, st, now)
        self._send(row)

    # memslots.bpf.c

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
        return np.array([_FIELDS(row) for row in self.rows], EVENT)
