# SPDX-License-Identifier: MIT
"""Lines in all the shapes that the tools print, and numbers found eight bytes at a time."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.formats import lines, swar
from kvmprobe.formats.ftrace import TextReader
from kvmprobe.formats.records import RECORD, Point, Tally
from kvmprobe.probes.schema import LossCause, Type
from tests.traces import events_of_text, line

#: One event in every form of head: the text before "kvm_mmio: ...", the tid, tgid and time.
HEADS = {
    " qemu-system-x86-77      [003] d..1.    12.000007: ": (77, 0, 12_000_007_000),
    "       CPU 1/KVM-4001    [003] .....  12.000007: ": (4001, 0, 12_000_007_000),
    "       CPU 1/KVM-4001    (   4000) [003] d..2. 12.000007: ": (4001, 4000, 12_000_007_000),
    "       CPU 1/KVM-4001    (-------) [003] .... 12.000007: ": (4001, 0, 12_000_007_000),
    "       CPU 1/KVM-4001  [003]    12.000000007: ": (4001, 0, 12_000_000_007),
    "   kvm-nx-lpage-re-1056    [003] ..... 12.000007: ": (1056, 0, 12_000_007_000),
    "  CPU 1/KVM  4001 [003]    12.000007:     kvm:": (4001, 0, 12_000_007_000),
    "  CPU 1/KVM  4000/4001 [003]    12.000000007:    kvm:": (4001, 4000, 12_000_000_007),
    "       CPU 1/KVM-4001    [003] d..1.  123456789012: ": (4001, 0, 123456789012),
    "       CPU 1/KVM-4001    [1003] d..1. 12.000007: ": (4001, 0, 12_000_007_000),
}


def records_of(text: str) -> tuple[np.ndarray, Tally]:
    tally = Tally()
    parts = [block.records for block in TextReader(io.BytesIO(text.encode()), tally)]
    return np.concatenate([np.empty(0, RECORD), *parts]), tally


@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str) -> None:
    records, tally = records_of(f"{head}kvm_mmio: mmio write len 4 gpa 0xfee000b0 val 0x0\n")
    assert (len(records), tally.unknown, tally.read) == (1, 0, 1)
    (record,) = records
    assert (record["tid"], record["tgid"], record["ts"]) == HEADS[head]
    assert record["cpu"] == (1003 if "1003" in head else 3)
    assert (record["point"], record["a"], record["b"], record["note"]) == (
        Point.MMIO, 0xFEE000B0, 4, 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("kvm_page_fault", "vcpu 7 rip 0x1 address 0x00000000fffbd000 error_code 0x181",
         {"vcpu": 7, "a": 0xFFFBD000, "b": 0x181}),
        ("kvm_page_fault", "address fffbd000 error_code 181", {"a": 0xFFFBD000, "b": 0x181}),
        ("kvm_mmu_spte_requested", "gfn fffbd pfn 8000000000000000 level 1",
         {"a": 0xFFFBD, "b": 1 << 63}),
        ("mark_mmio_spte", "sptep:(____ptrval____) gfn fffbd access 6 gen 8",
         {"a": 0xFFFBD, "b": 6, "c": 8}),
        ("handle_mmio_page_fault", "addr:0 gfn fee00 access 7", {"a": 0xFEE00, "b": 7}),
        ("check_mmio_spte", "spte 8000000fee00066 kvm_gen 8 spte-gen 6 valid 0",
         {"a": 8, "b": 6, "c": 0x8000000FEE00066}),
        ("kvm_emulate_insn", "0:4019b7:48 8b 00 (prot64)", {"a": 0x4019B7, "b": 0x8B48}),
        ("kvm_emulate_insn", "    0:401c07: 6e (prot64) failed", {"a": 0x401C07, "note": 1}),
        ("vcpu_match_mmio", "gva 0 gpa 0xfffbd000 Write GPA", {"b": 0, "note": 3}),
        ("kvm_userspace_exit", "reason KVM_EXIT_MMIO (6)", {"a": 6, "note": 0}),
        ("kvm_userspace_exit", "reason restart (4)", {"a": 4, "note": 1}),
        ("kvm_exit", "vcpu 3 reason MSR_WRITE rip 0x1", {"vcpu": 3}),
        ("kvm_exit", "reason EPT_VIOLATION rip 0x401b00 info 81 0", {"vcpu": 0xFFFFFFFF}),
        ("kvm_entry", "vcpu 2, rip 0x401b00", {"vcpu": 2}),
        ("kvm_smm_transition", "vcpu 1: entering SMM, smbase 0x30000", {"vcpu": 1, "note": 1}),
        ("kvm_smm_transition", "vcpu 1: leaving SMM, smbase 0x30000", {"vcpu": 1, "note": 0}),
        ("kvm_mmu_set_spte", "gfn 180 spte 6100000379cc877 (rwxu) level 1 at 62c4c00",
         {"a": 0x180, "b": 0x6100000379CC877}),
        ("kvm_tdp_mmu_spte_changed", "as id 1 gfn a0 level 1 old_spte 0 new_spte 5a0",
         {"a": 0xA0, "b": 0x5A0, "note": 1}),
    ],
)  # fmt: skip
def test_payloads(name: str, text: str, expected: dict[str, int]) -> None:
    records, tally = records_of(line(1, name, text))
    assert tally.unknown == 0
    assert {key: int(records[0][key]) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kvm_page_fault", "vcpu x"),
        ("mark_mmio_spte", "sptep:0 gfn 123456789abcdef01 access 6 gen 8"),
        ("kvm_mmio", "mmio frob len 4 gpa 0x0 val 0x0"),
        ("kvm_emulate_insn", "0:401c07:"),
    ],
)
def test_events_of_ours_that_are_not_understood_weaken_the_verdict(name: str, text: str) -> None:
    records, tally = records_of(line(1, name, text))
    assert (len(records), tally.unknown, tally.garbled, len(tally.samples)) == (0, 1, 1, 1)


def test_loss_marks_become_losses() -> None:
    text = (
        "# entries-in-buffer/entries-written: 10/15   #P:4\n"
        + line(1, "kvm_entry", "vcpu 0, rip 0x0")
        + "CPU:2 [LOST 17 EVENTS]\n"
        + line(2, "kvm_entry", "vcpu 0, rip 0x0")
        + "CPU:3 [4 EVENTS DROPPED]\n"
        + "psl2 129 [001] 27.6: PERF_RECORD_LOST lost 3\n"
    )
    events = events_of_text(text)
    lost = events[events["type"] == Type.LOSS]
    assert lost["addr"].tolist() == [5, 17, 4, 3]
    assert lost["aux"].tolist() == [0xFFFF, 2, 3, 1]
    assert (lost["len"] == LossCause.RING).all()
    assert lost["ts"].tolist() == [0, 10**9, 2 * 10**9, 2 * 10**9]


def test_a_line_without_end_is_skipped_in_bounded_memory() -> None:
    entry = line(1, "kvm_entry", "vcpu 0, rip 0x0")
    records, tally = records_of(entry + "x" * (5 << 20) + "\n" + entry)
    assert (len(records), tally.unknown) == (2, 1)


def test_a_skipped_line_may_end_where_a_read_ends() -> None:
    entry = line(1, "kvm_entry", "vcpu 0, rip 0x0")
    pieces = iter([entry.encode(), b"x" * (5 << 20), b"x\n", entry.encode()])

    class Pieces:
        rest = b""

        def read(self, size: int, /) -> bytes:
            self.rest = self.rest or next(pieces, b"")
            data, self.rest = self.rest[:size], self.rest[size:]
            return data

    tally = Tally()
    records = [len(block.records) for block in TextReader(Pieces(), tally)]
    assert (sum(records), tally.unknown) == (2, 1)


def test_last_line_cut_in_a_number_is_not_read() -> None:
    records, tally = records_of(line(1, "kvm_mmu_spte_requested", "gfn 180 pfn 379cc level 1")[:-9])
    assert (len(records), tally.unknown) == (0, 1)


def text_of(text: str) -> lines.Text:
    pad = "\n" * lines.PAD
    return lines.text_of(np.frombuffer(f"{pad}{text}{pad}".encode(), np.uint8))


@given(st.lists(st.tuples(st.integers(0, 10**16 - 1), st.integers(0, 2**64 - 1)), min_size=1))
def test_numbers(values: list[tuple[int, int]]) -> None:
    text = text_of("".join(f"{d}:{x:x} 0x{x:x}\n" for d, x in values))
    number = swar.decimal(text.words, text.start)
    assert number.value.tolist() == [d for d, _ in values]
    plain = swar.hexadecimal(text.words, number.end + 1)
    prefixed = swar.hexadecimal(text.words, plain.end + 1)
    assert plain.value.tolist() == prefixed.value.tolist() == [x for _, x in values]
    assert prefixed.end.tolist() == text.end.tolist()
    assert (number.good & plain.good & prefixed.good).all()


@given(st.lists(st.tuples(st.integers(0, 9999999), st.integers(0, 20)), min_size=1))
def test_numbers_that_end_somewhere(values: list[tuple[int, int]]) -> None:
    text = text_of("".join(f"{' ' * n}-{d}\n" for d, n in values))
    number = swar.decimal_before(text.words, text.end)
    assert number.value.tolist() == [d for d, _ in values]
    assert (text.characters[number.end - 1] == ord("-")).all()
    blank = swar.skip(text.words, text.start, ord(" "))
    dash, found = swar.find(text.words, text.start, ord("-"), 24)
    assert blank.tolist() == dash.tolist()
    assert found.all()
