# SPDX-License-Identifier: MIT
"""Streams that the model made, of which rules or probes once said too much or too little.

docs/proof.md tells of each.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmprobe.probes.schema import SLOT_TSS
from tests.model.check import say
from tests.model.memslots import Change, Slot
from tests.model.probes import Probes
from tests.model.terms import Fate, How, Result
from tests.model.test_model_tables import K6_1_192, K6_12_107, K6_12_117, Rig, X
from tests.model.truth import What

TSS, ROOM = 0xFFFBD, Slot(0, 0x100, 0x100)


def findings(rig: Rig) -> list[str]:
    rig.vcpu.idle()
    return [f.rule.id for f in say(rig.run, rig.probes.finish()).findings]


def tss(as_id: int) -> Change:
    return Change(as_id, None, Slot(SLOT_TSS, TSS, 3))


def test_first_sight_in_smm() -> None:
    """The legacy window is MMIO outside SMM and memory in SMM; the recording begins in an SMI."""
    probes = Probes(start=1 << 30)
    rig = Rig(K6_12_117, (0, ROOM), (1, ROOM), (1, Slot(1, X >> 12, 16)), probes=probes)
    rig.do(How.PLAIN, X, False)
    rig.vcpu.enter_smm()
    probes.start = 0
    assert findings(rig) == []


@pytest.mark.parametrize("l2", [False, True])
def test_late_fill(l2: bool) -> None:
    """Tracepoints only: a hole's fill is seen at the next entry, and the TSS lies there by then."""
    rig = Rig(replace(K6_12_117, address_spaces=1), (0, ROOM), probes=Probes(functions=False))
    rig.vcpu.l2 = l2
    rig.vm.begin(tss(0))
    rig.vm.race, rig.vm.race_steps = 6, 2  # between the retried fault and the next entry
    rig.vcpu.access(How.PLAIN, rig.vcpu.gva(TSS), False, Fate(stale=True))
    assert rig.vm.find(0, TSS)
    assert findings(rig) == []


def test_internal_slot_by_smm() -> None:
    """KVM makes its slot in one address space after the other; in between SMM fills the cache."""
    rig = Rig(K6_12_107, (0, ROOM), (1, ROOM))
    rig.change(tss(0))
    rig.vcpu.enter_smm()
    assert rig.do(How.PLAIN, TSS << 12, False) is Result.USERSPACE
    rig.change(tss(1))
    assert rig.do(How.STRING, TSS << 12, False) is Result.USERSPACE
    said = say(rig.run, rig.probes.finish())
    assert [f.rule.id for f in said.findings if f.rule.fault == "internal-slot"] == []


def test_belief_in_smm_on_a_kernel_without_the_smm_fault() -> None:
    """L2's entry is dead in SMM: the reserved-bit fault of L1 is answered with memory."""
    rig = Rig(K6_1_192, (0, ROOM), (1, ROOM))
    rig.vcpu.enter_smm()
    rig.do(How.PLAIN, TSS << 12, False)  # a hole: an MMIO SPTE in SMM's tables
    rig.vcpu.leave_smm()
    rig.change(tss(0), tss(1))
    rig.vcpu.enter_l2(nested=False)
    rig.do(How.PLAIN, TSS << 12, False)
    rig.vcpu.enter_smm()
    assert rig.do(How.PLAIN, TSS << 12, False) is Result.MEMORY
    assert "internal-slot-hit" not in findings(rig)


def test_fill_found_by_difference_after_quiet_samples() -> None:
    """Tracepoints only, mmio_caching=0: the level of the fill is known, as entries were sampled."""
    rig = Rig(replace(K6_1_192, mmio_caching=False), (0, ROOM), (1, ROOM),
              probes=Probes(functions=False))  # fmt: skip
    rig.change(tss(0), tss(1))
    rig.vcpu.idle()
    rig.vcpu.enter_l2(nested=False)
    rig.vcpu.idle()
    rig.do(How.PLAIN, TSS << 12, False)
    assert "internal-slot-fill" in findings(rig)


def test_fill_that_was_skipped() -> None:
    """In SMM nothing is written while memslots change: the entry is still the one made outside."""
    rig = Rig(K6_12_117, (0, ROOM), (1, ROOM))
    hole = 0x300 << 12
    assert rig.do(How.PLAIN, hole, False) is Result.USERSPACE
    rig.vcpu.enter_smm()
    rig.vm.begin(Change(1, None, Slot(5, 0x400, 2)))
    rig.vm.step()  # the grace period runs
    assert rig.do(How.PLAIN, hole, False) is Result.USERSPACE
    rig.vcpu.leave_smm()
    assert rig.do(How.STRING, hole, False) is Result.USERSPACE
    assert findings(rig) == []


def test_retry_before_a_pfn_was_sought() -> None:
    """Before v6.10 a fault that is retried early has pfn 0: that is no memory shown to L2."""
    rig = Rig(K6_1_192, (0, ROOM), (1, ROOM))
    rig.change(tss(0), tss(1))
    rig.vcpu.enter_l2(nested=False)
    gva = rig.vcpu.gva(TSS)
    assert rig.vcpu.access(How.PLAIN, gva, False, Fate(invalidated=True)) is Result.USERSPACE
    rig.vcpu.idle()
    said = say(rig.run, rig.probes.finish())
    assert said.acquittals == ()
    assert "internal-slot-fill" in [f.rule.id for f in said.findings]


def begin_after(rig: Rig, calls: int) -> None:
    """Let the recording begin after so many more calls of probes."""
    rig.probes.start = rig.probes.calls + calls


def test_recording_begins_at_a_fault() -> None:
    """Tracepoints only: the vCPU's first sight is at the fault, and L2's entry is live there."""
    probes = Probes(functions=False, start=1 << 30)
    rig = Rig(K6_1_192, (0, ROOM), (1, ROOM), (0, Slot(SLOT_TSS, TSS, 3)), probes=probes)
    rig.vcpu.enter_l2(nested=False)
    rig.do(How.PLAIN, TSS << 12, False)
    rig.vcpu.leave_l2()
    begin_after(rig, 1)  # kvm_entry
    rig.do(How.PLAIN, 0x300 << 12, False)  # a hole: its fill disarms
    assert rig.happened(What.ARMED) == 1
    rig.check()


def test_recording_begins_between_the_two_signs_of_one_belief() -> None:
    """The reserved-bit fault is before the recording, the emulator's match is in it."""
    kind = replace(K6_12_117, hides_from_l1=True, address_spaces=1)
    rig = Rig(kind, (0, ROOM), (0, Slot(SLOT_TSS, TSS, 3)), probes=Probes(start=1 << 30))
    rig.do(How.PLAIN, TSS << 12, False)
    begin_after(rig, 2)  # kvm_entry and the fault
    assert rig.do(How.PLAIN, TSS << 12, False) is Result.USERSPACE
    assert rig.happened(What.MISREAD) == 1
    rig.check()


def test_recording_begins_within_a_fault() -> None:
    """The fill is after the beginning, and of a vCPU no probe has met: nothing tells of SMM."""
    rig = Rig(K6_12_107, (0, ROOM), (1, ROOM), probes=Probes(start=1 << 30))
    hole = 0x300 << 12
    rig.vcpu.enter_smm()
    rig.vm.begin(Change(1, None, Slot(5, 0x400, 2)))
    rig.vm.step()  # the grace period runs: what is seen in SMM proves nothing
    begin_after(rig, 2)  # kvm_entry and the fault's beginning
    rig.do(How.PLAIN, hole, False)
    rig.vm.settle()
    rig.vcpu.leave_smm()
    assert rig.do(How.STRING, hole, False) is Result.USERSPACE
    assert rig.happened(What.HARMLESS) == 2
    rig.check()


def fill_while_memslots_change(rig: Rig, gfn: int) -> None:
    """In SMM, the cache is filled while address space 1 changes, and only that one."""
    rig.vcpu.enter_smm()
    rig.vm.begin(Change(1, None, Slot(5, 0x400, 2)))
    rig.vm.step()  # the grace period runs
    assert rig.do(How.PLAIN, gfn << 12, False) is Result.USERSPACE
    rig.vm.settle()
    rig.vcpu.leave_smm()


def test_entry_written_while_memslots_change() -> None:
    """Another entry than before was written, so it is known to be SMM's: L2's misread is found."""
    rig = Rig(K6_12_107, (0, ROOM), (1, ROOM), (0, Slot(2, 0xC0, 4)))
    fill_while_memslots_change(rig, 0xC0)
    rig.vcpu.enter_l2(nested=False)
    assert rig.do(How.STRING, 0xC0 << 12, False) is Result.USERSPACE
    assert rig.happened(What.MIXED_UP) == 1
    rig.check()
    assert "address-space-mixup" in findings(rig)


def test_equal_entry_written_while_memslots_change() -> None:
    """The entry is as it was before: nothing tells that SMM wrote it once more."""
    rig = Rig(K6_12_107, (0, ROOM), (1, ROOM))
    rig.do(How.PLAIN, 0x300 << 12, False)
    fill_while_memslots_change(rig, 0x300)
    assert rig.do(How.STRING, 0x300 << 12, False) is Result.USERSPACE
    assert rig.happened(What.HARMLESS) > 0
    rig.check()


def test_memslots_change_between_a_fault_and_its_question() -> None:
    """The cache would be believed at the fault's entry, and is no more when KVM asks."""
    rig = Rig(K6_1_192, (0, ROOM), (1, ROOM))
    rig.do(How.PLAIN, TSS << 12, False)  # a hole: an MMIO SPTE in L1's tables
    rig.change(tss(0), tss(1))
    rig.vcpu.enter_l2(nested=False)
    rig.do(How.PLAIN, TSS << 12, False)
    rig.vcpu.leave_l2()
    rig.vm.begin(Change(0, None, Slot(5, 0x400, 2)))
    rig.vm.race, rig.vm.race_steps = 3, 1  # after the program at the fault's entry
    before = rig.happened(What.MISREAD)  # L2's
    assert rig.do(How.PLAIN, TSS << 12, False) is Result.MEMORY
    assert rig.happened(What.MISREAD) == before + 1
    rig.vm.settle()
    rig.check()


def test_smm_filled_before_the_recording_began() -> None:
    """While KVM made its slot, SMM took it for a hole: no recording of what is after can tell."""
    rig = Rig(K6_12_107, (0, ROOM), (1, ROOM), probes=Probes(start=1 << 30))
    rig.change(tss(0))
    rig.vcpu.enter_smm()
    assert rig.do(How.PLAIN, TSS << 12, False) is Result.USERSPACE
    rig.change(tss(1))
    rig.vcpu.leave_smm()
    begin_after(rig, 0)
    rig.vcpu.idle()
    assert rig.happened(What.ARMED) > 0
    rig.check()
