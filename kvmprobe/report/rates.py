# SPDX-License-Identifier: MIT
"""How many events of each type, and how many lost records, there were over time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import Columns, Type

#: Bins over a capture: between half of it and all of it are used.
MAX_BINS = 1024
_TYPES = 1 + max(Type)


class Rates:
    """Counts events and losses in bins of 2**shift ns, at most `MAX_BINS` of them."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.shift = 0
        self._first = 0
        self._last = -1
        # By type, and in row 0 the lost records; column 0 is the bin of `_base`.
        self._counts = np.zeros((_TYPES, MAX_BINS), np.uint64)
        self._base = 0

    @property
    def seen(self) -> bool:
        """Whether there was an event at all."""
        return self._last >= 0

    @property
    def first_ts(self) -> int:
        """The first event's time, ns."""
        return self._first

    @property
    def last_ts(self) -> int:
        """The last event's time, ns."""
        return max(self._last, self._first)

    @property
    def first_bin(self) -> int:
        """The number of the first bin, counted from the clock's zero."""
        return self._base

    def feed(self, columns: Columns) -> None:
        """Take in one batch with `ts`, `type` and `addr`."""
        ts, kinds = columns["ts"], columns["type"]
        if not len(ts):
            return
        self._cover(int(ts.min()), int(ts.max()))
        local = ((ts >> np.uint64(self.shift)) - np.uint64(self._base)).astype(np.int64)
        counts = np.bincount(kinds * np.int64(MAX_BINS) + local, minlength=_TYPES * MAX_BINS)
        self._counts += counts.reshape(_TYPES, MAX_BINS).astype(np.uint64)
        lost = kinds == Type.LOSS
        if lost.any():
            np.add.at(self._counts[0], local[lost], columns["addr"][lost])

    def counts(self) -> dict[Type, NDArray[np.uint64]]:
        """Events in each bin, by type; LOSS counts records, not events."""
        size = (self.last_ts >> self.shift) - self._base + 1 if self.seen else 0
        return {kind: self._counts[0 if kind == Type.LOSS else kind, :size] for kind in Type}

    def _cover(self, low: int, high: int) -> None:
        """Make the bins reach from `low` to `high`, ns, and over what was seen before."""
        old_base, old_shift, seen = self._base, self.shift, self.seen
        self._first = min(self._first, low) if seen else low
        self._last = max(self._last, high)
        while (self._last >> self.shift) - (self._first >> self.shift) >= MAX_BINS:
            self.shift += 1
        self._base = self._first >> self.shift
        if not seen or (self._base, self.shift) == (old_base, old_shift):
            return
        old = self._counts
        used = np.flatnonzero(old.any(axis=0))
        now = [(old_base + at >> self.shift - old_shift) - self._base for at in used.tolist()]
        self._counts = np.zeros_like(old)
        for at, column in zip(now, used.tolist(), strict=True):
            self._counts[:, at] += old[:, column]
