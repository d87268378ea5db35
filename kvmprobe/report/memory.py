# SPDX-License-Identifier: MIT
"""The guest-physical map: which memslots a VM had, and which pages its vCPUs' caches held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import Columns, Flag, MemslotChange, Type

#: Pages and placements of memslots kept over all VMs; beyond that they are counted.
MAX_PAGES = 4096
MAX_PLACEMENTS = 4096
_GONE = (MemslotChange.DELETED, MemslotChange.MOVED_FROM)
_PAGE_SHIFT = np.uint64(12)


@dataclass
class Placement:
    """A memslot at a place: `base` in bytes, `npages`, the address spaces that had it, when.

    `made` is how often it came; `present` the address spaces that have it at the end.
    """

    slot: int
    base: int
    npages: int
    flags: int = 0
    spaces: set[int] = field(default_factory=set)
    made: int = 0
    present: set[int] = field(default_factory=set)


@dataclass
class Page:
    """A page that the MMIO cache held or that was accessed as MMIO, with counts of events.

    `slot` is a memslot that stood there then, -1: none ever did.
    """

    gfn: int
    slot: int = -1
    fills_l1: int = 0
    fills_l2: int = 0
    fills_other: int = 0
    matches: int = 0
    accesses: int = 0

    def add(self, other: Page) -> None:
        """Add another's counts."""
        self.slot = max(self.slot, other.slot)
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


COUNTS = ("fills_l1", "fills_l2", "fills_other", "matches", "accesses")


class Memory:
    """Gathers the maps of a stream's VMs."""

    def __init__(self) -> None:
        """Start with none."""
        # Pages of memory apart from pages of devices, so that no flood of these hides those.
        self._pages: tuple[dict[tuple[int, int], Page], ...] = ({}, {})
        self._placements: dict[tuple[int, int, int, int], Placement] = {}
        # Pages and VMs met so far, in order: to find them is quicker than to sort each batch.
        self._seen: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._vms: NDArray[np.uint32] = np.empty(0, np.uint32)
        #: Counts that were left out.
        self.more_pages = 0
        self.more_placements = 0

    def feed(self, columns: Columns) -> None:
        """Take in one batch with all columns of the event."""
        kinds = columns["type"]
        for i in np.flatnonzero(kinds == Type.MEMSLOT).tolist():
            self._place({name: int(values[i]) for name, values in columns.items()})
        full = (columns["addr"] | columns["value"]) != 0  # an empty cache holds no page
        wanted = (kinds == Type.MATCH) | (kinds == Type.MMIO)
        wanted |= ((kinds == Type.FILL) | (kinds == Type.CACHE)) & full
        at = np.flatnonzero(wanted)  # quicker to take by than the mask
        if len(at):
            self._count({n: columns[n].take(at) for n in ("vm", "type", "flags", "addr", "slot")})

    def vms(self) -> list[int]:
        """The VMs that have a map."""
        pages = {vm for kind in self._pages for vm, _ in kind}
        return sorted(pages | {vm for vm, *_ in self._placements})

    def placements(self, vm: int) -> list[Placement]:
        """The VM's memslots in order of address."""
        own = (p for (of, *_), p in self._placements.items() if of == vm)
        return sorted(own, key=lambda p: (p.base, p.npages, p.slot))

    def pages(self, vm: int) -> list[Page]:
        """The VM's pages in order of address."""
        own: dict[int, Page] = {}
        for kind in self._pages:
            for (of, gfn), page in kind.items():
                if of == vm:
                    own.setdefault(gfn, Page(gfn)).add(page)
        return [own[gfn] for gfn in sorted(own)]

    def _count(self, rows: Columns) -> None:
        """Count the events of each page."""
        page = rows["addr"] >> _PAGE_SHIFT
        memory = (rows["slot"] >= 0) & (page != 0)
        self._vms, vm = _numbered(rows["vm"], self._vms[:MAX_PAGES])
        vms = self._vms
        self._seen, gfn = _numbered(page, self._seen[:MAX_PAGES])
        gfns, code = self._seen, (gfn * len(vms) + vm) * 2 + memory
        if len(gfns) * len(vms) < 1 << 15:
            codes = np.flatnonzero(np.bincount(code))
            at = np.zeros(int(code.max()) + 1, np.int64)
            at[codes] = np.arange(len(codes))
            at = at[code]
        else:
            codes, at = np.unique(code, return_inverse=True)
        level = rows["flags"] & np.uint32(Flag.L2 | Flag.LEVEL_KNOWN)
        fill = rows["type"] == Type.FILL
        l1 = fill & (level == np.uint32(Flag.LEVEL_KNOWN))
        l2 = fill & (level == np.uint32(Flag.L2 | Flag.LEVEL_KNOWN))
        counts = [
            np.bincount(at[chosen], minlength=len(codes)).tolist()
            for chosen in (
                l1,
                l2,
                fill & ~l1 & ~l2,
                rows["type"] == Type.MATCH,
                rows["type"] == Type.MMIO,
            )
        ]
        slots = np.full(len(codes), -1, np.int64)
        np.maximum.at(slots, at[memory], rows["slot"][memory])
        # Memory comes first: no flood in one batch hides it.
        order = np.argsort(codes % 2 == 0, kind="stable")[: 2 * MAX_PAGES]
        for n, code in zip(order.tolist(), codes[order].tolist(), strict=True):
            kind = self._pages[code % 2]
            key = int(vms[code // 2 % len(vms)]), int(gfns[code // 2 // len(vms)])
            if key in kind or len(kind) < MAX_PAGES:
                new = Page(key[1], int(slots[n]), *(count[n] for count in counts))
                kind.setdefault(key, Page(key[1])).add(new)
            else:
                self.more_pages += 1
        self.more_pages += max(0, len(codes) - 2 * MAX_PAGES)

    def _place(self, event: dict[str, int]) -> None:
        """Follow one change of a memslot."""
        vm, slot, space, change = event["vm"], event["slot"], event["len"], event["kind"]
        key = vm, slot, event["addr"], event["value"]
        if change in _GONE:
            for (of, number, base, _), gone in self._placements.items():
                if (of, number) == (vm, slot) and base == event["addr"]:
                    gone.present.discard(space)
            return
        placement = self._placements.get(key)
        if placement is None:
            if len(self._placements) >= MAX_PLACEMENTS:
                self.more_placements += 1
                return
            placement = Placement(slot, event["addr"], event["value"])
            self._placements[key] = placement
        if space not in placement.present:
            placement.made += 1
        placement.spaces.add(space)
        placement.present.add(space)
        placement.flags = event["aux"]


def _numbered(values: NDArray[Any], known: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """All of `known` (sorted) and `values` in order, and each value's place among them."""
    if not len(known):
        known = np.unique(values)
    at = np.searchsorted(known, values)
    missing = known[np.minimum(at, len(known) - 1)] != values
    if missing.any():
        known = np.union1d(known, values[missing])
        at = np.searchsorted(known, values)
    return known, at
