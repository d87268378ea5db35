# SPDX-License-Identifier: MIT
"""Two real traces, one of a kernel with the fault and one of a kernel without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvmprobe.analysis.run import CaptureAnalysis, analyze
from kvmprobe.formats.detect import open_trace
from kvmprobe.probes.schema import Flag, Type, rows
from kvmprobe.store.reader import CaptureReader
from tests.traces import GOLDEN, translated

CAPTURES = ("intel-6.1-tss", "intel-6.12-tss")


def convert(name: str) -> NDArray[Any]:
    """The events of the ftrace text that a golden capture was made from."""
    source = open_trace(GOLDEN / f"{name}.ftrace.txt.xz")
    with source.file:
        return translated(source)[0]


def _analysis(name: str) -> CaptureAnalysis:
    with CaptureReader(GOLDEN / f"{name}.kvmprobe") as reader:
        (capture,) = analyze([reader], jit=False).captures
    return capture


@pytest.mark.parametrize("name", CAPTURES)
def test_capture_is_what_its_source_gives(name: str) -> None:
    converted = convert(name)
    with CaptureReader(GOLDEN / f"{name}.kvmprobe") as reader:
        stored = np.concatenate([rows(batch) for batch in reader.batches()])
        assert (reader.truncated, reader.damaged, reader.unknown_events) == (None, [], {})
        assert stored.tobytes() == converted.tobytes()


def test_vulnerable_kernel() -> None:
    capture = _analysis("intel-6.1-tss")
    fill, hit = capture.findings
    assert (fill.rule.id, fill.level, fill.count) == ("internal-slot-fill", "L2", 1)
    assert (hit.rule.id, hit.level, hit.count) == ("internal-slot-hit", "L1", 1)
    for finding in capture.findings:
        assert (finding.gpa, finding.slot, finding.vcpu) == (0xFFFBD000, 32764, 0)
        assert finding.slot_confidence == "presumed"
    assert [Type(e["type"]).name for e in fill.evidence] == ["FAULTIN", "FILL"]
    assert [Type(e["type"]).name for e in hit.evidence] == ["FILL", "MATCH", "MMIO"]
    mmio = hit.evidence[2]
    assert Flag(int(mmio["flags"])) & (Flag.TO_USERSPACE | Flag.MATCHED)
    assert (int(mmio["len"]), int(mmio["value"])) == (1, 6)
    assert hit.cause is not None
    assert (hit.cause.count, hit.cause.age_ns) == (1, 298_000)
    assert capture.verdicts["internal-slot"].verdict == "vulnerable"
    assert (capture.names.get(1).name, capture.names.get(1).pid) == ("psl2", 121)


def test_fixed_kernel() -> None:
    capture = _analysis("intel-6.12-tss")
    assert capture.findings == ()
    verdict = capture.verdicts["internal-slot"]
    assert (verdict.verdict, verdict.missing) == ("fixed", ())


@pytest.mark.parametrize("name", CAPTURES)
def test_memory_of_the_guest_is_not_judged_without_memslots(name: str) -> None:
    verdict = _analysis(name).verdicts["cache-hits-memory"]
    assert verdict.verdict == "inconclusive"
    assert verdict.missing == ("not observed: CACHE (cache-hits-memory)",)


@pytest.mark.parametrize("name", CAPTURES)
def test_what_the_trace_does_not_tell_stays_unknown(name: str) -> None:
    events = convert(name)
    nested = np.flatnonzero(events["type"] == Type.NESTING)[0]
    known = (events["flags"] & Flag.LEVEL_KNOWN) != 0
    assert not known[:nested].any()
    assert known[nested:].all()
    assert not (events["flags"] & (Flag.GEN_KNOWN | Flag.SLOT_KNOWN | Flag.AS_KNOWN)).any()
    memory = np.isin(events["type"], (Type.FAULTIN, Type.FILL, Type.MATCH, Type.MMIO))
    slots = memory & (events["slot"] >= 0)
    assert ((events["flags"][slots] & Flag.SLOT_PRESUMED) != 0).all()
    assert set(events["slot"][slots].tolist()) == {32764}
