# SPDX-License-Identifier: MIT
"""From captures to an analysis: the one call behind the command and the Python API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kvmprobe.analysis.findings import Finding
from kvmprobe.analysis.integrity import Integrity
from kvmprobe.analysis.judge import COLUMNS, Judge, Reading, Report, VmReport, further
from kvmprobe.analysis.verdict import Coverage, Verdict, merge, worst
from kvmprobe.analysis.vms import VmNames
from kvmprobe.probes.schema import Columns

if TYPE_CHECKING:
    import pandas as pd


class Reader(Protocol):
    """What an analysis needs of a capture; `kvmprobe.store.reader.CaptureReader` is one.

    After `batches` came to its end, `truncated` says why the capture ends early (None: it doesn't),
    `damaged` lists what was refused, and `unknown_events` counts events by unknown type.
    """

    @property
    def path(self) -> Any:  # noqa: ANN401 - anything with a text form
        """Where the capture is."""

    @property
    def header(self) -> Mapping[str, Any]:
        """The capture's header."""

    @property
    def truncated(self) -> str | None:
        """Why the capture ends early."""

    @property
    def damaged(self) -> Sequence[object]:
        """Parts that were refused."""

    @property
    def unknown_events(self) -> Mapping[int, int]:
        """Events of types this version doesn't know."""

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Columns]:
        """The events."""


@runtime_checkable
class Screening(Protocol):
    """What a reader may have beside: it leaves unread what the analysis doesn't need."""

    def screened(
        self, columns: Sequence[str], further: Callable[[Columns], Sequence[str]]
    ) -> Iterator[Columns]:
        """The events: these columns, and others when asked for; `further` says what will be."""


@dataclass(frozen=True, eq=False)
class CaptureAnalysis:
    """What one capture says."""

    path: str
    header: Mapping[str, Any]
    integrity: Integrity
    names: VmNames
    report: Report

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found, sorted by (first time, vm, vcpu, seq)."""
        return self.report.findings

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """The verdict on each fault."""
        return self.report.verdicts

    @property
    def vms(self) -> Mapping[int, VmReport]:
        """What is to be said of each VM, by its number."""
        return self.report.vms

    @property
    def coverage(self) -> Coverage:
        """What the capture could have shown."""
        return self.report.coverage

    def since_start(self, ts: int) -> int:
        """Turn an event's time into ns since the capture's `started`.

        A capture that doesn't know its clock is told in the clock's own time.
        """
        return ts - int(self.header["clock"]["monotonic_ns"] or 0)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What all captures together say; findings keep to their captures, in order."""

    captures: tuple[CaptureAnalysis, ...]

    @property
    def findings(self) -> list[tuple[CaptureAnalysis, Finding]]:
        """Every finding with its capture."""
        return [(capture, finding) for capture in self.captures for finding in capture.findings]

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """The worst verdict on each fault."""
        return merge([capture.verdicts for capture in self.captures])

    @property
    def verdict(self) -> str:
        """The worst verdict of all."""
        return worst(v.verdict for v in self.verdicts.values())

    @property
    def events(self) -> int:
        """Events analysed."""
        return sum(capture.integrity.total for capture in self.captures)

    @property
    def observations(self) -> Counter[int]:
        """Events analysed, by type."""
        counts: Counter[int] = Counter()
        for capture in self.captures:
            counts.update(capture.integrity.events)
        return counts

    @property
    def lost(self) -> int:
        """Records known to be lost."""
        return sum(capture.integrity.lost_total for capture in self.captures)

    def __repr__(self) -> str:
        return f"<kvmprobe analysis: {self.verdict}, {len(self.findings)} finding(s)>"

    def _repr_html_(self) -> str:
        from kvmprobe.analysis.html import analysis_html

        return analysis_html(self)

    def to_document(self) -> dict[str, Any]:
        """Return the public JSON document, schema kvmprobe.analysis/1."""
        from kvmprobe.analysis.document import document

        return document(self)

    def to_frame(self) -> pd.DataFrame:
        """Return the findings as a DataFrame, one row each, without their evidence."""
        from kvmprobe.analysis.frame import findings_frame

        return findings_frame(self)


def analyze(readers: Iterable[Reader], *, jit: bool = True) -> Analysis:
    """Analyse captures, each by itself, one after the other, in constant memory.

    Args:
        readers: opened captures.
        jit: compile the detector for large captures, where numba is installed.

    Raises:
        CaptureError: a capture can't be read on.

    """
    return Analysis(tuple(_analyze(reader, jit=jit) for reader in readers))


def _analyze(reader: Reader, *, jit: bool) -> CaptureAnalysis:
    header = reader.header
    judge = Judge(header["plan"], jit=jit)
    batches = (
        reader.screened(COLUMNS, further) if isinstance(reader, Screening) else reader.batches()
    )
    for columns in batches:
        judge.feed(columns)
    reading = Reading(
        damaged=len(reader.damaged),
        unknown=sum(reader.unknown_events.values()),
        truncated=reader.truncated,
    )
    return CaptureAnalysis(
        path=str(reader.path),
        header=header,
        integrity=judge.integrity,
        names=judge.names,
        report=judge.report(reading),
    )
