# SPDX-License-Identifier: MIT
"""What is told while a recording runs: a live picture on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

    from kvmprobe.capture.recorder import Recorder

_SECONDS = 0.25
#: Between plain lines that say how it goes.
_PLAIN_SECONDS = 10.0
#: Findings told by a line of their own; the rest is in the capture.
_MAX_LINES = 1000


class Status:
    """Tells on stderr how a recording goes: VMs, vCPUs, rates, caches and findings as they come."""

    def __init__(self, recorder: Recorder) -> None:
        """Prepare the picture; everything slow is imported here, before probes are awake."""
        from kvmprobe.cli.liveview import View

        self._recorder = recorder
        self._view = View()
        self._live: Live | None = None
        self._shown = time.monotonic()
        self._events = 0
        self._occurrences = 0
        self._told: set[tuple[str, int, int]] = set()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

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
        if len(rows):
            self._view.feed(rows)
        now = time.monotonic()
        since = now - self._shown
        if self._live is None:
            self._tell_findings()
            if since >= _PLAIN_SECONDS:
                print(self._head(since), file=sys.stderr, flush=True)
                self._shown = now
        elif since >= _SECONDS:
            height = self._live.console.size.height
            findings = self._recorder.judge.findings()
            picture = self._view.picture(self._head(since), findings, since, height)
            self._live.update(picture, refresh=True)
            self._shown = now

    def _head(self, since: float) -> Text:
        """One line on the whole recording; the rate is that of the last `since` seconds."""
        from rich.text import Text

        progress = self._recorder.progress
        rate = (progress.events - self._events) / since
        self._events = progress.events
        line = Text(
            f"{progress.seconds:.0f} s  {progress.events:,} events  {rate:,.0f}/s  "
            f"{progress.vcpus} vCPUs  {progress.bytes / 1e6:.1f} MB  ",
            no_wrap=True,
            overflow="ellipsis",
        )
        line.append(f"{progress.lost:,} lost", style="red" if progress.lost else "")
        found = self._recorder.judge.occurrences
        line.append(f"  {found:,} findings", style="bold red" if found else "")
        return line

    def _tell_findings(self) -> None:
        """Print a line for each finding that is new."""
        from kvmprobe.cli.liveview import finding_line

        judge = self._recorder.judge
        if judge.occurrences == self._occurrences or len(self._told) >= _MAX_LINES:
            return
        self._occurrences = judge.occurrences
        for finding in judge.findings():
            key = finding.rule.id, finding.vm, finding.vcpu
            if key not in self._told:
                self._told.add(key)
                line = finding_line(finding, self._view.names)
                at = self._recorder.progress.seconds
                print(f"{at:.1f} s: {line}", file=sys.stderr, flush=True)
