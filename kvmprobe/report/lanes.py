# SPDX-License-Identifier: MIT
"""What each vCPU's MMIO cache held, and which level it ran in, over time, in bounded memory.

A lane is a vCPU; its time is cut into bins of 2**shift ns.  A bin that holds no event takes no
room, and the bins get wider only when there are too many of them: a short capture is drawn exactly,
a long one in bins.  A bin keeps the set of what was true in it, and counts: nothing disappears by
making it wider.  Where batches are cut changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.candidates import beliefs
from kvmprobe.analysis.rules.model import APIC_GFN
from kvmprobe.probes.schema import NO_VCPU, Columns, Flag, Type
from kvmprobe.report.cells import (
    MEMORY,
    STALE,
    UNSEEN,
    Held,
    Level,
    carried,
    join,
    new_cells,
)

#: Bins kept, over all lanes.
MAX_CELLS = 1 << 15
#: vCPUs that get a lane; beyond that they are counted.
MAX_LANES = 4096
#: Bins between the first and the last event: what a 32-bit number of the page holds, and a signed.
_MAX_BINS = 1 << 31

COLUMNS = ("ts", "vm", "vcpu", "type", "flags", "addr", "value", "gen", "slot", "len")
_STATES = 32
#: L2, LEVEL_KNOWN, SMM and AS_KNOWN, the lowest four flags -> level.
_LEVELS = np.array(
    [
        Level.SMM
        if bits & Flag.SMM and bits & Flag.AS_KNOWN
        else Level.UNKNOWN
        if not bits & Flag.LEVEL_KNOWN
        else Level.L2
        if bits & Flag.L2
        else Level.L1
        for bits in range(16)
    ],
    np.uint8,
)
_FILLED_AT = np.array([Held.BY_L1, Held.BY_L2, Held.BY_SMM, Held.BY_UNKNOWN], np.uint8)
_GEN_EITHER = np.uint32(Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT)
_PAGE_SHIFT = np.uint64(12)

#: Sets what cells hold: the rows, their lanes, their places in the cells, and the cells.
_Fill = Callable[[Columns, NDArray[np.int64], NDArray[np.int64], NDArray[Any]], None]


@dataclass(frozen=True)
class Lane:
    """One vCPU: its bins in order, as arrays of one length.

    `bin` counts from the capture's first; `held`, `levels` are sets over the bin, `after` and
    `level` what goes on until the next bin that is listed; `gfn` is the page held after it.
    """

    vm: int
    vcpu: int
    bin: NDArray[np.int64]
    held: NDArray[np.uint32]
    after: NDArray[np.uint8]
    levels: NDArray[np.uint8]
    level: NDArray[np.uint8]
    matches: NDArray[np.uint64]
    hits: NDArray[np.uint64]
    gfn: NDArray[np.uint64]
    events: int


class Lanes:
    """Gathers the lanes of a stream, batch by batch."""

    def __init__(self, max_cells: int = MAX_CELLS) -> None:
        """Start with none; `max_cells` bins are kept over all lanes."""
        self._max_cells = max_cells
        self._numbers: dict[int, int] = {}
        self._crowd: set[int] = set()
        self._cells = new_cells(0)
        self._pending: list[NDArray[Any]] = []
        self._pending_size = 0
        self._first: int | None = None
        self._last = 0
        self.shift = 0
        # What each lane's cache holds: page, generation, who filled it.
        self._content = np.zeros((MAX_LANES, 3), np.uint64)

    @property
    def crowd(self) -> int:
        """How many vCPUs got no lane because there were too many."""
        return len(self._crowd)

    def feed(self, columns: Columns) -> None:
        """Take in one batch with the columns `COLUMNS`."""
        ts = columns["ts"]
        if not len(ts):
            return
        low, high = int(ts.min()), int(ts.max())
        self._first = low if self._first is None else min(self._first, low)
        self._last = max(self._last, high)
        while (self._last >> self.shift) - (self._first >> self.shift) >= _MAX_BINS:
            self._widen()
        own = _part(columns, (columns["vcpu"] != NO_VCPU) & (columns["vm"] != 0))
        self._add(own, own["vm"].astype(np.int64) << 16 | own["vcpu"], self._vcpu_cells)
        moves = _part(columns, (columns["type"] == Type.GENERATION) & (columns["vm"] != 0))
        vm = moves["vm"].astype(np.int64)
        # A VM's address spaces have lanes too, under keys that no vCPU has; nobody draws them.
        keys = np.where(moves["len"] == 0, vm << 16 | NO_VCPU, -1 - vm)
        self._add(moves, keys, self._generation_cells)
        if self._pending_size > 2 * self._max_cells:
            self._compact()

    def lanes(self) -> list[Lane]:
        """The vCPUs in order of (vm, vcpu)."""
        self._compact()
        cells = self._cells
        starts = np.searchsorted(cells["lane"], np.arange(len(self._numbers) + 1))
        by_key = {
            key: cells[starts[number] : starts[number + 1]] for key, number in self._numbers.items()
        }
        return [
            self._lane(key >> 16, key & 0xFFFF, own, by_key)
            for key, own in sorted(by_key.items())
            if key >= 0 and key & 0xFFFF != NO_VCPU
        ]

    @property
    def first_bin(self) -> int:
        """The number of the capture's first bin, counted from the clock's zero."""
        return (self._first or 0) >> self.shift

    def _add(self, part: Columns, keys: NDArray[np.int64], fill: _Fill) -> None:
        """Put the cells of some events into the table; `fill` sets what they hold."""
        lane = self._lane_numbers(keys) if len(keys) else keys
        if (lane < 0).any():
            part, lane = _part(part, lane >= 0), lane[lane >= 0]
        if not len(lane):
            return
        bins = part["ts"] >> np.uint64(self.shift)
        base = bins.min()
        local = (bins - base).astype(np.int64)
        width = int(local.max()) + 1
        flat = lane * width + local
        size = (int(lane.max()) + 1) * width
        if size <= 4 * len(flat) + 1024:
            used = np.flatnonzero(np.bincount(flat, minlength=size))
            place = np.zeros(size, np.int64)
            place[used] = np.arange(len(used))
            at = place[flat]
        else:
            used, at = np.unique(flat, return_inverse=True)
        cells = new_cells(len(used))
        cells["lane"], cells["bin"] = used // width, base + (used % width).astype(np.uint64)
        fill(part, lane, at, cells)
        self._pending.append(cells)
        self._pending_size += len(cells)

    def _lane_numbers(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Each key's lane; -1 where there are too many."""
        low = int(keys.min())
        span = int(keys.max()) - low + 1
        if span <= 1 << 20:
            near = keys - low
            found = np.flatnonzero(np.bincount(near, minlength=span))
            table = np.zeros(span, np.int64)
            table[found] = [self._number(low + key) for key in found.tolist()]
            return np.take(table, near)
        found, at = np.unique(keys, return_inverse=True)
        return np.take(np.array([self._number(key) for key in found.tolist()], np.int64), at)

    def _number(self, key: int) -> int:
        number = self._numbers.get(key)
        if number is None:
            if len(self._numbers) >= MAX_LANES:
                if len(self._crowd) < 1 << 20:
                    self._crowd.add(key)
                return -1
            number = self._numbers[key] = len(self._numbers)
        return number

    def _generation_cells(
        self, part: Columns, _: NDArray[np.int64], at: NDArray[np.int64], cells: NDArray[Any]
    ) -> None:
        np.maximum.at(cells["moved"], at, part["ts"])

    def _vcpu_cells(
        self, part: Columns, lane: NDArray[np.int64], at: NDArray[np.int64], cells: NDArray[Any]
    ) -> None:
        size = len(cells)
        kinds = part["type"]
        cells["events"] = np.bincount(at, minlength=size)
        level = _LEVELS[part["flags"] & np.uint32(0xF)]
        seen = np.bincount(at * 4 + level, minlength=4 * size).reshape(size, 4) != 0
        cells["levels"] = seen @ np.array([1, 2, 4, 8], np.uint8)
        cells["level"][at] = level
        memory = _in_memory(part)
        match = beliefs(part)
        cells["matches"] = np.bincount(at[match], minlength=size)
        cells["hits"] = np.bincount(at[match & memory], minlength=size)
        cached = np.flatnonzero((kinds == Type.FILL) | (kinds == Type.CACHE))
        if not len(cached):
            return
        rows = {name: values[cached] for name, values in part.items()}
        state, smm = self._states(rows, lane[cached], level[cached], memory[cached])
        at = at[cached]
        begun = np.bincount(at * _STATES + state, minlength=_STATES * size)
        bits = np.uint32(1) << np.arange(_STATES, dtype=np.uint32)
        cells["held"] = (begun.reshape(size, _STATES) != 0) @ bits
        # Of equal indices the last assignment stands, and rows come in order.
        cells["after"][at] = state
        cells["smm"][at] = smm
        cells["gfn"][at] = rows["addr"] >> _PAGE_SHIFT
        cells["since"][at] = rows["ts"]

    def _states(
        self,
        rows: Columns,
        lane: NDArray[np.int64],
        level: NDArray[np.uint8],
        memory: NDArray[np.bool_],
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """What the cache holds after each FILL or CACHE, and whether SMM filled it.

        A CACHE event tells the level that found the entry.  Who filled it is known from the fill,
        while page and generation are the same.
        """
        order = np.argsort(lane.astype(np.uint16), kind="stable")
        lane, flags = lane[order], rows["flags"][order]
        content = np.stack([rows["addr"][order], rows["gen"][order]], axis=1)
        first = np.flatnonzero(np.diff(lane, prepend=-1))
        before = np.empty_like(content)
        before[1:] = content[:-1]
        before[first] = self._content[lane[first], :2]
        told = rows["type"][order] == Type.FILL
        new = told | (content != before).any(axis=1)
        other = np.uint32(Flag.FILL_AS_KNOWN | Flag.OTHER_AS)
        from_smm = (flags & other == other) & (flags & np.uint32(Flag.SMM) == 0)
        who = np.where(told, _FILLED_AT[level[order]], Held.BY_UNKNOWN).astype(np.uint8)
        who[~told & from_smm] = Held.BY_SMM
        carried = first[~new[first]]
        who[carried] = self._content[lane[carried], 2]
        new[first] = True
        who = who[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
        who[who == Held.EMPTY] = Held.BY_UNKNOWN
        last = np.append(first[1:], len(lane)) - 1
        self._content[lane[last], :2] = content[last]
        self._content[lane[last], 2] = who[last]
        empty = (rows["addr"] | rows["value"])[order] == 0
        old = (flags & np.uint32(Flag.GEN_KNOWN) != 0) & (flags & _GEN_EITHER == 0)
        state = who + MEMORY * memory[order].astype(np.uint8) + STALE * old.astype(np.uint8)
        state[empty] = Held.EMPTY
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return state[back], (who == Held.BY_SMM)[back]

    def _compact(self) -> None:
        """Join what is pending with the table; widen bins until it is small enough."""
        if self._pending:
            self._cells = join([self._cells, *self._pending])
            self._pending, self._pending_size = [], 0
        while len(self._cells) > self._max_cells:
            self._widen()
            self._cells = join([self._cells])

    def _widen(self) -> None:
        self.shift += 1
        for cells in (self._cells, *self._pending):
            cells["bin"] >>= np.uint64(1)

    def _lane(self, vm: int, vcpu: int, own: NDArray[Any], by_key: Mapping[int, Any]) -> Lane:
        """Carry from bin to bin what the cache holds and where the vCPU runs."""
        marks = [
            _stale_marks(own, by_key[key], smm=smm)
            for key, smm in ((vm << 16 | NO_VCPU, False), (-1 - vm, True))
            if key in by_key
        ]
        cells = join([own, *marks])
        state, level = carried(cells["after"]), carried(cells["level"])
        after = np.where(state >= 0, cells["after"][state], UNSEEN).astype(np.uint8)
        going = np.where(level >= 0, cells["level"][level], Level.UNKNOWN).astype(np.uint8)
        # What goes on from the bin before is true at the begin of this one.
        held, levels = cells["held"].copy(), cells["levels"].copy()
        known = np.flatnonzero(after[:-1] != UNSEEN)
        held[known + 1] |= np.uint32(1) << after[known].astype(np.uint32)
        levels[1:] |= np.uint8(1) << going[:-1]
        return Lane(
            vm=vm,
            vcpu=vcpu,
            bin=(cells["bin"] - np.uint64(self.first_bin)).astype(np.int64),
            held=held,
            after=after,
            levels=levels,
            level=going,
            matches=cells["matches"],
            hits=cells["hits"],
            gfn=np.where(state >= 0, cells["gfn"][state], 0).astype(np.uint64),
            events=int(cells["events"].sum()),
        )


def _stale_marks(own: NDArray[Any], moves: NDArray[Any], *, smm: bool) -> NDArray[Any]:
    """Cells that say when an entry of the cache became stale, before another took its place."""
    changes = np.flatnonzero(own["after"] != UNSEEN)
    ends = np.append(own["bin"][changes[1:]], np.uint64((1 << 64) - 1))
    live = (own["after"][changes] != Held.EMPTY) & (own["after"][changes] <= STALE)
    live &= own["smm"][changes] == smm
    entries, ends = own[changes[live]], ends[live]
    at = np.searchsorted(moves["bin"], entries["bin"])
    near = np.minimum(at, len(moves) - 1)
    # A move in the bin of the fill counts if it came after it.
    at += (moves["bin"][near] == entries["bin"]) & (moves["moved"][near] <= entries["since"])
    moved = at < len(moves)
    moved[moved] = moves["bin"][at[moved]] < ends[moved]
    marks = new_cells(int(moved.sum()))
    for name in ("lane", "smm", "gfn", "since"):
        marks[name] = entries[name][moved]
    marks["bin"] = moves["bin"][at[moved]]
    marks["after"] = entries["after"][moved] + STALE
    marks["held"] = np.uint32(1) << marks["after"].astype(np.uint32)
    return marks


def _part(columns: Columns, chosen: NDArray[np.bool_]) -> Columns:
    """The chosen events of a batch; all of them without copying."""
    if chosen.all():
        return columns
    at = np.flatnonzero(chosen)  # quicker to take by than the mask
    return {name: columns[name].take(at) for name in COLUMNS}


def _in_memory(part: Columns) -> NDArray[np.bool_]:
    """Whether a memslot stands at the event's page, other than the one meant to be emulated."""
    stands: NDArray[np.bool_] = part["slot"] >= 0
    if stands.any():
        page = part["addr"] >> _PAGE_SHIFT
        stands = stands & (page != APIC_GFN) & (page != 0)
    return stands
