# SPDX-License-Identifier: MIT
"""What is told while a recording runs: a live picture on a terminal, else plain lines."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from kvmprobe.probes.schema import NO_VCPU

if TYPE_CHECKING:
    from rich.live import Live

    from kvmprobe.analysis.findings import Finding
    from kvmprobe.analysis.vms import VmNames
    from kvmprobe.capture.recorder import Recorder
    from kvmprobe.cli.liveview import View

_SECONDS = 0.25
#: Between plain lines that say how it goes.
_PLAIN_SECONDS = 10.0
#: Findings told by a line of their own; the rest is in the capture.
_MAX_LINES = 1000


def on_terminal() -> bool:
    """Whether stderr is a terminal on which a picture can be drawn anew in its place."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class Status:
    """Tells on stderr how a recording goes: VMs, vCPUs, rates, caches and findings as they come."""

    def __init__(self, recorder: Recorder) -> None:
        """Prepare the picture; everything slow is imported here, before probes are awake."""
        self._recorder = recorder
        self._view: View | None = None
        self._live: Live | None = None
        self._shown = time.monotonic()
        self._events = 0
        self._occurrences = 0
        self._told: set[tuple[str, int, int]] = set()
        if on_terminal():
            from rich.console import Console
            from rich.live import Live

            from kvmprobe.cli.liveview import View

            self._view = View()
            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> Status:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
        else:
            self._tell_findings()

    def show(self) -> None:
        """Take in the last drain's events; bring the picture up to date four times a second."""
        rows = self._recorder.rows
        if self._view is not None and len(rows):
            self._view.feed(rows)
        now = time.monotonic()
        since = now - self._shown
        if self._live is None or self._view is None:
            self._tell_findings()
            if since >= _PLAIN_SECONDS:
                print(self._head(since), file=sys.stderr, flush=True)
                self._shown = now
        elif since >= _SECONDS:
            from kvmprobe.cli.liveview import counts, told

            height = self._live.console.size.height
            head = [counts(self._head(since))]
            findings = self._recorder.judge.findings()
            names = self._view.names
            picture = self._view.picture(
                head, findings, lambda finding: told(finding, names), since, height
            )
            self._live.update(picture, refresh=True)
            self._shown = now

    def _head(self, since: float) -> str:
        """One line on the whole recording; the rate is that of the last `since` seconds."""
        progress = self._recorder.progress
        rate = (progress.events - self._events) / since
        self._events = progress.events
        return (
            f"{progress.seconds:.0f} s  {progress.events:,} events  {rate:,.0f}/s  "
            f"{progress.vcpus} vCPUs  {progress.bytes / 1e6:.1f} MB  "
            f"{progress.lost:,} lost  {self._recorder.judge.occurrences:,} findings"
        )

    def _tell_findings(self) -> None:
        """Print a line for each finding that is new."""
        judge = self._recorder.judge
        if judge.occurrences == self._occurrences or len(self._told) >= _MAX_LINES:
            return
        self._occurrences = judge.occurrences
        for finding in judge.findings():
            key = finding.rule.id, finding.vm, finding.vcpu
            if key not in self._told:
                self._told.add(key)
                line = finding_line(finding, judge.names)
                at = self._recorder.progress.seconds
                print(f"{at:.1f} s: {line}", file=sys.stderr, flush=True)


def finding_line(finding: Finding, names: VmNames) -> str:
    """Say in one line what was found, and where."""
    from kvmprobe.analysis.text import slot_name

    vm = names.get(finding.vm)
    where = f"VM {vm.id}{f' ({vm.name})' if vm.name else ''}"
    if finding.vcpu != NO_VCPU:
        where += f", vCPU {finding.vcpu}"
    if finding.has_gpa:
        where += f", 0x{finding.gpa:x} ({slot_name(finding.slot)})"
    times = f", {finding.count:,} times" if finding.count > 1 else ""
    return f"{finding.rule.severity} {finding.rule.id}: {where}{times}"
