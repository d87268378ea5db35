# SPDX-License-Identifier: MIT
"""Captures to be exported: what tests of `kvmprobe export` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.analysis.run import Analysis, analyze
from kvmprobe.probes.schema import EVENT, Type, rows
from kvmprobe.store.format import new_header
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter

START = 7_000_000_000_000


def header() -> dict[str, Any]:
    """A header of a live capture with a clock."""
    made = new_header("live")
    made["started"] = "2026-11-22T17:00:00Z"
    made["clock"] = {"monotonic_ns": START, "wall_ns": 1_795_366_800_000_000_000}
    return made


def write(path: Path, *batches: NDArray[Any], **parts: Any) -> Path:  # noqa: ANN401
    """A capture of these batches; `parts` replace parts of its header."""
    with CaptureWriter(path, header() | parts) as writer:
        for batch in batches:
            writer.write(batch)
    return path


def events_of(path: Path) -> NDArray[Any]:
    """All events of a capture, dtype EVENT."""
    with CaptureReader(path) as reader:
        return np.concatenate([np.empty(0, EVENT), *(rows(b) for b in reader.batches())])


def header_of(path: Path) -> dict[str, Any]:
    """A capture's header."""
    with CaptureReader(path) as reader:
        return reader.header


def analysis_of(path: Path) -> Analysis:
    """What a capture's events show."""
    with CaptureReader(path) as reader:
        return analyze([reader], jit=False)


def told(path: Path) -> tuple[Any, ...]:
    """Findings and verdicts but for what anonymizing replaces: names, offsets in a page, gva."""
    analysis = analysis_of(path)
    kept = [name for name in EVENT.names or () if name not in ("ts", "addr", "value")]
    findings = [
        (
            f.rule.id, f.vm, f.vcpu, c.since_start(f.first_ts), c.since_start(f.last_ts), f.count,
            f.gpa >> 12 if f.rule.watches[0].name != "FAULT" else None, f.slot, f.slot_confidence,
            f.level, f.evidence_total, f.evidence[kept].tolist(),
            f.cause and (f.cause.rule, f.cause.age_ns, f.cause.count),
        )
        for c, f in analysis.findings
    ]  # fmt: skip
    return findings, analysis.verdicts, analysis.verdict, analysis.events, analysis.lost


@st.composite
def any_events(draw: st.DrawFn) -> NDArray[Any]:
    """Rows of random bytes whose types are known ones."""
    count = draw(st.integers(1, 40))
    data = draw(st.binary(min_size=count * EVENT.itemsize, max_size=count * EVENT.itemsize))
    events = np.frombuffer(data, EVENT).copy()
    events["type"] = events["type"] % len(Type) + 1
    for name in ("ts", "addr", "value", "aux", "seq"):
        if draw(st.booleans()):
            top = int(np.iinfo(EVENT[name]).max)
            edges = [e for e in (0, 9, 10, 9999, 10000, 10**8, 0xFFFF, 1 << 16, top) if e <= top]
            events[name] = draw(st.lists(st.sampled_from(edges), min_size=count, max_size=count))
    return events
