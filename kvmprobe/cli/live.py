# SPDX-License-Identifier: MIT
"""What a terminal shows while a recording runs."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.live import Live

    from kvmprobe.capture.recorder import Recorder

_SECONDS = 0.25


class Status:
    """One line that is kept up to date on stderr, if that is a terminal; else nothing."""

    def __init__(self, recorder: Recorder) -> None:
        """Prepare the line; everything slow is imported here, before probes are awake."""
        self._recorder = recorder
        self._live: Live | None = None
        self._shown = 0.0
        self._events = 0
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> Status:
        if self._live is not None:
            self._live.__enter__()
            self.show()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)

    def show(self) -> None:
        """Bring the line up to date, at most four times a second."""
        if self._live is None or time.monotonic() - self._shown < _SECONDS:
            return
        from rich.text import Text

        now = time.monotonic()
        progress = self._recorder.progress
        rate = (progress.events - self._events) / max(now - self._shown, _SECONDS)
        self._shown, self._events = now, progress.events
        line = Text(
            f"{progress.seconds:.0f} s  {progress.events:,} events  {rate:,.0f}/s  "
            f"{progress.vcpus} vCPUs  {progress.bytes / 1e6:.1f} MB  "
        )
        line.append(f"{progress.lost:,} lost", style="red" if progress.lost else "")
        line.append("  ")
        found = self._recorder.judge.occurrences
        line.append(f"{found:,} findings", style="bold red" if found else "")
        self._live.update(line, refresh=True)
