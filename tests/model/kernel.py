# SPDX-License-Identifier: MIT
"""A vCPU of KVM as far as its MMIO cache goes: faults, the emulator, L1, L2 and SMM.

Plain and slow on purpose: it is what rules and detector are measured against, so it must be
possible to read it beside KVM's source.  Where KVM has a tracepoint or a function that probes
attach to, the model calls `Tracer`; what really happened it writes to `Truth`.

One vCPU runs at a time, from entry to exit.  Guests map L1's memory at fixed offsets, so that
mixing up gva, L2's gpa and gpa shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvmprobe.probes.schema import SLOT_APIC
from tests.model.memslots import IN_PROGRESS, SPTE_GENERATION, Slot, Vm
from tests.model.terms import (
    EMPTY_SPTE,
    EXIT_MMIO,
    INTERNAL,
    L1_GVA,
    L2_GPA,
    L2_GVA,
    PFERR_PRESENT,
    PFERR_RSVD,
    PFERR_WRITE,
    PLAINLY,
    Cache,
    Fate,
    How,
    Result,
    Ret,
    Spte,
)
from tests.model.truth import APIC_GFN, PFN_ERROR, PFN_NOSLOT, What


class Vcpu:
    """struct kvm_vcpu and the guest that runs on it."""

    def __init__(self, vm: Vm, number: int) -> None:
        """Begin in L1, outside SMM, with an empty cache."""
        self.vm, self.id, self.tid = vm, number, vm.kvm * 1000 + number
        self.kind = vm.kind
        self.cache = Cache()
        self.l2 = self.nested = self.smm = self.left_l2 = False
        self.exits = self.insns = 0
        #: The guest's own page tables where they aren't the usual offset: gva page -> gfn, writable
        self.tables: dict[int, tuple[int, bool]] = {}
        vm.vcpus.append(self)

    @property
    def as_id(self) -> int:
        """The vCPU's address space."""
        return int(self.smm)

    @property
    def mmu_is_nested(self) -> bool:
        """Whether L2 runs on page tables that L1 made (nested EPT, NPT)."""
        return self.l2 and self.nested

    @property
    def direct(self) -> bool:
        """Whether faults come with a gpa of L1."""
        return self.kind.tdp and not self.mmu_is_nested

    @property
    def generation(self) -> int:
        """The generation that this kernel holds the cache against."""
        return self.vm.gens[0 if self.kind.as0_generation else self.as_id]

    def find(self, gfn: int) -> Slot | None:
        """The memslot of a gfn in the vCPU's address space."""
        return self.vm.find(self.as_id, gfn)

    # The guest's transitions.  Each ends in the host, before the next entry.

    def enter(self) -> None:
        """vcpu_enter_guest(): SRCU is not held."""
        since = self._mark_time()
        self.vm.preempt()
        self._sample(self.vm.trace.entry)
        self.vm.preempt()
        self._doubt_if_changed(*since)
        self.exits += 1
        self.vm.srcu_held = True

    def _sample(self, look: Callable[[Vcpu], None]) -> None:
        """Let probes look at the cache; what is true before and after is what they may see."""
        self.vm.truth.sample(self)
        look(self)
        self.vm.truth.sample(self)

    def _mark_time(self) -> tuple[int, bool, Cache, tuple[int, int]]:
        return self.vm.steps, self.vm.changing, self.cache, self.vm.truth.mark()

    def _doubt_if_changed(
        self, steps: int, changing: bool, entry: Cache, mark: tuple[int, int]
    ) -> None:
        if changing or self.vm.steps != steps:
            self.vm.truth.doubt(self, mark, rewritten=self.cache != entry)

    def leave(self) -> None:
        """Exit handling is over, or goes to user space."""
        self.vm.srcu_held = False
        self.vm.preempt()

    def enter_l2(self, nested: bool) -> None:
        """VMRUN or VMLAUNCH; `nested`: L1 gives L2 page tables of its own making."""
        self.enter()
        self.l2, self.nested = True, nested and self.kind.tdp
        self.clear_gva()
        self.leave()

    def leave_l2(self) -> None:
        """An exit of L2 that L1 asked for."""
        self.enter()
        self.l2 = False
        self.clear_gva()
        self.leave()

    def enter_smm(self) -> None:
        """An SMI: leaves L2 first."""
        self.enter()
        self.left_l2, self.l2, self.smm = self.l2, False, True
        self.clear_gva()
        self.leave()

    def leave_smm(self) -> None:
        """RSM: back to L2 if the SMI came there."""
        self.enter()
        self.l2, self.smm = self.left_l2, False
        self.clear_gva()
        self.leave()

    def clear_gva(self) -> None:
        """vcpu_clear_mmio_info(): all that ever clears anything."""
        self.cache = replace(self.cache, gva=0)

    def idle(self) -> None:
        """An exit that has nothing to do with memory."""
        self.enter()
        self.leave()

    # Accesses.

    def gva(self, gfn: int) -> int:
        """Where the guest that runs now sees a page of L1's memory."""
        return (gfn << 12) + (0 if self.smm else L2_GVA if self.l2 else L1_GVA)

    def walk(self, gva: int) -> tuple[int, bool]:
        """Walk the guest's page tables (and L1's for L2): gfn, and whether it may be written."""
        usual = (gva - self.gva(0)) >> 12, True
        return self.tables.get(gva >> 12, usual)

    def access(self, how: How, gva: int, write: bool, fate: Fate = PLAINLY) -> Result:
        """One access of the guest, from entry to its end."""
        since = self._mark_time()
        self.enter()
        if self.kind.keeps_entries and self.cache.gfn and not self.generation & IN_PROGRESS:
            self.cache = replace(self.cache, gen=self.generation)
        if how is How.PLAIN:
            result = self._plain(gva, write, fate)
        elif how is How.STD:
            result = self._std(gva, write)
        else:
            result = self._emulate(gva, None, write, fate)
            self._finish(result, gva, write)
        self.leave()
        self._doubt_if_changed(*since)
        return result

    def _root(self) -> dict[int, Spte]:
        owner = -1 if self.direct else self.id
        key = (self.as_id, self.l2, self.mmu_is_nested, owner)
        return self.vm.roots.setdefault(key, {})

    def _plain(self, gva: int, write: bool, fate: Fate) -> Result:
        for tries in range(10):
            gfn, writable = self.walk(gva)
            if write and not writable:
                return Result.FAILED  # the guest's own page fault
            offset = gva & 0xFFF
            if self.direct:
                addr = gfn << 12 | offset
            elif self.mmu_is_nested:
                addr = L2_GPA + (gfn << 12 | offset)
            else:
                addr = gva
            spte = self._root().get(addr >> 12)
            if spte and not spte.mmio and (spte.writable or not write):
                return Result.MEMORY
            result = self._page_fault(addr, gva, gfn, spte, write, fate)
            if result is not None:
                return result
            self.leave()
            if tries == 2:
                self.vm.settle()  # a guest that waits for a memslot change
            fate = replace(fate, stale=False, invalidated=False)
            self.enter()
        raise AssertionError(f"the guest gets nowhere at {gva:#x}")

    def _page_fault(
        self, addr: int, gva: int, gfn: int, spte: Spte | None, write: bool, fate: Fate
    ) -> Result | None:
        """kvm_mmu_page_fault(): None is "back into the guest", to try again."""
        error = PFERR_WRITE * write
        if spte:
            error |= PFERR_PRESENT | PFERR_RSVD * spte.mmio
        rsvd = bool(error & PFERR_RSVD)
        trace, truth = self.vm.trace, self.vm.truth
        if not (rsvd and self.kind.intel):
            trace.page_fault(self, addr, error)
        ret, believed, announced = Ret.INVALID, False, None
        if rsvd:
            if self._matches(addr):
                announced = truth.to_misread(self, self.cache.gfn)
            self._sample(lambda vcpu: trace.fault_entry(vcpu, addr, error))
        else:
            trace.fault_entry(self, addr, error)
        self.vm.preempt()
        if rsvd:
            ret, believed = self._handle_mmio_page_fault(addr, gfn, spte)
        if announced and not believed:
            # Memslots changed between the fault's entry and KVM's question.
            truth.note(What.MISREAD, self, self.cache.gfn, announced, clean=False)
        if ret is Ret.INVALID:
            ret = self._do_page_fault(addr, gfn, spte, write, fate)
        if ret is not Ret.EMULATE:
            trace.fault_exit(self, 1)
            return None
        known = gfn << 12 | (gva & 0xFFF) if self.direct else None
        if believed:
            truth.announced(self, self.cache.gfn)
        result = self._emulate(gva, known, write, fate)
        trace.fault_exit(self, 0 if result is Result.USERSPACE else 1)
        self._finish(result, gva, write)
        return result

    def _matches(self, addr: int) -> bool:
        """mmio_info_in_cache()"""
        cache = self.cache
        if self.mmu_is_nested or cache.gen != self.generation:
            return False
        if self.direct:
            return cache.gfn != 0 and cache.gfn == addr >> 12
        return cache.gva != 0 and cache.gva == addr & ~0xFFF

    def _handle_mmio_page_fault(self, addr: int, gfn: int, spte: Spte | None) -> tuple[Ret, bool]:
        """What a reserved-bit fault means: M3, then the SPTE, then F2."""
        if self._matches(addr):
            return Ret.EMULATE, True
        if spte is None or not spte.mmio:
            return Ret.RETRY, False
        gen = self.vm.gens[self.as_id]
        if gen & IN_PROGRESS:
            return Ret.INVALID, False
        now = gen & SPTE_GENERATION
        self.vm.trace.check_mmio_spte(self, spte.value, now, spte.gen)
        if spte.gen != now:
            return Ret.INVALID, False
        self.vm.trace.handle_mmio_page_fault(self, spte.gfn)
        self.vm.truth.filled(self, spte.gfn, self._fill(addr, spte.gfn))
        return Ret.EMULATE, False

    def _hides(self, slot: Slot) -> bool:
        if slot.id == SLOT_APIC:
            return self.l2
        hides = self.kind.hides_internal if self.l2 else self.kind.hides_from_l1
        return slot.id in INTERNAL and hides

    def _do_page_fault(
        self, addr: int, gfn: int, spte: Spte | None, write: bool, fate: Fate
    ) -> Ret:
        trace, kind = self.vm.trace, self.kind
        slot = found = self.find(gfn)
        trace.faultin_entry(self, gfn, found)
        self.vm.preempt()
        pfn, ret = kind.first_pfn, Ret.CONTINUE
        if slot is not None and (slot.invalid or fate.invalidated):
            ret = Ret.RETRY
        elif slot is not None and slot.id == SLOT_APIC and not self.l2 and not self.vm.apicv:
            ret = Ret.EMULATE
        elif slot is None or self._hides(slot):
            slot, pfn = None, PFN_NOSLOT
        elif write and slot.readonly:
            pfn, ret = PFN_ERROR, Ret.EMULATE  # KVM_PFN_ERR_RO_FAULT
        elif fate.poisoned:
            pfn, ret = PFN_ERROR, Ret.EMULATE
        else:
            pfn = gfn
        trace.faultin_exit(self, gfn, pfn, ret.value)
        if ret is not Ret.RETRY:
            self.vm.truth.resolved(self, gfn, found, pfn)
        if ret is not Ret.CONTINUE:
            return ret
        writable = self.walk(addr)[1] if not (self.direct or self.mmu_is_nested) else True
        if slot is not None:
            trace.spte_requested(self, gfn, slot, pfn)
            ours = Spte(gfn, mmio=False, writable=writable and not slot.readonly)
            self._root()[addr >> 12] = ours
            return Ret.FIXED
        trace.noslot_entry(self, gfn)
        self.vm.truth.filled(self, gfn, self._fill(addr, gfn), fault=True)
        trace.noslot_exit(self, 0 if kind.mmio_caching else Ret.EMULATE.value)
        self.vm.preempt()
        if not kind.mmio_caching:
            return Ret.EMULATE
        if fate.stale:
            self.vm.truth.retried.add((self.vm.kvm, self.id))
            return Ret.RETRY
        trace.spte_requested(self, gfn, None, pfn)
        self._mark(addr, gfn, spte)
        return Ret.EMULATE

    def _mark(self, addr: int, gfn: int, old: Spte | None) -> None:
        """Write an MMIO SPTE; the TDP MMU traces after its store, the shadow MMU before."""
        new = Spte(gfn, mmio=True, gen=self.vm.gens[self.as_id] & SPTE_GENERATION)
        there = old.value if old else EMPTY_SPTE
        if self.kind.tdp and self.direct:
            there = new.value
        elif old and not old.mmio:
            if self.kind.overwrites_spte:
                self.vm.truth.overwrote(self, gfn)
            else:
                there = EMPTY_SPTE  # dropped first
        self._root()[addr >> 12] = new
        self.vm.trace.mark_mmio_spte(self, gfn, there, new.value)

    def _fill(self, addr: int, gfn: int) -> bool:
        """vcpu_cache_mmio_info(): nothing is written while memslots change."""
        if self.generation & IN_PROGRESS:
            return False
        gva = 0 if self.direct or self.mmu_is_nested else addr & ~0xFFF
        self.cache = Cache(gva, gfn, 3, self.generation)
        return True

    # The emulator.

    def _std(self, gva: int, write: bool) -> Result:
        """An instruction whose operand doesn't ask the cache."""
        self._insn()
        slot = self.find(self.walk(gva)[0])
        bad = slot is None or slot.invalid or (write and slot.readonly)
        return Result.FAILED if bad else Result.MEMORY

    def _insn(self) -> None:
        self._sample(self.vm.trace.emulate_insn)
        self.insns += 1
        self.vm.preempt()

    def _emulate(self, gva: int, gpa: int | None, write: bool, fate: Fate) -> Result:
        """x86_emulate_instruction() of a load or store; `gpa`: known from the fault."""
        self._insn()
        truth, trace, cache = self.vm.truth, self.vm.trace, self.cache
        mmio = False
        live = cache.gen == self.generation
        if gpa is None:
            if live and cache.gva and cache.gva == gva & ~0xFFF:  # M2
                gpa, mmio = cache.gfn << 12 | (gva & 0xFFF), True
                truth.believed(self, cache.gfn)
                trace.match(self, gva, gpa, write, False)
            else:
                gpa = self.walk(gva)[0] << 12 | (gva & 0xFFF)
        gfn = gpa >> 12
        if not mmio and gfn == APIC_GFN:
            mmio = True
        elif not mmio and live and cache.gfn and cache.gfn == gfn:  # M1
            mmio = True
            truth.believed(self, gfn)
            trace.match(self, gva, gpa, write, True)
        if not mmio:
            slot = self.find(gfn)
            if slot and not slot.invalid and not (write and slot.readonly) and not fate.poisoned:
                return Result.MEMORY
        self.vm.preempt()
        in_kernel = fate.device or gfn == APIC_GFN
        truth.emulated(self, gfn, mmio, write, in_kernel and not write)
        trace.mmio(self, 2 if write else 1 if in_kernel else 0, 4, gpa)
        return Result.DEVICE if in_kernel else Result.USERSPACE

    def _finish(self, result: Result, gva: int, write: bool) -> None:
        """User space answers what was left to it."""
        if result is not Result.USERSPACE:
            return
        self.vm.srcu_held = False
        self.vm.trace.userspace_exit(self, EXIT_MMIO)
        self.vm.preempt()
        self.vm.srcu_held = True
        if not write:
            self.vm.trace.mmio(self, 1, 4, gva)
