# SPDX-License-Identifier: MIT
"""The part of a capture that is exported, by time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np

from kvmprobe.errors import UsageError
from kvmprobe.probes.schema import Columns

_UNITS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Window:
    """From `begin` (included) to `end` (not), times of events in ns; None: no limit."""

    begin: int | None = None
    end: int | None = None

    def cut(self, columns: Columns) -> Columns:
        """The events of a batch that lie in the window."""
        if self.begin is None and self.end is None:
            return columns
        ts = columns["ts"]
        inside = np.ones(len(ts), np.bool_)
        if self.begin is not None:
            inside &= ts >= np.uint64(self.begin)
        if self.end is not None:
            inside &= ts < np.uint64(self.end)
        return columns if inside.all() else {n: values[inside] for n, values in columns.items()}

    def meets(self, first: int, last: int) -> bool:
        """Whether what was seen from `first` to `last` was seen in the window too."""
        return (self.begin is None or last >= self.begin) and (self.end is None or first < self.end)


def window(header: Mapping[str, Any], since: str | None, until: str | None) -> Window:
    """The window between two times as people write them.

    A time is counted from the start of the recording ("1.5", "250ms", "2m"; a plain number is in
    seconds) or is a moment as RFC 3339 writes it (UTC where it names no zone).  Raises UsageError
    for what is neither, for a moment in a capture without a clock, and for an empty window.
    """
    clock = header["clock"]
    begin, end = _ticks("--since", since, clock), _ticks("--until", until, clock)
    if begin is not None and end is not None and begin >= end:
        raise UsageError("--since is not before --until: nothing lies between them")
    return Window(begin, end)


def _ticks(option: str, text: str | None, clock: Mapping[str, Any]) -> int | None:
    if text is None:
        return None
    start = clock["monotonic_ns"] or 0
    if found := re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,9})?)(ns|us|ms|s|m|h)?", text):
        ticks = int(Decimal(found[1]) * _UNITS[found[2] or "s"]) + start
    else:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise UsageError(
                f"{option}: {text!r} is no time: write 1.5, 250ms or 2m after the start, or a "
                "moment such as 2026-11-22T17:00:00Z"
            ) from None
        if clock["wall_ns"] is None or clock["monotonic_ns"] is None:
            raise UsageError(
                f"{option}: the capture doesn't know when it was recorded: give a time after its "
                "start, such as 250ms"
            )
        moment = moment.replace(tzinfo=moment.tzinfo or UTC)
        wall = (moment - _EPOCH) // timedelta(microseconds=1) * 1000
        ticks = wall - clock["wall_ns"] + start
    return min(max(ticks, 0), (1 << 64) - 1)
