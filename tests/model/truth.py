# SPDX-License-Identifier: MIT
"""What really happened in a run of the model, told by the kernel's own state and not by events."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from kvmprobe.probes.schema import SLOT_APIC, SLOT_IDENTITY, SLOT_TSS

if TYPE_CHECKING:
    from tests.model.kernel import Vcpu
    from tests.model.memslots import Slot

HIDDEN_SLOTS = (SLOT_TSS, SLOT_IDENTITY)
APIC_GFN = 0xFEE00
PFN_NOSLOT = 1 << 63
PFN_ERROR = 0x7FF << 52


class What(Enum):
    """What can happen; `page` below is the page of the happening's gfn."""

    HIDDEN = "a fault on memory that KVM made for itself ended as MMIO"
    KEPT = "a fault of L2 on memory that KVM made for itself found it"
    ARMED = "the vCPU ran with a live cache entry for a page behind which a memslot stands"
    MISREAD = "an access to a page behind which a memslot stands was taken for MMIO"
    HARMLESS = "an entry of another address space or generation was believed, rightly"
    MIXED_UP = "an entry of another address space or generation was believed, and memory misread"
    APIC = "an access of L2 to KVM's APIC access page was emulated"
    UNEXPLAINED = "an access to a memslot was emulated as MMIO, and the cache had no part in it"
    OVERWROTE = "an MMIO SPTE was written over a present one"
    FILL_OF_AS0 = "in SMM, the cache was filled with address space 0's generation"
    FILL_OF_AS1 = "in SMM, the cache was filled with address space 1's generation"


@dataclass(frozen=True)
class Happening:
    """Something that happened; `clean`: no memslot changed around it, so nothing is open."""

    what: What
    vm: int
    vcpu: int
    gfn: int
    slot: int
    l2: bool
    #: SMM could be the cause: the vCPU was in it since the recording began.
    smm_seen: bool
    clean: bool = True


@dataclass
class Truth:
    """Collects happenings while `on`: while the recording runs."""

    on: bool = True
    happenings: list[Happening] = field(default_factory=list)
    smm_seen: set[tuple[int, int]] = field(default_factory=set)
    #: vCPUs that were looked at since the recording began: what they do can be seen in full.
    met: set[tuple[int, int]] = field(default_factory=set)
    #: Of each vCPU's cache entry: the address space it was filled in, whether that could be seen,
    #: and whether the page was memory of KVM's own then.
    filled_in: dict[tuple[int, int], int] = field(default_factory=dict)
    fill_seen: set[tuple[int, int]] = field(default_factory=set)
    fills: int = 0
    hidden_then: dict[tuple[int, int], bool] = field(default_factory=dict)
    #: vCPUs that lost mmu_lock after a fill: the fault was retried without an emulation.
    retried: set[tuple[int, int]] = field(default_factory=set)
    _announced: tuple[int, int, int] | None = None

    def note(self, what: What, vcpu: Vcpu, gfn: int, slot: Slot | None, clean: bool = True) -> None:
        """Add a happening."""
        if self.on:
            who = vcpu.vm.kvm, vcpu.id
            number = slot.id if slot else -1
            seen = who in self.smm_seen
            self.happenings.append(Happening(what, *who, gfn, number, vcpu.l2, seen, clean))

    def mark(self) -> tuple[int, int]:
        """Return how many happenings and fills there were so far."""
        return len(self.happenings), self.fills

    def doubt(self, vcpu: Vcpu, mark: tuple[int, int], *, rewritten: bool) -> None:
        """Memslots changed around what the vCPU did since `mark`.

        KVM may skip a fill then: one that left the entry as it was can't be told from none.
        """
        first, fills = mark
        self.happenings[first:] = [replace(h, clean=False) for h in self.happenings[first:]]
        if self.fills != fills and not rewritten:
            self.fill_seen.discard((vcpu.vm.kvm, vcpu.id))

    def sample(self, vcpu: Vcpu) -> None:
        """The cache can be looked at here: kvm_entry, kvm_emulate_insn, a reserved-bit fault.

        Or wherever a probe first meets the vCPU.
        """
        if self.on:
            self.met.add((vcpu.vm.kvm, vcpu.id))
        if vcpu.smm and self.on:
            self.smm_seen.add((vcpu.vm.kvm, vcpu.id))
        slot, cache = memory(vcpu, vcpu.cache.gfn), vcpu.cache
        if slot is None or vcpu.l2 or self._other_cause(vcpu, slot):
            return
        if cache.gen == vcpu.generation:
            self.note(What.ARMED, vcpu, cache.gfn, slot, clean=self._explained(vcpu, slot))
        elif vcpu.smm and cache.gen == vcpu.vm.gens[0]:
            # Live on a kernel with the SMM fault and not on this one: no single look can tell.
            self.note(What.ARMED, vcpu, cache.gfn, slot, clean=False)

    def _came_later(self, vcpu: Vcpu, slot: Slot) -> bool:
        """A slot of KVM's own came after the fill: what follows isn't the internal-slot fault."""
        return slot.id in HIDDEN_SLOTS and not self.hidden_then.get((vcpu.vm.kvm, vcpu.id))

    def _other_cause(self, vcpu: Vcpu, slot: Slot) -> bool:
        """The entry isn't the internal-slot fault's, and a recording can tell: it saw the fill."""
        return self._came_later(vcpu, slot) and (vcpu.vm.kvm, vcpu.id) in self.fill_seen

    def _explained(self, vcpu: Vcpu, slot: Slot) -> bool:
        """Whether a recording can tell that SMM has no part in a vCPU's entry."""
        who = vcpu.vm.kvm, vcpu.id
        seen = who not in self.smm_seen or who in self.fill_seen
        return seen and not self._came_later(vcpu, slot)

    def resolved(self, vcpu: Vcpu, gfn: int, slot: Slot | None, pfn: int) -> None:
        """A fault found `slot`, and was then given `pfn`."""
        if slot is None or slot.id not in HIDDEN_SLOTS or slot.invalid or not gfn:
            return
        if pfn == PFN_NOSLOT:
            self.note(What.HIDDEN, vcpu, gfn, slot)
        elif vcpu.l2 and not pfn & PFN_ERROR:
            self.note(What.KEPT, vcpu, gfn, slot)

    def filled(self, vcpu: Vcpu, gfn: int, written: bool, fault: bool = False) -> None:
        """The cache was to be filled; `fault`: by a fault that resolved() has told of."""
        if not written:
            return
        self.fills += 1
        self.filled_in[vcpu.vm.kvm, vcpu.id] = vcpu.as_id
        if (vcpu.vm.kvm, vcpu.id) in self.met:
            self.fill_seen.add((vcpu.vm.kvm, vcpu.id))
        slot = memory(vcpu, gfn)
        hidden = slot is not None and slot.id in HIDDEN_SLOTS
        self.hidden_then[vcpu.vm.kvm, vcpu.id] = hidden
        if hidden and not fault:
            self.note(What.HIDDEN, vcpu, gfn, slot)
        if vcpu.smm:
            as0 = vcpu.cache.gen == vcpu.vm.gens[0]
            self.note(What.FILL_OF_AS0 if as0 else What.FILL_OF_AS1, vcpu, gfn, slot)

    def announced(self, vcpu: Vcpu, gfn: int) -> None:
        """The cache was believed at a reserved-bit fault: before the emulator asks it again."""
        self._announced = None
        self.believed(vcpu, gfn)
        if self.on:  # else the recording may begin before the emulator asks
            self._announced = vcpu.vm.kvm, vcpu.id, gfn

    def believed(self, vcpu: Vcpu, gfn: int) -> None:
        """The cache was believed for an operand on page `gfn`."""
        who = vcpu.vm.kvm, vcpu.id
        announced, self._announced = self._announced, None
        if announced == (*who, gfn):
            return
        slot = self.to_misread(vcpu, gfn)
        if slot is not None:
            self.note(What.MISREAD, vcpu, gfn, slot, clean=self._explained(vcpu, slot))
        if not vcpu.smm and self.filled_in.get(who, 0) == 0:
            return
        stale = vcpu.cache.gen != vcpu.vm.gens[vcpu.as_id]
        if stale or self.filled_in.get(who) != vcpu.as_id:
            what = What.MIXED_UP if memory(vcpu, gfn) else What.HARMLESS
            self.note(what, vcpu, gfn, memory(vcpu, gfn), clean=stale or who in self.fill_seen)

    def to_misread(self, vcpu: Vcpu, gfn: int) -> Slot | None:
        """Return the slot that would be misread if the cache were believed now."""
        slot = memory(vcpu, gfn)
        return None if slot is None or self._other_cause(vcpu, slot) else slot

    def emulated(self, vcpu: Vcpu, gfn: int, believed: bool, write: bool, answered: bool) -> None:
        """An operand became MMIO; `answered`: a device in the kernel had the data to read."""
        slot = vcpu.find(gfn)
        if slot is None or slot.invalid:
            return
        if gfn == APIC_GFN:
            if vcpu.l2 and slot.id == SLOT_APIC:
                self.note(What.APIC, vcpu, gfn, slot)
        elif not believed and not answered and not (write and slot.readonly):
            self.note(What.UNEXPLAINED, vcpu, gfn, slot)

    def overwrote(self, vcpu: Vcpu, gfn: int) -> None:
        """An MMIO SPTE was written over a present one."""
        self.note(What.OVERWROTE, vcpu, gfn, None)


def memory(vcpu: Vcpu, gfn: int) -> Slot | None:
    """Return the slot that makes a page memory to the vCPU: valid, and not the APIC page.

    Page 0 isn't counted: the cache can hold it but is never believed for it.
    """
    slot = vcpu.find(gfn)
    return slot if slot and not slot.invalid and gfn not in (0, APIC_GFN) else None
