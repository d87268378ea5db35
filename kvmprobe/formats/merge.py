# SPDX-License-Identifier: MIT
"""Merging the records of several CPUs by time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


class _Stream:
    """The records of one CPU, some at a time, with times that never go back."""

    def __init__(self, source: Iterator[NDArray[Any]]) -> None:
        self._source = source
        self.records: NDArray[Any] | None = None
        self.key = np.empty(0, np.uint64)
        self._latest = np.uint64(0)
        self.fill()

    def fill(self) -> None:
        """Take more records if there are none; afterwards there are some, or the stream ended."""
        while self.records is None or not len(self.records):
            self.records = next(self._source, None)
            if self.records is None:
                return
            if len(self.records):
                self.key = np.maximum.accumulate(np.maximum(self.records["ts"], self._latest))
                self._latest = self.key[-1]

    def take(self, upto: np.uint64) -> tuple[NDArray[Any], NDArray[np.uint64]]:
        """Remove the records with times up to `upto`, and their times."""
        assert self.records is not None  # noqa: S101 - ended streams are dropped
        cut = int(np.searchsorted(self.key, upto, side="right"))
        taken = self.records[:cut], self.key[:cut]
        self.records, self.key = self.records[cut:], self.key[cut:]
        return taken


def merge(sources: list[Iterator[NDArray[Any]]]) -> Iterator[NDArray[Any]]:
    """Yield the records (dtype RECORD) of all sources in the order of their times.

    Each source's own records keep their order, even where its time goes back.
    """
    streams = [stream for source in sources if (stream := _Stream(source)).records is not None]
    while streams:
        upto = min(stream.key[-1] for stream in streams)
        taken = [stream.take(upto) for stream in streams]
        if len(taken) == 1:
            yield taken[0][0]
        else:
            key = np.concatenate([times for _, times in taken])
            order = np.argsort(key, kind="stable")
            yield np.concatenate([records for records, _ in taken])[order]
        for stream in streams:
            stream.fill()
        streams = [stream for stream in streams if stream.records is not None]
