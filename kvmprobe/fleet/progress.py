# SPDX-License-Identifier: MIT
"""How far a run is, and an estimate that says what it rests on."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from typing import Self

from kvmprobe.analysis.vms import printable

#: Before so much is done there is no estimate: share of the bytes, and hosts.
_SHARE, _HOSTS = 0.02, 3
#: Seconds between two lines, on a terminal and elsewhere.
_TERMINAL, _ELSEWHERE = 0.2, 30.0
#: What "lately" is, s.
_LATELY = 60.0


class Estimate:
    """What is left, by bytes: by the mean pace and by the pace of the last minute."""

    def __init__(self, total: int, hosts: int, now: float) -> None:
        """Begin at `now`, s, with `total` bytes of `hosts` hosts to do."""
        self.total, self.hosts, self.began = total, hosts, now
        self.done = self.hosts_done = 0
        self._marks: deque[tuple[float, int]] = deque([(now, 0)])

    def add(self, size: int, now: float) -> None:
        """A host of so many bytes is done."""
        self.done += size
        self.hosts_done += 1
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] < now - _LATELY:
            self._marks.popleft()

    def left(self, now: float) -> tuple[float, float] | None:
        """Return the shorter and the longer estimate of the seconds left; None: too early."""
        enough = self.done >= self.total * _SHARE and self.hosts_done >= min(_HOSTS, self.hosts)
        if not enough or now <= self.began:
            return None
        left = self.total - self.done
        mean = left * (now - self.began) / max(self.done, 1)
        since, before = self._marks[0]
        lately = left * (now - since) / max(self.done - before, 1)
        return min(mean, lately), max(mean, lately)

    def text(self, now: float) -> str:
        """Say how far it is, in one line."""
        share = f"{self.done / self.total:.0%}" if self.total else "100%"
        text = f"{self.hosts_done:,} of {self.hosts:,} hosts, {share} of the bytes"
        left = self.left(now)
        if self.hosts_done == self.hosts:
            return text
        if left is None:
            return f"{text}, time left not known yet"
        low, high = (spoken(seconds) for seconds in left)
        return f"{text}, about {low if low == high else f'{low} to {high}'} left"


def spoken(seconds: float) -> str:
    """Say a time as coarsely as it is known."""
    if seconds < 100:
        return f"{max(round(seconds / 5) * 5, 5)} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


class Progress:
    """Shows an estimate on stderr: a context."""

    def __init__(self, total: int, hosts: int) -> None:
        """Begin now."""
        self.estimate = Estimate(total, hosts, time.monotonic())
        self._terminal = sys.stderr.isatty()
        self._shown = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def done(self, size: int) -> None:
        """One more host is done."""
        now = time.monotonic()
        self.estimate.add(size, now)
        if now - self._shown < (_TERMINAL if self._terminal else _ELSEWHERE):
            return
        self._shown = now
        text = self.estimate.text(now)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """Print a line of its own on stderr."""
    print(f"kvmprobe: {printable(line)}", file=sys.stderr, flush=True)
