# SPDX-License-Identifier: MIT
"""What a finding rests on, written out as a capture: the ticket's evidence."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.probes.schema import EVENT, NO_VCPU
from kvmprobe.store.writer import CaptureWriter

DIRECTORY = "evidence"
#: Events that came last, kept for the evidence: 1.8 MB.
RECENT_EVENTS = 1 << 15


class Recent:
    """The last `RECENT_EVENTS` events, in memory that is there from the beginning."""

    def __init__(self) -> None:
        """Keep none yet."""
        self._rows = np.zeros(RECENT_EVENTS, EVENT)
        self._taken = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Keep these events, dtype EVENT, in the place of the oldest."""
        rows = rows[-RECENT_EVENTS:]
        at = np.arange(self._taken, self._taken + len(rows)) % RECENT_EVENTS
        self._rows[at] = rows
        self._taken += len(rows)

    def of(self, vm: int) -> NDArray[Any]:
        """The kept events of a VM, oldest first."""
        start = self._taken % RECENT_EVENTS if self._taken > RECENT_EVENTS else 0
        rows = np.roll(self._rows, -start)[: min(self._taken, RECENT_EVENTS)]
        own: NDArray[Any] = rows[rows["vm"] == vm]
        return own


def gather(*parts: NDArray[Any]) -> NDArray[Any]:
    """Join events of one VM, dtype EVENT, in the order of time: each once, from its first part.

    The parts may number a vCPU's events differently (the flight recorder counts its own), so they
    are numbered anew, from 1: that 0 is missing says that something before is not there.
    """
    rows = np.concatenate([np.zeros(0, EVENT), *parts])
    same = np.empty(len(rows), [(name, rows.dtype[name]) for name in _SAME])
    for name in _SAME:
        same[name] = rows[name]
    _, first = np.unique(same, return_index=True)
    rows = rows[np.sort(first)]
    rows = rows[np.argsort(rows["ts"], kind="stable")]
    for vcpu in np.unique(rows["vcpu"][rows["vcpu"] != NO_VCPU]):
        own = rows["vcpu"] == vcpu
        rows["seq"][own] = np.arange(1, np.count_nonzero(own) + 1)
    return rows


#: What tells an event: a vCPU's have different times.
_SAME = ("vm", "vcpu", "ts", "type", "kind", "site", "addr", "len")


class Evidence:
    """The directory of captures: `ID.kvmprobe`, at most so many."""

    def __init__(self, state_directory: Path) -> None:
        """Keep them in `state_directory`/evidence, which is made when it is needed."""
        self._directory = state_directory / DIRECTORY

    def write(
        self,
        name: str,
        header: Mapping[str, Any],
        rows: NDArray[Any],
        keep: Collection[str],
        files: int,
    ) -> Path | None:
        """Write a capture and return its path.

        `files` is how many there may be: the oldest of findings not in `keep` make room, and when
        all are in it, nothing is written and None returned.  Raises CaptureError or OSError.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        path = self._directory / f"{name}.kvmprobe"
        there = sorted(self._directory.glob("*.kvmprobe"), key=lambda p: p.stat().st_mtime_ns)
        there = [other for other in there if other != path]
        free = [other for other in there if other.stem not in keep]
        surplus = len(there) + 1 - files
        if surplus > len(free):
            return None
        for other in free[: max(0, surplus)]:
            other.unlink()
        # A watch that is killed leaves no half of one: what it was writing is written over.
        made = self._directory / ".being-written.tmp"
        try:
            with CaptureWriter(made, header, force=True) as writer:
                writer.write(rows)
            made.replace(path)
        except (CaptureError, OSError):
            with contextlib.suppress(OSError):
                made.unlink()
            raise
        return path
