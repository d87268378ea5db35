# SPDX-License-Identifier: MIT
"""The table behind the lanes: one row a lane and bin, and how rows of one bin are joined."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Level(IntEnum):
    """Where a vCPU runs; a bin's `levels` has bit n for member n."""

    L1 = 0
    L2 = 1
    SMM = 2
    UNKNOWN = 3


class Held(IntEnum):
    """What the cache holds, by who filled it; a bin's `held` has bit n for state n.

    A state is one of these, plus MEMORY where a memslot stands at the page, plus STALE where the
    memslots' generation moved on: KVM no longer believes it.
    """

    EMPTY = 0
    BY_L1 = 1
    BY_L2 = 2
    BY_SMM = 3
    BY_UNKNOWN = 4


#: Added to a state that isn't EMPTY.
MEMORY = 4
STALE = 8
#: In `after` and `level`: nothing said so in this bin.
UNSEEN = 255

CELL = np.dtype(
    [
        ("lane", "<u4"),
        ("bin", "<u8"),
        ("events", "<u8"),
        ("matches", "<u8"),  # MATCH: the cache was believed
        ("hits", "<u8"),  # ... where memory stands
        ("held", "<u4"),  # states that began in the bin
        ("after", "u1"),  # the last of them, or UNSEEN
        ("smm", "?"),  # ... which was filled in SMM's address space
        ("gfn", "<u8"),  # ... for this page
        ("since", "<u8"),  # ... at this time, ns
        ("levels", "u1"),
        ("level", "u1"),  # the last one, or UNSEEN
        ("moved", "<u8"),  # lanes of generations: the last move's time, ns
    ]
)


def new_cells(size: int) -> NDArray[Any]:
    """So many cells that say nothing yet."""
    cells = np.zeros(size, CELL)
    cells["after"] = cells["level"] = UNSEEN
    return cells


def join(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Cells in order of (lane, bin), those of one bin as one; the later part has the last word.

    One part alone is in order already: its bins became wider.
    """
    cells = np.concatenate(parts)
    if len(parts) > 1:
        cells = cells[np.lexsort((cells["bin"], cells["lane"]))]
    new = np.ones(len(cells), np.bool_)
    new[1:] = (np.diff(cells["lane"]) != 0) | (np.diff(cells["bin"]) != 0)
    starts = np.flatnonzero(new)
    if len(starts) == len(cells):
        return cells
    joined = cells[starts]
    for name in ("events", "matches", "hits"):
        joined[name] = np.add.reduceat(cells[name], starts)
    for name in ("held", "levels"):
        joined[name] = np.bitwise_or.reduceat(cells[name], starts)
    joined["moved"] = np.maximum.reduceat(cells["moved"], starts)
    _take_last(joined, cells, starts, "level", ("level",))
    _take_last(joined, cells, starts, "after", ("after", "smm", "gfn", "since"))
    return joined


def _take_last(
    joined: NDArray[Any],
    cells: NDArray[Any],
    starts: NDArray[np.intp],
    said: str,
    names: Sequence[str],
) -> None:
    """Of the cells of one bin, take `names` from the last in which `said` is said."""
    rows = np.where(cells[said] != UNSEEN, np.arange(len(cells)), -1)
    last = np.maximum.reduceat(rows, starts)
    there = last >= 0
    for name in names:
        joined[name][there] = cells[name][last[there]]


def carried(values: NDArray[np.uint8]) -> NDArray[np.intp]:
    """For each of a lane's values the index of the newest one said by then; -1: none yet."""
    return np.maximum.accumulate(np.where(values != UNSEEN, np.arange(len(values)), -1))
