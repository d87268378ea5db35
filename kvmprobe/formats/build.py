# SPDX-License-Identifier: MIT
"""Makes events, as probes/events.h has them, of records whose vCPU and state are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.formats.records import Point
from kvmprobe.formats.slots import PFN_ERROR, PFN_NOSLOT, Presumed
from kvmprobe.probes.schema import EVENT, FaultinResult, Flag, MmioType, Site, SpteChange, Type

#: KVM_EXIT_MMIO of the KVM interface.
EXIT_MMIO = 6
_PAGE = np.uint64(12)

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Known(NamedTuple):
    """Records sorted by vCPU, with what is known at each of them.

    `when` is the record's place in the trace; `flags` say level and address space; `nests`, `drops`
    and `to_vmm` mark records that change the level, that only tell the VMM's answer, and MMIO that
    went to the VMM; `matched` says that the cache was believed in the same emulation.
    """

    records: NDArray[Any]
    when: Ints
    place: Ints
    vm: Ints
    number: Ints
    flags: NDArray[np.uint32]
    nests: Mask
    drops: Mask
    to_vmm: Mask
    matched: Mask


class Part(NamedTuple):
    """Some events; `order` sorts all parts' events, `place` is the vCPU (-1: none)."""

    events: NDArray[Any]
    order: Ints
    place: Ints


def order_of(when: Ints, sub: int) -> Ints:
    """Where an event stands: by its record, and among the events made of one record by `sub`."""
    return when * 8 + sub


class _Builder:
    """Takes columns of chosen rows and fills in what all events have."""

    def __init__(self, known: Known, presumed: Presumed) -> None:
        self.known = known
        self.presumed = presumed
        self.point = known.records["point"]

    def rows(self, point: Point) -> Ints:
        return np.flatnonzero(self.point == point)

    def part(
        self,
        rows: Ints,
        kind_of: Type,
        site: Site,
        sub: int = 2,
        *,
        lookup: bool = False,
        **fields: Any,  # noqa: ANN401
    ) -> Part:
        known = self.known
        events = np.zeros(len(rows), EVENT)
        events["ts"] = known.records["ts"][rows]
        events["vm"] = known.vm[rows]
        events["vcpu"] = known.number[rows]
        events["type"], events["site"] = kind_of, site
        events["flags"] = known.flags[rows] | fields.pop("flags", np.uint32(0))
        for name, values in fields.items():
            events[name] = values
        if lookup:
            faultin = kind_of == Type.FAULTIN
            kept = events["kind"] == FaultinResult.KEPT if faultin else None
            at = self.presumed.at(events["addr"], known.vm[rows], known.when[rows], kept)
            events["slot"] = at.slot
            events["flags"] |= at.flags
            if faultin:
                events["value"], events["gen"] = at.base, at.pages
        return Part(events, order_of(known.when[rows], sub), known.place[rows])


def build(known: Known, presumed: Presumed) -> Iterator[Part]:
    """Make the events of a batch."""
    make = _Builder(known, presumed)
    r = known.records
    rows = make.rows(Point.PAGE_FAULT)
    yield make.part(rows, Type.FAULT, Site.PAGE_FAULT_TP, addr=r["a"][rows], value=r["b"][rows])
    rows = make.rows(Point.SPTE_REQUESTED)
    yield make.part(
        rows, Type.FAULTIN, Site.SPTE_REQUESTED, lookup=True,
        addr=r["a"][rows] << _PAGE, kind=_faultin(r["b"][rows]),
    )  # fmt: skip
    rows = make.rows(Point.MARK_MMIO)
    yield make.part(
        rows, Type.SPTE, Site.MARK_MMIO_SPTE,
        addr=r["a"][rows] << _PAGE, slot=-1, kind=SpteChange.MARKED,
    )  # fmt: skip
    yield _fill(make, rows, Site.MARK_MMIO_SPTE)
    yield _fill(make, make.rows(Point.HANDLE_MMIO), Site.MMIO_SPTE)
    rows = make.rows(Point.CHECK_MMIO)
    now, then = r["a"][rows], r["b"][rows]
    yield make.part(
        rows, Type.SPTE, Site.CHECK_MMIO_SPTE,
        value=r["c"][rows], gen=now << np.uint64(32) | then, slot=-1,
        kind=np.where(now == then, SpteChange.VALID, SpteChange.STALE),
    )  # fmt: skip
    rows = make.rows(Point.EMULATE)
    yield make.part(
        rows, Type.EMULATE, Site.EMULATE_INSN, addr=r["a"][rows], value=r["b"][rows],
        flags=_flag(r["note"][rows] != 0, Flag.FAILED),
    )  # fmt: skip
    rows = make.rows(Point.MATCH)
    note = r["note"][rows]
    yield make.part(
        rows, Type.MATCH, Site.MATCH_MMIO, lookup=True, addr=r["a"][rows], value=r["b"][rows],
        flags=_flag(note & 1 != 0, Flag.WRITE) | _flag(note & 2 != 0, Flag.BY_GPA),
    )  # fmt: skip
    yield _mmio(make)
    rows = np.flatnonzero(known.nests)
    entered = (known.flags[rows] & np.uint32(Flag.L2)) != 0
    yield make.part(rows, Type.NESTING, Site.NESTED_TP, kind=entered)
    rows = make.rows(Point.SMM)
    yield make.part(rows, Type.SMM, Site.NESTED_TP, kind=r["note"][rows])


def _flag(mask: Mask, flag: Flag) -> NDArray[np.uint32]:
    return np.where(mask, np.uint32(flag), np.uint32(0))


def _faultin(pfn: NDArray[np.uint64]) -> NDArray[np.uint8]:
    kind = np.full(len(pfn), FaultinResult.KEPT, np.uint8)
    kind[(pfn & PFN_ERROR) != 0] = FaultinResult.ERROR
    kind[(pfn & PFN_NOSLOT) != 0] = FaultinResult.NOSLOT
    return kind


def _fill(make: _Builder, rows: Ints, site: Site) -> Part:
    r = make.known.records
    return make.part(
        rows, Type.FILL, site, sub=3, lookup=True,
        addr=r["a"][rows] << _PAGE, kind=r["b"][rows],
    )  # fmt: skip


def _mmio(make: _Builder) -> Part:
    known, r = make.known, make.known.records
    rows = np.flatnonzero((make.point == Point.MMIO) & ~known.drops)
    note, to_vmm = r["note"][rows], known.to_vmm[rows]
    return make.part(
        rows, Type.MMIO, Site.MMIO, lookup=True, addr=r["a"][rows], kind=note,
        value=np.where(to_vmm, EXIT_MMIO, 0), len=np.minimum(r["b"][rows], np.uint64(255)),
        flags=_flag(known.matched[rows], Flag.MATCHED)
        | _flag(note == MmioType.WRITE, Flag.WRITE)
        | _flag(to_vmm, Flag.TO_USERSPACE),
    )  # fmt: skip
