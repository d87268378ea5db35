# SPDX-License-Identifier: MIT
"""The step tables of real kernels, row by row: the model must give what those kernels gave.

Sources: recorded runs of unmodified Debian kernels (docs/proof.md names them).  X is RAM only in
SMM, Y only outside, Z nowhere at first, W nowhere ever.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from kvmprobe.probes.schema import SLOT_IDENTITY, SLOT_TSS, Flag, Site, Type
from tests.model.check import problems, say
from tests.model.kernel import Vcpu
from tests.model.memslots import Change, Kind, Slot, Vm
from tests.model.probes import Probes
from tests.model.runs import Run
from tests.model.terms import How, Result
from tests.model.truth import Truth, What

PLAIN, STRING, FORCED = How.PLAIN, How.STRING, How.FORCED
MEMORY, MMIO = Result.MEMORY, Result.USERSPACE
LOAD, STORE = False, True

# Each kernel as its source says.
K6_1_192 = Kind(hides_internal=True, as0_generation=False, intel=False, first_pfn=0)
K6_12_107 = Kind(hides_internal=False, as0_generation=True, intel=False)
K6_12_117 = replace(K6_12_107, as0_generation=False)
K6_1_176 = replace(K6_1_192, as0_generation=True)
INTEL_6_1 = replace(K6_1_192, intel=True)
INTEL_6_12 = replace(K6_12_107, intel=True)


class Rig:
    """One VM with one vCPU, recorded."""

    def __init__(self, kind: Kind, *slots: tuple[int, Slot], probes: Probes | None = None) -> None:
        self.probes = probes or Probes(random=Random(0))
        self.run = Run(kind, self.probes, Truth(on=False))
        self.vm = Vm(1, kind, self.probes, self.run.truth)
        self.run.vms.append(self.vm)
        self.change(*(Change(as_id, None, slot) for as_id, slot in slots))
        self.vcpu = Vcpu(self.vm, 0)

    def change(self, *changes: Change) -> None:
        self.vm.begin(*changes)
        self.vm.settle()

    def toggle(self, as_id: int) -> None:
        """Toggle dirty logging of the first slot."""
        slot = self.vm.slots[as_id][0]
        self.change(Change(as_id, slot, replace(slot, logged=not slot.logged)))

    def do(self, how: How, gpa: int, write: bool) -> Result:
        return self.vcpu.access(how, self.vcpu.gva(gpa >> 12) + (gpa & 0xFFF), write)

    def check(self) -> None:
        """The detector says of the run what happened in it."""
        self.vcpu.idle()
        self.run.rows = self.probes.finish()
        assert problems(self.run, say(self.run, self.run.rows), whole=True) == []

    def happened(self, what: What) -> int:
        return sum(h.what is what for h in self.run.truth.happenings)


OWN = 0xFEFFD000

#: (step, level, how, write) -> 6.1.192 without nested paging, 6.1.192 with, 6.12.107 with either;
#: None: not run there.
AMD = (
    ("L1 plain load", "L1", PLAIN, LOAD, MEMORY, MEMORY, MEMORY),
    ("L1 OUTSL before L2", "L1", STRING, LOAD, MEMORY, MEMORY, MEMORY),
    ("L2 load", "L2", PLAIN, LOAD, MMIO, MMIO, MEMORY),
    ("L2 store", "L2", PLAIN, STORE, MMIO, MMIO, MEMORY),
    ("L2 load again", "L2", PLAIN, LOAD, MMIO, MMIO, MEMORY),
    ("L1 plain load after L2", "L1", PLAIN, LOAD, MEMORY, MEMORY, MEMORY),
    ("L1 OUTSL after L2", "L1", STRING, LOAD, MMIO, MMIO, MEMORY),
    ("L1 INSL after L2", "L1", STRING, STORE, MMIO, MMIO, MEMORY),
    ("L1 forced-emulation load", "L1", FORCED, LOAD, MMIO, MMIO, None),
)
AMD_COLUMNS = ((K6_1_192, False, 4), (K6_1_192, True, 5), (K6_12_107, False, 6),
               (K6_12_107, True, 6))  # fmt: skip


def own_slot(
    number: int = SLOT_TSS, gpa: int = OWN, pages: int = 3
) -> tuple[tuple[int, Slot], ...]:
    return tuple((as_id, Slot(number, gpa >> 12, pages)) for as_id in (0, 1))


def level(rig: Rig, wanted: str, nested: bool) -> None:
    if wanted == "L2" and not rig.vcpu.l2:
        rig.vcpu.enter_l2(nested)
    elif wanted == "L1" and rig.vcpu.l2:
        rig.vcpu.leave_l2()


@pytest.mark.parametrize("mmio_caching", [True, False])
@pytest.mark.parametrize(("kind", "nested", "column"), AMD_COLUMNS)
def test_amd_table(kind: Kind, nested: bool, column: int, mmio_caching: bool) -> None:
    rig = Rig(replace(kind, mmio_caching=mmio_caching), (0, Slot(0, 0, 512)), *own_slot())
    for row in AMD:
        if row[column] is not None:
            level(rig, row[1], nested)
            assert rig.do(row[2], OWN, row[3]) is row[column], row[0]
    marked = [r for r in rig.probes.rows if r.site == Site.MARK_MMIO_SPTE]
    assert bool(marked) == (kind.hides_internal and mmio_caching)
    rig.check()


@pytest.mark.parametrize(("kind", "nested", "column"), AMD_COLUMNS)
def test_amd_dirty_logging_toggled_between_l2_and_l1(kind: Kind, nested: bool, column: int) -> None:
    rig = Rig(kind, (0, Slot(0, 0, 512)), *own_slot())
    level(rig, "L2", nested)
    assert rig.do(PLAIN, OWN, LOAD) is (MMIO if kind.hides_internal else MEMORY)
    level(rig, "L1", nested)
    rig.toggle(0)
    assert rig.do(STRING, OWN, LOAD) is MEMORY
    assert rig.do(STRING, OWN, STORE) is MEMORY
    rig.check()


@pytest.mark.parametrize("l2_touches", [True, False])
@pytest.mark.parametrize(("kind", "nested", "column"), AMD_COLUMNS)
def test_amd_slot_made_after_l1_touched(
    kind: Kind, nested: bool, column: int, l2_touches: bool
) -> None:
    rig = Rig(kind, (0, Slot(0, 0, 512)))
    assert rig.do(PLAIN, OWN, LOAD) is MMIO  # nothing is there yet
    rig.change(*(Change(as_id, None, slot) for as_id, slot in own_slot()))
    if l2_touches:
        level(rig, "L2", nested)
        rig.do(PLAIN, OWN, LOAD)
        level(rig, "L1", nested)
    poisoned = l2_touches and kind.hides_internal
    assert rig.do(PLAIN, OWN, LOAD) is (MMIO if poisoned else MEMORY)
    stale = [r for r in rig.probes.rows if r.site == Site.CHECK_MMIO_SPTE]
    assert bool(stale) != poisoned  # believed before the SPTE is looked at
    rig.check()


#: (step, level, how, 6.1.192, 6.12.107)
INTEL = (
    ("L1 plain load", "L1", PLAIN, MEMORY, MEMORY),
    ("L1 OUTSB", "L1", STRING, MEMORY, MEMORY),
    ("L2 8-byte load", "L2", PLAIN, MMIO, MEMORY),
    ("L1 OUTSB after L2's VMCALL", "L1", STRING, MMIO, MEMORY),
    ("L1 plain load after that", "L1", PLAIN, MEMORY, MEMORY),
)


@pytest.mark.parametrize(("kind", "column"), [(INTEL_6_1, 3), (INTEL_6_12, 4)])
@pytest.mark.parametrize(
    ("number", "gpa", "pages"), [(SLOT_TSS, 0xFFFBD000, 3), (SLOT_IDENTITY, 0xFFFBC000, 1)]
)
def test_intel_table(kind: Kind, column: int, number: int, gpa: int, pages: int) -> None:
    rig = Rig(kind, (0, Slot(0, 0, 512)), *own_slot(number, gpa, pages))
    for row in INTEL:
        level(rig, row[1], nested=False)
        assert rig.do(row[2], gpa, LOAD) is row[column], row[0]
    hits = [r for r in rig.probes.rows if r.type == Type.MATCH and not r.flags & Flag.L2]
    assert len(hits) == kind.hides_internal
    assert all(r.flags & Flag.BY_GPA for r in hits)
    rig.check()


X, Y, Z, W, LOW = 0xA0000, 0xC0000, 0xE0000, 0xF0000, 0x2000
SMM_SLOTS = (
    (0, Slot(0, 0, 0xA0)), (0, Slot(1, Y >> 12, 16)), (1, Slot(0, 0, 0xA0)),
    (1, Slot(1, X >> 12, 16)),
)  # fmt: skip
CHANGE_AS0, CHANGE_AS1, ADD_Z = "change AS0", "change AS1", "add Z to AS1"

#: (step, in SMM, how, gpa, write, vulnerable, fixed), or what the VMM does in between.
SMM = (
    ("F1", True, STRING, X, LOAD, MEMORY, MEMORY),
    ("F2", True, PLAIN, X, LOAD, MEMORY, MEMORY),
    ("F3", False, PLAIN, X, LOAD, MMIO, MMIO),
    ("F4", False, STRING, X, LOAD, MMIO, MMIO),
    ("F5", True, PLAIN, X, LOAD, MEMORY, MEMORY),
    ("F6", True, STRING, X, LOAD, MMIO, MEMORY),
    ("F7", True, STRING, X + 0x10, STORE, MMIO, MEMORY),
    ("F8", True, PLAIN, X, LOAD, MEMORY, MEMORY),
    ("F9", True, STRING, LOW, LOAD, MEMORY, MEMORY),
    ("F10", True, STRING, X + 0x1000, LOAD, MEMORY, MEMORY),
    CHANGE_AS1,
    ("F11", True, STRING, X, LOAD, MMIO, MEMORY),
    CHANGE_AS0,
    ("F12", True, STRING, X, LOAD, MEMORY, MEMORY),
    ("V1", False, STRING, Y, LOAD, MEMORY, MEMORY),
    ("V2", False, PLAIN, Y, LOAD, MEMORY, MEMORY),
    ("V3", True, PLAIN, Y, LOAD, MMIO, MMIO),
    ("V4", False, PLAIN, Y, LOAD, MEMORY, MEMORY),
    ("V5", False, STRING, Y, LOAD, MMIO, MEMORY),
    ("V6", False, STRING, Y + 0x10, STORE, MMIO, MEMORY),
    ("V7", False, STRING, Y + 0x1000, LOAD, MEMORY, MEMORY),
    ("S1", True, PLAIN, Z, LOAD, MMIO, MMIO),
    ("S2", True, PLAIN, Z, LOAD, MMIO, MMIO),
    ADD_Z,
    ("S3", True, PLAIN, Z, LOAD, MMIO, MEMORY),
    ("S4", True, STRING, Z, LOAD, MMIO, MEMORY),
    ("S5", True, PLAIN, Z + 0x10, STORE, MMIO, MEMORY),
    ("S6", False, PLAIN, Z, LOAD, MMIO, MMIO),
    CHANGE_AS0,
    ("S7", True, PLAIN, Z, LOAD, MEMORY, MEMORY),
    ("S8", True, STRING, Z, LOAD, MEMORY, MEMORY),
    ("H1", False, PLAIN, W, LOAD, MMIO, MMIO),
    ("H2", True, STRING, W, LOAD, MMIO, MMIO),
    ("H3", True, PLAIN, W, LOAD, MMIO, MMIO),
    ("H4", False, STRING, W, LOAD, MMIO, MMIO),
)
#: Steps at which the cache is believed: by gva where it is shadow paging's own, else by gpa.
BELIEVED_BY_BOTH = ("F3", "F4", "V3", "S1", "S2", "S6", "H1", "H3")
BELIEVED_BY_VULNERABLE = ("F6", "F7", "F11", "V5", "V6", "S3", "S4", "S5", "H2", "H4")
#: Without MMIO SPTEs no reserved-bit fault asks the cache.
WITHOUT_SPTES = {"S3": MEMORY, "S5": MEMORY}


@pytest.mark.parametrize("variant", ["npt", "shadow", "no mmio_caching"])
@pytest.mark.parametrize("kind", [K6_1_176, K6_12_107, K6_1_192, K6_12_117])
def test_smm_table(kind: Kind, variant: str) -> None:
    kind = replace(kind, tdp=variant != "shadow", mmio_caching=variant != "no mmio_caching")
    rig = Rig(kind, *SMM_SLOTS)
    assert rig.vm.gens == [4, 5]
    believed = []
    matches: list[bool] = []  # by gpa
    match = rig.probes.match

    def spy(vcpu: Vcpu, gva: int, gpa: int, write: bool, by_gpa: bool) -> None:
        matches.append(by_gpa)
        match(vcpu, gva, gpa, write, by_gpa)

    rig.probes.match = spy  # type: ignore[method-assign]
    for row in SMM:
        if isinstance(row, str):
            if row == ADD_Z:
                rig.change(Change(1, None, Slot(2, Z >> 12, 16)))
            else:
                rig.toggle(int(row == CHANGE_AS1))
            continue
        step, smm, how, gpa, write, vulnerable, fixed = row
        if smm and not rig.vcpu.smm:
            rig.vcpu.enter_smm()
        elif not smm and rig.vcpu.smm:
            rig.vcpu.leave_smm()
        wanted = vulnerable if kind.as0_generation else fixed
        if variant == "no mmio_caching":
            wanted = WITHOUT_SPTES.get(step, wanted)
        matches.clear()
        assert rig.do(how, gpa, write) is wanted, step
        if matches:
            believed.append(step)
            cross = step in BELIEVED_BY_VULNERABLE and not step.startswith("S")
            by_gva = not all(matches)
            if cross:
                assert not by_gva, step
            elif step == "F4":
                assert by_gva == (variant == "shadow")
        if step == "V3":
            assert rig.vcpu.cache.gen == (rig.vm.gens[0 if kind.as0_generation else 1])
    both = list(BELIEVED_BY_BOTH)
    if kind.as0_generation:
        both += [s for s in BELIEVED_BY_VULNERABLE
                 if variant != "no mmio_caching" or s not in WITHOUT_SPTES]  # fmt: skip
    assert sorted(believed) == sorted(both)
    assert bool(rig.happened(What.MIXED_UP)) == kind.as0_generation
    assert bool(rig.happened(What.HARMLESS)) == kind.as0_generation
    rig.check()


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("overwrites", [True, False])
def test_spte_overwrite(overwrites: bool, present: bool) -> None:
    """P1 maps RAM read-only, the VMM rewrites the guest's PTE to a hole, P2 stores there."""
    kind = replace(K6_12_107, tdp=False, overwrites_spte=overwrites)
    rig = Rig(kind, (0, Slot(0, 0, 0x400)))
    page = 0x400
    if present:
        rig.vcpu.tables[page] = 0x234, False
        assert rig.vcpu.access(PLAIN, page << 12, LOAD) is MEMORY
    rig.vcpu.tables[page] = 0xE00, True
    assert rig.vcpu.access(PLAIN, page << 12, STORE) is MMIO
    (marked,) = (r for r in rig.probes.rows if r.site == Site.MARK_MMIO_SPTE)
    assert bool(marked.flags & Flag.PRESENT) == (overwrites and present)
    assert rig.happened(What.OVERWROTE) == (overwrites and present)
