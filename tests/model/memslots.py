# SPDX-License-Identifier: MIT
"""A VM of KVM as far as its memslots go, and the places where probes attach.

A memslot change of another thread may begin or end at `Vm.preempt()`; it can't end while a vCPU
holds SRCU, as synchronize_srcu() waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from kvmprobe.probes.schema import MemslotChange
from tests.model.truth import PFN_ERROR, Truth

if TYPE_CHECKING:
    from tests.model.kernel import Vcpu
    from tests.model.terms import Spte

IN_PROGRESS = 1 << 63  #: KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
SPTE_GENERATION = (1 << 19) - 1  #: MMIO_SPTE_GEN_MASK, 5.15 to 6.18


@dataclass(frozen=True)
class Kind:
    """A kind of kernel and host: each fault on or off.

    The last two are faults that no kernel is known to have: they let rules be tried that never
    convict a real one.
    """

    hides_internal: bool = False  # 3a2936dedd20
    as0_generation: bool = False  # CVE-2026-99082
    overwrites_spte: bool = False  # CVE-2026-23401
    tdp: bool = True
    intel: bool = True  # EPT misconfigurations have no kvm_page_fault tracepoint
    mmio_caching: bool = True
    address_spaces: int = 2
    first_pfn: int = PFN_ERROR  # of struct kvm_page_fault before a lookup; 0 in older kernels
    hides_from_l1: bool = False
    keeps_entries: bool = False  # a memslot change doesn't end cache entries


@dataclass(frozen=True)
class Slot:
    """A memslot; `base` and `pages` count pages."""

    id: int
    base: int
    pages: int
    readonly: bool = False
    invalid: bool = False
    logged: bool = False


class Tracer(Protocol):
    """The places where probes attach, in the order in which KVM passes them."""

    def entry(self, vcpu: Vcpu) -> None: ...
    def emulate_insn(self, vcpu: Vcpu) -> None: ...
    def fault_entry(self, vcpu: Vcpu, addr: int, error: int) -> None: ...
    def fault_exit(self, vcpu: Vcpu, ret: int) -> None: ...
    def page_fault(self, vcpu: Vcpu, addr: int, error: int) -> None: ...
    def faultin_entry(self, vcpu: Vcpu, gfn: int, slot: Slot | None) -> None: ...
    def faultin_exit(self, vcpu: Vcpu, gfn: int, pfn: int, ret: int) -> None: ...
    def spte_requested(self, vcpu: Vcpu, gfn: int, slot: Slot | None, pfn: int) -> None: ...
    def noslot_entry(self, vcpu: Vcpu, gfn: int) -> None: ...
    def noslot_exit(self, vcpu: Vcpu, ret: int) -> None: ...
    def handle_mmio_page_fault(self, vcpu: Vcpu, gfn: int) -> None: ...
    def check_mmio_spte(self, vcpu: Vcpu, spte: int, now: int, then: int) -> None: ...
    def mark_mmio_spte(self, vcpu: Vcpu, gfn: int, old: int, new: int) -> None: ...
    def match(self, vcpu: Vcpu, gva: int, gpa: int, write: bool, by_gpa: bool) -> None: ...
    def mmio(self, vcpu: Vcpu, kind: int, size: int, gpa: int) -> None: ...
    def userspace_exit(self, vcpu: Vcpu, reason: int) -> None: ...
    def memslots_updated(self, vm: Vm, gen: int) -> None: ...
    def commit_memslot(
        self, vm: Vm, as_id: int, old: Slot | None, new: Slot | None, change: MemslotChange
    ) -> None: ...
    def vcpu_destroy(self, vcpu: Vcpu) -> None: ...
    def vm_destroy(self, vm: Vm) -> None: ...


@dataclass(frozen=True)
class Change:
    """What the VMM asks for: a slot's old and new form in one address space."""

    as_id: int
    old: Slot | None
    new: Slot | None

    @property
    def what(self) -> MemslotChange:
        """enum kvm_mr_change."""
        if self.old is None:
            return MemslotChange.CREATED
        if self.new is None:
            return MemslotChange.DELETED
        moved = self.old.base != self.new.base
        return MemslotChange.MOVED_FROM if moved else MemslotChange.REFLAGGED


@dataclass(eq=False)
class Vm:
    """struct kvm.  `age`: by how many changes each address space's generation is ahead."""

    kvm: int
    kind: Kind
    trace: Tracer
    truth: Truth
    age: tuple[int, int] = (0, 0)
    apicv: bool = True
    vcpus: list[Vcpu] = field(default_factory=list)
    srcu_held: bool = False
    #: Counts every step of a memslot change: whatever spans one is not beyond doubt.
    steps: int = 0
    #: After so many calls of preempt() the change goes on, by `race_steps`; -1: it doesn't.
    race: int = -1
    race_steps: int = 0

    def __post_init__(self) -> None:
        """Begin as kvm_create_vm() does: generations start at the index of their space."""
        n = self.kind.address_spaces
        self.slots: list[list[Slot]] = [[] for _ in range(n)]
        self._found: dict[tuple[int, int], Slot | None] = {}
        self.gens = [i + n * self.age[i] for i in range(n)]
        self.roots: dict[tuple[int, bool, bool, int], dict[int, Spte]] = {}
        self._change: Iterator[bool] = iter(())
        self._grace = False

    @property
    def changing(self) -> bool:
        """Whether a grace period runs in any address space."""
        return any(gen & IN_PROGRESS for gen in self.gens)

    def find(self, as_id: int, gfn: int) -> Slot | None:
        """Look a gfn up, as search_memslots() does."""
        key = as_id, gfn
        if key not in self._found:
            there = (s for s in self.slots[as_id] if s.base <= gfn < s.base + s.pages)
            self._found[key] = next(there, None)
        return self._found[key]

    def begin(self, *changes: Change) -> None:
        """Let another thread change memslots; it goes on at step(), settle() or preempt()."""
        self.settle()
        self._change = self._run(changes)

    def step(self) -> bool:
        """Let the other thread go on to the next point where it can be seen; False: it is done."""
        self.steps += 1
        self._grace = next(self._change, None) is True
        return self._grace

    def settle(self) -> None:
        """Let the other thread finish."""
        for _ in self._change:
            self.steps += 1
        self._grace = False

    def preempt(self) -> None:
        """A place in a vCPU's way where the other thread may be faster."""
        if self.race > 0:
            self.race -= 1
        if self.race == 0 and not (self._grace and self.srcu_held):
            self.race_steps -= 1
            if self.race_steps <= 0:
                self.race = -1
            self.step()

    def _run(self, changes: tuple[Change, ...]) -> Iterator[bool]:
        for change in changes:
            old = change.old
            if old is not None and change.what != MemslotChange.REFLAGGED:
                yield from self._activate(change.as_id, old, replace(old, invalid=True))
                self.roots.clear()  # kvm_arch_flush_shadow_memslot()
                old = replace(old, invalid=True)
            yield from self._activate(change.as_id, old, change.new)
            self.trace.commit_memslot(self, change.as_id, change.old, change.new, change.what)

    def _activate(self, as_id: int, old: Slot | None, new: Slot | None) -> Iterator[bool]:
        """kvm_swap_active_memslots(): True while the grace period runs."""
        slots = [s for s in self.slots[as_id] if s != old]
        self.slots[as_id] = slots if new is None else [*slots, new]
        self._found.clear()
        gen = self.gens[as_id]
        self.gens[as_id] = gen | IN_PROGRESS
        yield True
        gen += self.kind.address_spaces
        self.trace.memslots_updated(self, gen)
        if not gen & SPTE_GENERATION & ~(self.kind.address_spaces - 1):
            self.roots.clear()  # kvm_mmu_invalidate_mmio_sptes(): the SPTEs' generation wraps
        self.gens[as_id] = gen
        yield False
