# SPDX-License-Identifier: MIT
"""One pass over a capture: the analysis, and what the page draws, from the same batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmprobe.analysis.run import Analysis, CaptureAnalysis, Reader, analyze
from kvmprobe.probes.schema import Columns
from kvmprobe.report.lanes import Lanes
from kvmprobe.report.memory import Memory
from kvmprobe.report.rates import Rates


@dataclass
class Gathered:
    """What one pass over a capture gave; memory is bounded, whatever the capture's size."""

    analysis: Analysis
    lanes: Lanes
    rates: Rates
    memory: Memory

    @property
    def capture(self) -> CaptureAnalysis:
        """The one capture's part of the analysis."""
        return self.analysis.captures[0]


@dataclass
class _Tap:
    """A reader that shows each batch to the page's parts before the analysis gets it."""

    reader: Reader
    lanes: Lanes = field(default_factory=Lanes)
    rates: Rates = field(default_factory=Rates)
    memory: Memory = field(default_factory=Memory)

    @property
    def path(self) -> Any:  # noqa: ANN401 - as in Reader
        return self.reader.path

    @property
    def header(self) -> Mapping[str, Any]:
        return self.reader.header

    @property
    def truncated(self) -> str | None:
        return self.reader.truncated

    @property
    def damaged(self) -> Sequence[object]:
        return self.reader.damaged

    @property
    def unknown_events(self) -> Mapping[int, int]:
        return self.reader.unknown_events

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Columns]:
        for batch in self.reader.batches(columns):
            self.lanes.feed(batch)
            self.rates.feed(batch)
            self.memory.feed(batch)
            yield batch


def gather(reader: Reader) -> Gathered:
    """Read a capture once; raises CaptureError when it can't be read on."""
    tap = _Tap(reader)
    analysis = analyze([tap])
    return Gathered(analysis, tap.lanes, tap.rates, tap.memory)
