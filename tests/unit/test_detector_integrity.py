# SPDX-License-Identifier: MIT
"""Sequences and losses: every gap in its place, whatever the batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.analysis.detector import Detector
from kvmprobe.analysis.integrity import LIST_LIMIT, Integrity
from kvmprobe.analysis.vms import VmNames
from kvmprobe.probes.schema import EVENT, Flag, LifecycleChange, LossCause, Type, columns
from tests.streams import ev, gone, interleave, stream, vm_gone


def _follow(rows: np.ndarray[Any, Any], cuts: list[int] | None = None) -> Integrity:
    integrity = Integrity()
    for part in np.split(rows, sorted(cuts or [])):
        integrity.feed(columns(part))
    return integrity


def _seqs(*numbers: int, **fields: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    return [ev(Type.MMIO, seq=seq, **fields) for seq in numbers]


def _loss(kind: int, records: int, cpu: int = 0, cause: int = 1, vm: int = 0) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": kind, "aux": cpu, "len": cause}
    return ev(Type.LOSS, vm=vm, vcpu=0xFFFF, addr=records, slot=0, **fields)


def test_whole_stream() -> None:
    found = _follow(stream(_seqs(*range(500, 600))))
    assert (found.missing, found.unexplained, found.lost_total, found.total) == (0, 0, 0, 100)
    assert found.gaps == []
    assert found.anomalies == []


def test_gap_is_placed() -> None:
    (gap,) = _follow(stream(_seqs(7, 8, 12, 13))).gaps
    assert (gap.vm, gap.vcpu, gap.after, gap.records, gap.ts) == (1, 0, 8, 3, 3000)


def test_sequence_wraps() -> None:
    found = _follow(stream(_seqs(2**32 - 2, 2**32 - 1, 0, 2)))
    assert (found.missing, found.anomalies) == (1, [])


def test_repeats_and_steps_back_are_anomalies() -> None:
    found = _follow(stream(_seqs(5, 5, 6, 3, 4)))
    assert found.anomaly_counts == {"repeats": 1, "goes back": 1}
    assert [(a.kind, a.seq) for a in found.anomalies] == [("repeats", 5), ("goes back", 3)]
    assert found.missing == 0


_IMPOSSIBLE = {
    "L2 without a known level": Flag.L2,
    "SMM without a known address space": Flag.SMM | Flag.TWO_AS,
    "SMM with one address space": Flag.SMM | Flag.AS_KNOWN,
    "a compared generation that isn't known": Flag.GEN_IS_AS0,
    "another address space that isn't known": Flag.OTHER_AS,
}


@pytest.mark.parametrize("kind", _IMPOSSIBLE)
def test_flags_that_contradict_each_other_are_anomalies(kind: str) -> None:
    flags = _IMPOSSIBLE[kind]
    events = [*_seqs(1), ev(Type.MATCH, flags, seq=2), ev(Type.FAULT, flags, seq=3, vcpu=4)]
    found = _follow(stream(events))
    assert found.anomaly_counts == {kind: 2}
    assert [(a.kind, a.vm, a.vcpu, a.seq) for a in found.anomalies] == [
        (kind, 1, 0, 2),
        (kind, 1, 4, 3),
    ]
    assert [found.trusts(1, n) for n in (0, 1, 4)] == [False, True, False]


def test_flags_of_real_events_are_possible() -> None:
    known = Flag.LEVEL_KNOWN | Flag.AS_KNOWN | Flag.TWO_AS | Flag.GEN_KNOWN | Flag.FILL_AS_KNOWN
    for flags in (
        Flag(0), known, known | Flag.L2, known | Flag.SMM | Flag.SMM_SEEN | Flag.GEN_IS_AS0,
        known | Flag.OTHER_AS | Flag.GEN_IS_CURRENT, Flag.AS_KNOWN, Flag.TWO_AS | Flag.SMM_SEEN,
    ):  # fmt: skip
        assert _follow(stream([ev(Type.MATCH, flags)])).anomaly_counts == {}


def test_a_vcpu_of_no_vm_is_an_anomaly() -> None:
    found = _follow(stream([ev(Type.MATCH, vm=0), _loss(Type.FILL, 1)]))
    assert found.anomaly_counts == {"belongs to no VM": 1}
    assert not found.trusts(0, 0)
    assert found.trusts(0, 0xFFFF)


def test_vcpus_out_of_sequence_are_not_trusted() -> None:
    found = _follow(stream([*_seqs(5, 5), *_seqs(5, 4, vcpu=1), *_seqs(1, 9, vcpu=2)]))
    assert [found.trusts(1, n) for n in range(3)] == [False, False, True]


@given(st.binary(min_size=56 * 40, max_size=56 * 40), st.integers(0, 40))
def test_any_bytes_are_taken(data: bytes, cut: int) -> None:
    rows = np.frombuffer(data, EVENT).copy()
    rows["type"] %= 16
    integrity, detector, names = _follow(rows, [cut]), Detector(), VmNames()
    for part in np.split(rows, [cut]):
        detector.feed(columns(part))
        names.feed(columns(part))
    assert integrity.anomaly_counts.total() >= len(integrity.anomalies)
    assert all(f.count > 0 for f in detector.findings())
    assert all(names.get(int(vm)).id == vm for vm in rows["vm"])


def test_vcpus_are_followed_apart() -> None:
    events = [*_seqs(1, 2), *_seqs(90, vcpu=1), *_seqs(3), *_seqs(91, vcpu=1), *_seqs(7, vm=2)]
    found = _follow(stream(events))
    assert (found.missing, found.anomaly_counts) == (0, {})


def test_a_new_vcpu_of_the_same_number_begins_anew() -> None:
    seen = ev(Type.LIFECYCLE, seq=0, slot=-1, kind=LifecycleChange.VCPU_SEEN)
    for ends in ([gone(seq=3), *_seqs(0, 1)], [seen, *_seqs(1, 2)]):
        rows = stream([*_seqs(1, 2), *ends])
        for cuts in ([], [2], [3], list(range(len(rows)))):
            found = _follow(rows, cuts)
            assert (found.missing, found.anomaly_counts) == (0, {})


def test_losses_are_added_up_by_observation_cpu_cause_and_vm() -> None:
    ring, state = LossCause.RING, LossCause.STATE
    found = _follow(
        stream([
            _loss(Type.FILL, 3), _loss(Type.FILL, 4), _loss(Type.FILL, 5, cpu=1),
            _loss(Type.MATCH, 1, cause=state), _loss(99, 2),
            _loss(Type.FILL, 9, vm=3),
        ])
    )  # fmt: skip
    assert found.lost == {
        (Type.FILL, 0, ring, 0): 7,
        (Type.FILL, 1, ring, 0): 5,
        (Type.MATCH, 0, state, 0): 1,
        (99, 0, ring, 0): 2,
        (Type.FILL, 0, ring, 3): 9,
    }
    everywhere = {"FILL": 12, "MATCH": 1, "type-99": 2}
    assert found.lost_by_observation() == everywhere | {"FILL": 21}
    assert found.lost_by_observation(3) == everywhere | {"FILL": 21}
    assert found.lost_by_observation(2) == everywhere
    assert (found.total, found.lost_total) == (0, 24)


def test_gaps_beyond_the_losses_told_are_unexplained() -> None:
    found = _follow(stream([*_seqs(0, 11), _loss(Type.FILL, 4)]))
    assert (found.missing, found.unexplained, found.lost_total) == (10, 6, 10)
    assert _follow(stream([*_seqs(0, 11), _loss(Type.FILL, 12)])).unexplained == 0


def test_lists_are_bounded_and_totals_are_not() -> None:
    found = _follow(stream(_seqs(*range(0, 2000, 2), *[5] * 300)))
    assert len(found.gaps) == len(found.anomalies) == LIST_LIMIT
    assert found.missing == 999
    assert found.anomaly_counts == {"goes back": 1, "repeats": 299}


def test_many_vms_take_the_other_way_to_sort() -> None:
    events = [e for vm in (1, 2**31, 2**32 - 1) for e in _seqs(0, 1, 3, vm=vm, vcpu=4095)]
    found = _follow(stream(interleave([events[:3], events[3:6], events[6:]], 5)))
    assert (found.missing, found.anomaly_counts) == (3, {})


def test_keys_of_16_bits_are_not_too_many() -> None:
    """Three VMs with 32768 vCPU ids each just don't fit."""
    events = [e for vm in (1, 2, 3) for e in _seqs(0, 1, vm=vm, vcpu=0x7FFF)]
    found = _follow(stream(interleave([events[:2], events[2:4], events[4:]], 5)))
    assert (found.missing, found.anomaly_counts) == (0, {})


def test_gaps_all_of_one_size_are_gaps() -> None:
    assert _follow(stream(_seqs(0, 1, 3, 5)), [1]).missing == 2


def test_losses_of_a_vm_account_for_its_gaps() -> None:
    found = _follow(stream([*_seqs(0, 11), *_seqs(0, 3, vm=2), _loss(Type.FILL, 4, vm=1)]))
    assert (found.unexplained, found.unexplained_in(1), found.unexplained_in(2)) == (8, 6, 2)


def test_vms_are_met_without_a_vcpu() -> None:
    change = ev(Type.GENERATION, vm=2, vcpu=0xFFFF, slot=-1)
    found = _follow(stream([*_seqs(0), change, _loss(Type.FILL, 1)]))
    assert list(found.vms) == [0, 2, 1]


def test_ends_free_memory() -> None:
    integrity = Integrity()
    for vm in range(1, 300):
        rows = [*_seqs(0, 1, vm=vm), *_seqs(0, vm=vm, vcpu=1), gone(vm=vm, vcpu=1, seq=1)]
        integrity.feed(columns(stream([*rows, vm_gone(vm)])))
    assert sorted(integrity._last) == [vm << 16 for vm in range(1, 300)]
    integrity.forget(list(integrity.gone))
    assert (integrity._last, list(integrity.vms)) == ({}, [0])


@pytest.mark.parametrize("cuts", [[], [3], [4], [3, 4]])
def test_a_vcpu_may_end_after_its_vm(cuts: list[int]) -> None:
    """It is told when its address is taken again; what is missing before it counts, cut or not."""
    rows = stream([*_seqs(0, 1, 2), vm_gone(1), gone(seq=5)])
    integrity = Integrity(from_first=True)
    for part in np.split(rows, cuts):
        integrity.feed(columns(part))
    assert (integrity.missing, list(integrity.gone), integrity._last) == (2, [1], {})


def test_a_vcpu_may_end_after_its_vm_is_forgotten() -> None:
    integrity = Integrity(from_first=True)
    integrity.feed(columns(stream([*_seqs(0, 1, 2), *_seqs(0, vm=2), vm_gone(1)])))
    integrity.forget([1])
    integrity.feed(columns(stream([gone(seq=3), gone(vm=2, seq=1), gone(vm=3, seq=0)])))
    assert (integrity.missing, integrity.gaps, list(integrity.vms)) == (0, [], [0, 2])


@given(
    st.lists(st.tuples(st.integers(1, 2), st.integers(0, 2), st.integers(0, 6)), max_size=40),
    st.lists(st.integers(0, 40), max_size=5),
)
def test_where_batches_are_cut_changes_nothing(
    steps: list[tuple[int, int, int]], cuts: list[int]
) -> None:
    events: list[dict[str, Any]] = []
    last: dict[tuple[int, int], int] = {}
    for vm, vcpu, step in steps:
        last[vm, vcpu] = last.get((vm, vcpu), 10) + step - 1
        events.append(ev(Type.MMIO, vm=vm, vcpu=vcpu, seq=last[vm, vcpu]))
    rows = stream(events)
    whole = _follow(rows)
    parts = _follow(rows, [min(c, len(rows)) for c in cuts])
    expected = sum(step - 2 for n, (vm, vcpu, step) in enumerate(steps)
                   if step > 2 and (vm, vcpu) in {s[:2] for s in steps[:n]})  # fmt: skip
    assert whole.missing == parts.missing == expected
    assert whole.anomaly_counts == parts.anomaly_counts
    assert whole.events == parts.events
    key = "gaps", "anomalies"
    for name in key:
        assert sorted(map(repr, getattr(whole, name))) == sorted(map(repr, getattr(parts, name)))
