# SPDX-License-Identifier: MIT
"""Recording: drain, write, detect, until something says stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.judge import Judge
from kvmprobe.capture.backlog import Backlog
from kvmprobe.capture.header import live_header
from kvmprobe.capture.session import MAX_TICK, Filters, Session
from kvmprobe.probes.schema import EVENT, LifecycleChange, Type, columns
from kvmprobe.store.writer import CaptureWriter

#: Default of --max-size, bytes.
MAX_SIZE = 2 << 30
_DISK_CHECK_SECONDS = 0.5
_VM_SEEN = int(LifecycleChange.VM_SEEN)
_VCPU_SEEN = int(LifecycleChange.VCPU_SEEN)


@dataclass(frozen=True)
class Limits:
    """When a recording ends by itself.

    `duration`: seconds.  `max_size`: bytes of the capture.  `min_free`: bytes that must stay free
    on its file system; None: the larger of 1 GiB and 5 %.
    """

    duration: float | None = None
    max_size: int = MAX_SIZE
    min_free: int | None = None


@dataclass
class Progress:
    """A recording so far: events stored, records lost, seconds, bytes, and who was seen."""

    events: int = 0
    lost: int = 0
    seconds: float = 0.0
    bytes: int = 0
    vms: int = 0
    vcpus: int = 0


class Recorder:
    """Writes a session's events to a capture while the judge watches."""

    def __init__(self, session: Session, writer: CaptureWriter, limits: Limits) -> None:
        """Connect an attached session with a fresh writer."""
        self._session = session
        self._writer = writer
        self._backlog = Backlog(writer)
        self._limits = limits
        self._directory = Path(writer.path).absolute().parent
        self._disk_checked = 0.0
        self._started: float | None = None
        self.judge = Judge(session.plan.rows(), from_first=True)
        self.progress = Progress()
        #: What the last drain gave, dtype `EVENT`.
        self.rows: NDArray[Any] = np.empty(0, EVENT)

    def start(self) -> None:
        """Wake the probes."""
        self._started = time.monotonic()
        self._session.start()

    def run(
        self,
        stopped: Callable[[], str | None],
        show: Callable[[], None] = lambda: None,
    ) -> str:
        """Record, once started, until a limit or `stopped` gives a reason, and return that.

        `stopped` and `show` are called once a drain.  The session is stopped in any case.  Raises
        CaptureError when the capture can't be written; what was written stays readable.
        """
        if self._started is None:
            raise RuntimeError("the recorder is not started")
        started = self._started
        reason = None
        with self._backlog:
            try:
                while reason is None:
                    time.sleep(self._session.tick)
                    self._take(self._session.drain())
                    self.progress.seconds = time.monotonic() - started
                    reason = stopped() or self._limit()
                    show()
            finally:
                rest = self._session.stop()
            self._take(rest)
            self.progress.seconds = time.monotonic() - started
        self.progress.bytes = self._writer.bytes_written
        return reason

    def _take(self, rows: NDArray[Any]) -> None:
        self.rows = rows
        progress = self.progress
        if len(rows):
            rows = self.rows = self._backlog.put(rows)
            losses = rows[rows["type"] == Type.LOSS]
            progress.lost += int(losses["addr"].sum())
            progress.events += len(rows) - len(losses)
            seen = rows[rows["type"] == Type.LIFECYCLE]["kind"]
            progress.vms += int(np.count_nonzero(seen == _VM_SEEN))
            progress.vcpus += int(np.count_nonzero(seen == _VCPU_SEEN))
            self.judge.feed(columns(rows))
        progress.bytes = self._writer.bytes_written

    def _limit(self) -> str | None:
        limits, progress = self._limits, self.progress
        if limits.duration is not None and progress.seconds >= limits.duration:
            return "duration"
        if progress.bytes >= limits.max_size:
            return f"--max-size reached ({limits.max_size} bytes)"
        if progress.seconds - self._disk_checked >= _DISK_CHECK_SECONDS:
            self._disk_checked = progress.seconds
            return free_space_problem(self._directory, limits.min_free)
        return None


def free_space_problem(directory: Path, min_free: int | None) -> str | None:
    """Why there is too little room on the file system of `directory`, or None."""
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    wanted = max(1 << 30, disk.f_blocks * disk.f_frsize // 20) if min_free is None else min_free
    if free >= wanted:
        return None
    return f"--min-free reached ({free} of {wanted} bytes are free)"


def live_batches(
    duration: float | None = None, pid: int | None = None
) -> Iterator[tuple[dict[str, Any], NDArray[Any]]]:
    """Record this host without a file: yield (header, events of dtype `EVENT`) once a drain.

    The header is the same object each time.  Ends after `duration` seconds, or when the caller
    stops iterating.  Raises HostError where this host can't be recorded.
    """
    with Session(Filters(pid=pid)) as session:
        session.prepare()
        session.attach()
        header = live_header(session, [])
        end = None if duration is None else time.monotonic() + duration
        session.start()
        while end is None or time.monotonic() < end:
            time.sleep(min(session.tick, MAX_TICK))
            rows = session.drain()
            if len(rows):
                yield header, rows
        rest = session.stop()
        if len(rest):
            yield header, rest
