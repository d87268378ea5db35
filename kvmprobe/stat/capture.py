# SPDX-License-Identifier: MIT
"""The same rows from captures; without times, for a capture holds no exits and no entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.candidates import beliefs
from kvmprobe.analysis.run import Reader
from kvmprobe.analysis.vms import VmNames
from kvmprobe.probes.schema import (
    NO_VCPU,
    Columns,
    Flag,
    LifecycleChange,
    MmioType,
    Site,
    Type,
)
from kvmprobe.stat.faults import FaultResults
from kvmprobe.stat.model import (
    SLOT_HOLE,
    SLOT_UNKNOWN,
    Counted,
    Key,
    Result,
    Table,
    VmInfo,
)

#: Rows of pages that are kept; then the rarest half gives way and is counted as evicted.
MAX_PAGES = 1 << 16
_COLUMNS = (
    *("ts", "vm", "seq", "vcpu", "type", "site", "flags"),
    *("addr", "value", "gen", "aux", "slot", "kind", "len"),
)
_BUSY = np.uint64(1 << 63)  # of a generation: memslots were changing


def count_captures(readers: Sequence[Reader]) -> Counted:
    """Count captures of one host, each by itself, in constant memory.

    VMs get new numbers, in the order of the captures and then of their own numbers.

    Raises:
        CaptureError: a capture can't be read on.

    """
    counted = Counted()
    counted.notes.append("a capture holds no exits: no times, and no table of exits")
    for reader in readers:
        _Capture(reader, counted).count()
    return counted


class _Capture:
    """One capture on its way into the rows."""

    def __init__(self, reader: Reader, counted: Counted) -> None:
        self._reader = reader
        self._counted = counted
        self._offset = max(counted.vms, default=0)
        self._names = VmNames()
        self._filler: dict[int, int] = {}
        self._faults = FaultResults(
            at_exit=any(
                row["attached"] and row["site"] == Site.PAGE_FAULT.name
                for row in reader.header["plan"]
            ),
            intel=reader.header["host"]["vendor"] == "intel",
        )
        self._generations: dict[tuple[int, int], tuple[int, int]] = {}
        self._spaces = 1

    def count(self) -> None:
        """Read it to its end."""
        first = last = None
        vms: set[int] = set()
        for columns in self._reader.batches(_COLUMNS):
            if not len(columns["ts"]):
                continue
            begin, end = int(columns["ts"].min()), int(columns["ts"].max())
            first, last = min(first or begin, begin), max(last or end, end)
            vms.update(np.unique(columns["vm"]).tolist())
            self._names.feed(columns)
            self._take(columns)
        self._add_faults(self._faults.rest())
        self._finish(sorted(vms - {0}))
        if first is not None and last is not None:
            self._counted.seconds += (last - first) / 1e9
        path, notes = self._reader.path, self._counted.notes
        if self._reader.truncated:
            notes.append(f"{path}: {self._reader.truncated}")
        notes += [f"{path}: a part is damaged and not counted"] * bool(self._reader.damaged)

    def _take(self, columns: Columns) -> None:
        """Count one batch."""
        types, kinds, flags = columns["type"], columns["kind"], columns["flags"]
        self._counted.lost += int(columns["addr"][types == Type.LOSS].sum())
        levels = np.where(
            flags & np.uint32(Flag.LEVEL_KNOWN), 1 + ((flags & np.uint32(Flag.L2)) != 0), 0
        )
        slots = np.where(
            ((flags & np.uint32(Flag.SLOT_KNOWN)) != 0) & ((flags & np.uint32(Flag.UNSTABLE)) == 0),
            columns["slot"],
            SLOT_UNKNOWN,
        )
        mmio = types == Type.MMIO
        pages = columns["addr"] & ~np.uint64(0xFFF)
        writes = kinds == MmioType.WRITE
        self._add(Table.MMIO, columns, mmio, levels, a=writes, what=pages, slots=slots)
        spte = types == Type.SPTE
        self._add(Table.SPTE, columns, spte, levels, a=kinds)
        failed = (flags & np.uint32(Flag.FAILED)) != 0
        self._add(Table.EMULATE, columns, types == Type.EMULATE, levels, a=failed)
        nesting = types == Type.NESTING
        self._add(Table.NESTING, columns, nesting, np.full(len(types), 2), a=kinds)
        from_spte = columns["site"] == Site.MMIO_SPTE
        self._add(Table.FILL, columns, types == Type.FILL, levels, a=from_spte, slots=slots)
        self._take_hits(columns, levels, slots)
        self._add_faults(self._faults.take(columns, _ident(columns), levels))
        self._take_generations(columns)
        if len(self._counted.cells) > MAX_PAGES:
            self._evict()

    def _add_faults(self, found: Counter[tuple[int, int, Result]]) -> None:
        for (vcpu, level, result), count in found.items():
            vm = self._offset + (vcpu >> 16)
            key = Key(Table.FAULT, vm, vcpu & NO_VCPU, level, a=int(result))
            self._counted.add(key, count)

    def _add(
        self,
        table: Table,
        columns: Columns,
        chosen: NDArray[np.bool_],
        levels: NDArray[Any],
        *,
        a: NDArray[Any],
        what: NDArray[Any] | None = None,
        slots: NDArray[Any] | None = None,
    ) -> None:
        """Count the chosen events, equal ones together."""
        at = np.flatnonzero(chosen)
        if not len(at):
            return
        ident = _ident(columns)[at]
        pages = np.zeros(len(at), np.uint64) if what is None else what[at]
        slot = np.full(len(at), SLOT_HOLE) if slots is None else slots[at]
        # Whole numbers sort ten times as fast as records of them.
        idents, i = np.unique(ident, return_inverse=True)
        whats, j = np.unique(pages, return_inverse=True)
        rest = (slot.astype(np.int64) + 2) << 10 | levels[at].astype(np.int64) << 8
        code = (i * len(whats) + j) << 27 | rest | a[at].astype(np.int64)
        codes, counts = np.unique(code, return_counts=True)
        for number, count in zip(codes.tolist(), counts.tolist(), strict=True):
            place, low = number >> 27, number & (1 << 27) - 1
            vcpu = int(idents[place // len(whats)])
            key = Key(
                table,
                self._offset + (vcpu >> 16),
                vcpu & NO_VCPU,
                low >> 8 & 3,
                int(whats[place % len(whats)]),
                low & 0xFF,
                (low >> 10) - 2,
            )
            self._counted.add(key, count)

    def _take_hits(self, columns: Columns, levels: NDArray[Any], slots: NDArray[Any]) -> None:
        """Count hits by the level of the fill before, which is not known before a first one."""
        fill = columns["type"] == Type.FILL
        hit = beliefs(columns) & (columns["site"] != Site.RSVD)
        ident = _ident(columns)
        fillers = np.zeros(len(fill), np.int64)
        rows = np.flatnonzero(fill | hit)
        for vcpu in np.unique(ident[rows]).tolist():
            own = rows[ident[rows] == vcpu]
            last = np.maximum.accumulate(np.where(fill[own], np.arange(len(own)), -1))
            before = self._filler.get(vcpu, 0)
            fillers[own] = np.where(last < 0, before, levels[own][last])
            self._filler[vcpu] = int(fillers[own[-1]])
        self._add(Table.HIT, columns, hit, levels, a=fillers, slots=slots)

    def _take_generations(self, columns: Columns) -> None:
        """Keep the first and last generation of each VM's address spaces."""
        seen = (columns["type"] == Type.LIFECYCLE) & (columns["kind"] == LifecycleChange.VM_SEEN)
        for row in np.flatnonzero(seen).tolist():
            self._spaces = max(int(columns["len"][row]), 1)
        moved = (columns["type"] == Type.GENERATION) & ((columns["value"] | columns["gen"]) < _BUSY)
        for row in np.flatnonzero(moved).tolist():
            key = int(columns["vm"][row]), int(columns["len"][row])
            first, last = int(columns["value"][row]), int(columns["gen"][row])
            before = self._generations.get(key, (first, last))
            self._generations[key] = min(first, before[0]), max(last, before[1])

    def _finish(self, vms: list[int]) -> None:
        """Count what is known only at the end, and name the VMs."""
        for (vm, space), (first, last) in self._generations.items():
            key = Key(Table.GENERATION, self._offset + vm, NO_VCPU, 0, a=space)
            self._counted.add(key, max(last - first, 0) // self._spaces)
        for vm in vms:
            known = self._names.get(vm)
            number = self._offset + vm
            self._counted.vms[number] = VmInfo(number, known.name, known.pid)

    def _evict(self) -> None:
        """Drop the rarest half of the pages, when there are too many."""
        pages = [key for key in self._counted.cells if key.table == Table.MMIO]
        if len(pages) <= MAX_PAGES:
            return
        pages.sort(key=lambda key: self._counted.cells[key].count)
        for key in pages[: len(pages) - MAX_PAGES // 2]:
            evicted = self._counted.evicted
            evicted[Table.MMIO] = evicted.get(Table.MMIO, 0) + self._counted.cells.pop(key).count
            self._counted.evicted_rows += 1


def _ident(columns: Columns) -> NDArray[np.uint64]:
    return columns["vm"].astype(np.uint64) << np.uint64(16) | columns["vcpu"]
