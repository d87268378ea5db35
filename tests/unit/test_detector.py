# SPDX-License-Identifier: MIT
"""The detector: state over batches, bounds, and the ways in which its input may come."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmprobe.analysis import jit
from kvmprobe.analysis.candidates import candidates
from kvmprobe.analysis.detector import Detector
from kvmprobe.analysis.steps import EVIDENCE_LIMIT
from kvmprobe.probes.schema import EVENT, SLOT_IDENTITY, Flag, Site, Type, columns
from tests.streams import (
    L1,
    L2,
    LIVE,
    RAM_GPA,
    detect,
    ev,
    gone,
    interleave,
    kept,
    noslot,
    stream,
    told,
    vcpu_streams,
    vm_gone,
)

ROOT = Path(__file__).parents[2]
JIT = pytest.param(
    True,
    marks=pytest.mark.skipif(
        not jit.available(), reason="numba is not installed, or KVMPROBE_NO_JIT is set"
    ),
)
BOTH = pytest.mark.parametrize("compiled", [False, JIT])


@given(vcpu_streams(), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 100), max_size=6))
def test_where_batches_are_cut_changes_nothing(
    streams: list[list[dict[str, Any]]], seed: int, cuts: list[int]
) -> None:
    rows = stream(interleave(streams, seed))
    whole, _ = detect(rows)
    cut, _ = detect(rows, cuts=[min(c, len(rows)) for c in cuts])
    single, _ = detect(rows, cuts=range(len(rows)))
    assert told(cut) == told(whole)
    assert told(single) == told(whole)


@given(vcpu_streams(), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_order_between_vcpus_changes_nothing(
    streams: list[list[dict[str, Any]]], seed: int, other: int
) -> None:
    for n, events in enumerate(streams):
        for seq, event in enumerate(events):
            event |= {"ts": 1000 * seq + n, "seq": seq}
    one, _ = detect(stream(interleave(streams, seed)))
    two, _ = detect(stream(interleave(streams, other)))
    assert told(one) == told(two)


@given(vcpu_streams(), st.integers(0, 2**32 - 1))
def test_candidates_alone_give_the_same(streams: list[list[dict[str, Any]]], seed: int) -> None:
    rows = stream(interleave(streams, seed))
    every, _ = detect(rows)
    few, _ = detect(rows[candidates(columns(rows))])
    assert told(few) == told(every)


@pytest.mark.skipif(not jit.available(), reason="numba is not installed, or KVMPROBE_NO_JIT is set")
@settings(max_examples=50)
@given(vcpu_streams(), st.integers(0, 2**32 - 1), st.integers(0, 60))
def test_compiled_gives_the_same(streams: list[list[dict[str, Any]]], seed: int, cut: int) -> None:
    rows = stream(interleave(streams, seed))
    plain, _ = detect(rows)
    compiled, _ = detect(rows, cuts=[min(cut, len(rows))], jit=True)
    assert compiled.compiled
    assert told(compiled) == told(plain)


@pytest.mark.skipif(not jit.available(), reason="numba is not installed, or KVMPROBE_NO_JIT is set")
def test_compiling_in_the_middle_changes_nothing() -> None:
    rows = stream([ev(Type.FILL, L2), ev(Type.MATCH), ev(Type.MMIO, Flag.MATCHED | L1)] * 50)
    plain, _ = detect(rows)
    late = Detector(jit=True, compile_after=70)
    compiled = []
    for part in np.split(rows, [50, 100]):
        late.feed(columns(part))
        compiled.append(late.compiled)
    assert compiled == [False, True, True]
    assert told(late) == told(plain)


def _blame(e: Any) -> set[str]:  # noqa: ANN401
    """Say, by the plainest means, which rules a fill, an entry held or a match is found by."""
    flags, kind, slot = Flag(int(e["flags"])), e["type"], e["slot"]
    l1 = flags & (Flag.L2 | Flag.LEVEL_KNOWN) == Flag.LEVEL_KNOWN
    l2 = flags & (Flag.L2 | Flag.LEVEL_KNOWN) == Flag.L2 | Flag.LEVEL_KNOWN
    if flags & Flag.UNSTABLE:
        return set()
    memory = slot >= 0 and not flags & Flag.SLOT_INVALID and e["addr"] >= 4096
    memory = memory and e["addr"] >> np.uint64(12) != 0xFEE00
    internal, user = memory and slot in (32764, 32766), memory and slot < 32764
    known = Flag.GEN_KNOWN in flags
    as0, current = known and Flag.GEN_IS_AS0 in flags, known and Flag.GEN_IS_CURRENT in flags
    there = Flag.FILL_AS_KNOWN | Flag.OTHER_AS in flags
    here = Flag.FILL_AS_KNOWN in flags and not there
    wrong = Flag.TWO_AS | Flag.AS_KNOWN in flags and (there or (known and not current))
    smm = Flag.TWO_AS | Flag.SMM_SEEN in flags and not here
    late = known and not as0 and not current
    from_smm = there != (Flag.SMM in flags) and Flag.FILL_AS_KNOWN in flags
    blamed = {
        "internal-slot-fill": kind == Type.FILL and internal and l2 and not late,
        "noslot-from-l1": kind == Type.FILL and internal and l1 and not late,
        "internal-slot-armed": kind == Type.CACHE and internal and l1 and (as0 or current)
        and not from_smm,
        "internal-slot-hit": kind == Type.MATCH and internal and l1 and not from_smm,
        "cache-hits-memory": user and l1 and not wrong and not smm
        and (kind == Type.MATCH or as0 or current),
        "address-space-mixup": kind == Type.MATCH and memory and (wrong or (user and l1 and smm)),
        "address-space-generation": (kind == Type.MATCH and wrong and not memory)
        or (kind == Type.FILL and Flag.TWO_AS | Flag.AS_KNOWN | Flag.SMM in flags
            and as0 and not current)
        or (kind == Type.CACHE and user and l1 and smm and (as0 or current)
            and Flag.SMM not in flags),
    }  # fmt: skip
    return {rule for rule, found in blamed.items() if found}


def _reference(rows: np.ndarray[Any, Any]) -> dict[tuple[int, int, str], int]:
    """Count what is found in streams without pairs or endings."""
    found: dict[tuple[int, int, str], int] = {}
    for e in rows:
        for rule in _blame(e):
            key = int(e["vm"]), int(e["vcpu"]), rule
            found[key] = found.get(key, 0) + 1
    return found


@given(vcpu_streams(), st.integers(0, 2**32 - 1))
def test_counts_agree_with_the_plainest_detector(
    streams: list[list[dict[str, Any]]], seed: int
) -> None:
    rows = stream(interleave(streams, seed))
    single = np.isin(rows["type"], (Type.FILL, Type.CACHE, Type.MATCH))
    rows = rows[single & (rows["site"] != Site.RSVD)]
    _, findings = detect(rows)
    assert {(f.vm, f.vcpu, f.rule.id): f.count for f in findings} == _reference(rows)


@BOTH
def test_evidence_is_bounded_and_counted(compiled: bool) -> None:
    rows = stream([ev(Type.MATCH)] * 1000)
    _, (hit,) = detect(rows, cuts=range(0, 1000, 7), jit=compiled)
    assert (hit.count, hit.evidence_total) == (1000, 1000)
    assert hit.evidence.tobytes() == rows[:EVIDENCE_LIMIT].tobytes()
    assert (hit.first_ts, hit.last_ts) == (rows["ts"][0], rows["ts"][-1])


@BOTH
def test_causes_count_as_evidence(compiled: bool) -> None:
    rows = stream([ev(Type.FILL, L2), ev(Type.MATCH)] * 200)
    _, findings = detect(rows, cuts=[1, 33, 150], jit=compiled)
    (hit,) = [f for f in findings if f.rule.id == "internal-slot-hit"]
    assert hit.evidence.tobytes() == rows[:EVIDENCE_LIMIT].tobytes()
    assert (hit.count, hit.evidence_total) == (200, 400)


@BOTH
def test_64_bit_values_stay_exact(compiled: bool) -> None:
    big = (1 << 63) + (1 << 53) + 1
    fields: dict[str, Any] = {
        "ts": big,
        "gen": big + 1,
        "value": big + 2,
        "addr": big << 1 & (1 << 64) - 1 | 4096,
    }
    rows = stream([ev(Type.FILL, L2, **fields), ev(Type.MATCH, **(fields | {"ts": big + 3}))])
    _, (fill, hit) = detect(rows, jit=compiled)
    assert (fill.first_ts, fill.gpa) == (big, fields["addr"])
    assert int(fill.first["gen"]) == big + 1
    assert (hit.first_ts, hit.cause and hit.cause.age_ns) == (big + 3, 3)
    assert hit.evidence.tobytes() == rows.tobytes()


@BOTH
def test_pages_that_differ_in_one_bit_are_two_pages(compiled: bool) -> None:
    high = 1 << 63
    events = [noslot(addr=high), ev(Type.FILL, L2, addr=high | 4096)]
    _, (fill,) = detect(stream(events), jit=compiled)
    assert fill.count == 2


@BOTH
@pytest.mark.parametrize("form", ["strided", "read-only", "reversed twice", "big batch"])
def test_columns_may_come_in_any_form(form: str, compiled: bool) -> None:
    rows = stream([ev(Type.FILL, L2), ev(Type.MATCH), ev(Type.MMIO, kind=1), kept()] * 5)
    expected, _ = detect(rows)
    cols = {name: rows[name] for name in EVENT.names or ()}
    if form == "read-only":
        cols = columns(rows)
        for column in cols.values():
            column.flags.writeable = False
    elif form == "reversed twice":
        cols = {name: column[::-1].copy()[::-1] for name, column in cols.items()}
    elif form == "big batch":
        cols = {name: np.concatenate([column])[:] for name, column in cols.items()}
    detector = Detector(jit=compiled)
    detector.feed(cols)
    assert told(detector) == told(expected)


@BOTH
def test_many_vcpus(compiled: bool) -> None:
    events = [ev(Type.FILL, L2, vm=vm, vcpu=n) for vm in (1, 2**32 - 1) for n in range(4096)]
    detector, findings = detect(stream(events), cuts=[100, 5000], jit=compiled)
    assert {(f.vm, f.vcpu) for f in findings} == {(e["vm"], e["vcpu"]) for e in events}
    assert detector.tracked == 2 * 4096 + 2
    assert detector.occurrences == len(events)


@BOTH
def test_memory_is_bounded_by_what_lives(compiled: bool) -> None:
    detector = Detector(jit=compiled)
    for vm in range(1, 2000):
        harmless = [ev(Type.MMIO, vm=vm, vcpu=n, addr=RAM_GPA, slot=1, kind=1) for n in range(4)]
        ends = [gone(vm=vm, vcpu=0), vm_gone(vm)]
        detector.feed(columns(stream([*harmless, *ends])))
    assert detector.tracked < 200
    assert detector.findings() == []


def test_findings_outlive_their_vm() -> None:
    detector = Detector()
    detector.feed(columns(stream([ev(Type.MATCH), gone(), vm_gone()])))
    for vm in range(2, 500):
        events = [ev(Type.MMIO, vm=vm, addr=RAM_GPA, slot=1, kind=1), vm_gone(vm)]
        detector.feed(columns(stream(events)))
    (found,) = detector.findings()
    assert (found.vm, found.count) == (1, 1)
    assert detector.tracked < 200


def test_a_vm_that_ends_takes_its_vcpus_memory_along() -> None:
    _, findings = detect(stream([ev(Type.FILL, L2), vm_gone(), ev(Type.MATCH)]))
    assert [f.cause for f in findings] == [None, None]


def test_findings_are_sorted() -> None:
    events = [
        ev(Type.MATCH, vm=2, ts=5),
        ev(Type.MATCH, vm=1, vcpu=3, ts=5),
        ev(Type.MATCH, vm=1, vcpu=1, ts=5),
        ev(Type.MATCH, vm=9, ts=4),
    ]
    _, findings = detect(stream(events))
    assert [(f.first_ts, f.vm, f.vcpu) for f in findings] == [
        (4, 9, 0), (5, 1, 1), (5, 1, 3), (5, 2, 0),
    ]  # fmt: skip


def test_empty_and_uninteresting_batches() -> None:
    detector = Detector()
    detector.feed(columns(np.zeros(0, EVENT)))
    detector.feed(columns(stream([ev(Type.EMULATE), ev(Type.MMIO, slot=-1), ev(Type.SPTE)])))
    assert detector.tracked == 0
    assert detector.findings() == []
    assert detector.acquittals() == []


def test_unknown_types_pass() -> None:
    rows = stream([ev(Type.MATCH), ev(Type.MATCH)])
    rows["type"][1] = 200
    _, (found,) = detect(rows)
    assert found.count == 1


def test_first_proof_is_the_earliest_of_all_vcpus() -> None:
    events = [kept(vcpu=1, ts=50), kept(vcpu=0, ts=40), kept(vcpu=1, ts=60)]
    detector, _ = detect(stream(events))
    (proof,) = detector.acquittals()
    assert (proof.count, int(proof.first["ts"])) == (3, 40)


def test_findings_while_the_stream_goes_on() -> None:
    detector = Detector()
    detector.feed(columns(stream([ev(Type.CACHE, L1 | LIVE)])))
    assert (detector.occurrences, len(detector.findings())) == (1, 1)
    detector.feed(columns(stream([ev(Type.MATCH, addr=0xFFFBC000, slot=SLOT_IDENTITY)])))
    assert (detector.occurrences, len(detector.findings())) == (2, 2)


def test_live_detector_imports_neither_numba_nor_pandas() -> None:
    import subprocess

    code = (
        "import sys, kvmprobe.analysis.detector as d, kvmprobe.analysis.run, "
        "kvmprobe.analysis.document, kvmprobe.analysis.text; d.Detector(); "
        "print([m for m in ('numba', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
