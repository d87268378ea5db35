# SPDX-License-Identifier: MIT
"""The way from the drain to the capture: a thread writes, and a disk that stalls blocks nobody."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.probes.schema import EVENT, NO_VCPU, Flag, LossCause, Site, Type
from kvmprobe.store.format import MAX_ROWS
from kvmprobe.store.writer import CaptureWriter

#: Bytes of events that wait for the disk at most: a second at 4 M events a second.
MAX_BYTES = 256 << 20
#: So many more for candidates: what verdicts turn on is lost last.
_MAX_DECISIVE_BYTES = 16 << 20
_NO_CPU = 0xFFFFFFFF


class Backlog:
    """Events on their way to a capture, in bounded memory.  One thread puts, its own one writes."""

    def __init__(self, writer: CaptureWriter) -> None:
        """Begin to write what `put` brings."""
        self._writer = writer
        self._changed = threading.Condition()
        self._waiting: deque[NDArray[Any]] = deque()
        self._bytes = 0
        self._ended = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(CaptureError):
                self.close()

    def put(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Queue events, dtype `EVENT`, without waiting for the disk.

        Returns:
            What the capture will hold of them: all, or with a full queue the candidates, and LOSS
            events for the rest.

        Raises:
            CaptureError: an earlier batch could not be written.

        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            room = MAX_BYTES - self._bytes
            if rows.nbytes > room:
                rows = _thin_out(rows, decisive=rows.nbytes <= room + _MAX_DECISIVE_BYTES)
            if len(rows):
                self._waiting.append(rows)
                self._bytes += rows.nbytes
                self._changed.notify()
        return rows

    def close(self) -> None:
        """Wait until everything is written.  Raises CaptureError when that can't be done."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _write(self) -> None:
        try:
            while len(rows := self._next()):
                self._writer.write(rows)
                with self._changed:
                    self._bytes -= rows.nbytes
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._waiting.clear()

    def _next(self) -> NDArray[Any]:
        """As many waiting events as one batch of the capture holds; none: that was all."""
        with self._changed:
            while not self._waiting and not self._ended:
                self._changed.wait()
            taken: list[NDArray[Any]] = [np.zeros(0, EVENT)]
            count = 0
            while self._waiting and (not count or count + len(self._waiting[0]) <= MAX_ROWS):
                taken.append(self._waiting.popleft())
                count += len(taken[-1])
        return np.concatenate(taken)


def _thin_out(rows: NDArray[Any], *, decisive: bool) -> NDArray[Any]:
    """LOSS events, perhaps the candidates, and LOSS events for the others by VM and observation."""
    keep = rows["type"] == Type.LOSS
    if decisive:
        keep |= (rows["flags"] & Flag.CANDIDATE) != 0
    lost = rows[~keep]
    what, counts = np.unique(lost[["vm", "type"]], return_counts=True)
    losses = np.zeros(len(what), EVENT)
    losses["ts"] = time.monotonic_ns()
    losses["vm"] = what["vm"]
    losses["vcpu"] = NO_VCPU
    losses["type"] = Type.LOSS
    losses["site"] = Site.DRAIN
    losses["flags"] = Flag.CANDIDATE
    losses["addr"] = counts
    losses["aux"] = _NO_CPU
    losses["slot"] = -1
    losses["kind"] = what["type"]
    losses["len"] = LossCause.WRITER
    return np.concatenate([rows[keep], losses])
