# SPDX-License-Identifier: MIT
"""What is inferred from a trace: levels, address spaces, VMs, slots; and what a loss takes away."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmprobe.formats.ftrace import TextReader
from kvmprobe.formats.records import Block, Tally
from kvmprobe.formats.slots import stated
from kvmprobe.formats.translate import Translator
from kvmprobe.probes.schema import EVENT, NO_VCPU, Flag, Type
from tests.traces import events_of_text, line

ENTRY = ("kvm_entry", "vcpu 0, rip 0x0")
ENTER = ("kvm_nested_vmenter", "rip: 0x1")
INJECT = ("kvm_nested_vmexit_inject", "reason VMCALL")
MATCH = ("vcpu_match_mmio", "gva 0xfffbd000 gpa 0xfffbd000 Read GPA")
MMIO = ("kvm_mmio", "mmio unsatisfied-read len 1 gpa 0xfffbd000 val 0x0")
ANSWER = ("kvm_mmio", "mmio read len 1 gpa 0xfffbd000 val 0x0")
EXIT = ("kvm_userspace_exit", "reason KVM_EXIT_MMIO (6)")
FILL = ("mark_mmio_spte", "sptep:0 gfn fffbd access 6 gen 9")
NOSLOT = ("kvm_mmu_spte_requested", "gfn fffbd pfn 8000000000000000 level 1")
BACKED = ("kvm_mmu_spte_requested", "gfn fffbd pfn 37f06 level 1")
WRITABLE = ("kvm_mmu_set_spte", "gfn fffbd spte 610000037f06877 (rwxu) level 1 at 62c2de8")
EMULATE = ("kvm_emulate_insn", "0:401c07:6e (prot64)")
SMM_IN = ("kvm_smm_transition", "vcpu 0: entering SMM, smbase 0x30000")
SMM_OUT = ("kvm_smm_transition", "vcpu 0: leaving SMM, smbase 0x30000")
LOST = "CPU:0 [LOST 17 EVENTS]\n"
ALL = [ENTRY, ENTER, INJECT, MATCH, MMIO, ANSWER, EXIT, FILL, NOSLOT, BACKED, WRITABLE, EMULATE,
       SMM_IN, SMM_OUT]  # fmt: skip

TASKS = ["CPU 0/KVM-4001", "CPU 1/KVM-4002", "x-77"]


def trace(*events: tuple[str, str] | str) -> str:
    return "".join(e if isinstance(e, str) else line(i, *e) for i, e in enumerate(events))


def flags_of(text: str, kind: Type, **slots: bool) -> list[Flag]:
    events = events_of_text(text, () if slots else (stated("tss=0xfffbd000:3"),))
    return [Flag(int(f)) for f in events["flags"][events["type"] == kind]]


def test_level_is_unknown_then_follows_the_nested_events() -> None:
    l1, l2, unknown, again = flags_of(
        trace(ENTRY, INJECT, MATCH, ENTER, MATCH, LOST, MATCH, ENTER, MATCH), Type.MATCH
    )
    assert l1 & (Flag.LEVEL_KNOWN | Flag.L2) == Flag.LEVEL_KNOWN
    assert l2 & (Flag.LEVEL_KNOWN | Flag.L2) == Flag.LEVEL_KNOWN | Flag.L2
    assert not unknown & Flag.LEVEL_KNOWN
    assert again & Flag.L2


def test_generation_tells_the_address_space_only_of_a_vm_with_two() -> None:
    one, two = flags_of(trace(ENTRY, FILL, SMM_IN, SMM_OUT, FILL), Type.FILL)
    assert not one & (Flag.AS_KNOWN | Flag.TWO_AS)
    assert two & (Flag.AS_KNOWN | Flag.SMM | Flag.TWO_AS) == Flag.AS_KNOWN | Flag.SMM | Flag.TWO_AS
    (inside,) = flags_of(trace(ENTRY, SMM_IN, MATCH), Type.MATCH)
    assert inside & Flag.SMM
    assert inside & Flag.SMM_SEEN
    (outside,) = flags_of(trace(ENTRY, SMM_IN, SMM_OUT, MATCH), Type.MATCH)
    assert outside & (Flag.AS_KNOWN | Flag.SMM | Flag.SMM_SEEN) == Flag.AS_KNOWN | Flag.SMM_SEEN


def test_mmio_knows_its_match_and_its_exit_and_the_answer_is_no_second_access() -> None:
    events = events_of_text(trace(ENTRY, EMULATE, MATCH, MMIO, EXIT, ANSWER, EMULATE, ANSWER))
    mmio = events[events["type"] == Type.MMIO]
    assert len(mmio) == 2
    first, second = (Flag(int(f)) for f in mmio["flags"])
    assert first & Flag.MATCHED
    assert first & Flag.TO_USERSPACE
    assert mmio["value"].tolist() == [6, 0]
    assert not second & (Flag.MATCHED | Flag.TO_USERSPACE)


def test_an_entry_before_the_exit_parts_them() -> None:
    events = events_of_text(trace(ENTRY, MMIO, ENTRY, EXIT))
    assert not events["flags"][events["type"] == Type.MMIO] & Flag.TO_USERSPACE


def test_a_well_known_address_convicts_only_where_memory_was_shown() -> None:
    hole, backed = flags_of(trace(ENTRY, MATCH, BACKED, MATCH), Type.MATCH, well_known=True)
    assert hole & (Flag.SLOT_PRESUMED | Flag.UNSTABLE) == Flag.SLOT_PRESUMED | Flag.UNSTABLE
    assert backed & (Flag.SLOT_PRESUMED | Flag.UNSTABLE) == Flag.SLOT_PRESUMED
    stated_hole, _ = flags_of(trace(ENTRY, MATCH, BACKED, MATCH), Type.MATCH)
    assert stated_hole & (Flag.SLOT_PRESUMED | Flag.UNSTABLE) == Flag.SLOT_PRESUMED


def test_a_well_known_address_acquits_only_where_memory_was_mapped_writable() -> None:
    first, second, third = flags_of(
        trace(ENTRY, BACKED, BACKED, WRITABLE, BACKED), Type.FAULTIN, well_known=True
    )
    assert first & Flag.UNSTABLE
    assert second & Flag.UNSTABLE
    assert not third & Flag.UNSTABLE


def test_vms_by_process_or_by_nearness() -> None:
    def entry(i: int, task: str, vcpu: int) -> str:
        return line(i, "kvm_entry", f"vcpu {vcpu}, rip 0x0", task=task)

    near = (
        entry(0, "CPU 0/KVM-4001", 0) + entry(1, "CPU 0/KVM-9001", 0)
        + entry(2, "CPU 1/KVM-4002", 1) + entry(3, "CPU 1/KVM-9002", 1)
    )  # fmt: skip
    events = events_of_text(near)
    seen = events[(events["type"] == Type.LIFECYCLE) & (events["vcpu"] != NO_VCPU)]
    assert list(zip(seen["aux"].tolist(), seen["vm"].tolist(), strict=True)) == [
        (4001, 1), (9001, 2), (4002, 1), (9002, 2),
    ]  # fmt: skip
    known = near.replace("-4001 ", "-4001 (   4000)").replace("-4002 ", "-4002 (   9000)")
    events = events_of_text(known.replace("-9001 ", "-9001 (   9000)"))
    seen = events[(events["type"] == Type.LIFECYCLE) & (events["vcpu"] != NO_VCPU)]
    assert seen["vm"].tolist()[:3] == [1, 2, 2]


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([*ALL, LOST]), max_size=60),
    st.lists(st.sampled_from(TASKS), min_size=60, max_size=60),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_where_blocks_are_cut_makes_no_difference(
    chosen: list[tuple[str, str] | str], tasks: list[str], cuts: list[int]
) -> None:
    def told(i: int, event: tuple[str, str] | str, task: str) -> str:
        if isinstance(event, str):
            return event
        number = task[4] if task.startswith("CPU") else "5"
        return line(i, event[0], event[1].replace("vcpu 0", f"vcpu {number}"), task=task)

    events = enumerate(zip(chosen, tasks, strict=False))
    text = "".join(told(i, event, task) for i, (event, task) in events)
    whole = events_of_text(text)
    translator = Translator((stated("tss=0xfffbd000:3"), stated("identity=0xfffbc000:1")))
    parts = [np.empty(0, EVENT)]
    for block in TextReader(io.BytesIO(text.encode()), Tally()):
        at = sorted({0, *(min(c, len(block.records)) for c in cuts), len(block.records)})
        parts += [translator.feed(Block(block.records[a:b], block.comms)) for a, b in pairwise(at)]
    parts.append(translator.finish())
    assert np.concatenate(parts).tobytes() == whole.tobytes()
