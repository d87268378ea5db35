# SPDX-License-Identifier: MIT
"""Where KVM's own memslots are presumed: no trace of another tool says where memslots are.

A slot that the user states counts as it stands.  Otherwise the well-known addresses are presumed
(QEMU's, and those of VMMs that leave KVM's defaults), and there it takes more: on a host with
unrestricted guest, that is on nearly all, KVM makes no such slot and the addresses are holes, which
a guest may touch with no fault in sight.  So an event there convicts only after the trace showed
memory behind the page, and acquits only after it showed memory mapped writable: firmware flash at
such an address would be shown to L2 by every kernel.  Until then it is flagged UNSTABLE beside
SLOT_PRESUMED, which convicts and acquits nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import UsageError
from kvmprobe.formats.records import Point
from kvmprobe.probes.schema import SLOT_APIC, SLOT_IDENTITY, SLOT_TSS, Flag

_NAMES = {"tss": SLOT_TSS, "apic": SLOT_APIC, "identity": SLOT_IDENTITY}
_PRESUMED = np.uint32(Flag.SLOT_PRESUMED)
_UNSHOWN = np.uint32(Flag.SLOT_PRESUMED | Flag.UNSTABLE)
_SHIFT = np.uint64(12)
_NEVER = np.iinfo(np.int64).max
#: Bits 52 to 62 of a pfn: an error (KVM_PFN_ERR_MASK); bit 63: no slot (KVM_PFN_NOSLOT).
PFN_ERROR = np.uint64(0x7FF << 52)
PFN_NOSLOT = np.uint64(1 << 63)
_SPTE_READ_OR_PRESENT = np.uint64(1)
_SPTE_WRITE = np.uint64(2)


@dataclass(frozen=True)
class Slot:
    """One of KVM's own memslots: its id, its first byte, its pages."""

    id: int
    base: int
    pages: int
    stated: bool = False


#: QEMU's addresses, and KVM's default for the identity map with the TSS after it (Firecracker and
#: others).  The APIC access page is always at the same place.
WELL_KNOWN = (
    Slot(SLOT_TSS, 0xFEFFD000, 3),
    Slot(SLOT_IDENTITY, 0xFEFFC000, 1),
    Slot(SLOT_TSS, 0xFFFBD000, 3),
    Slot(SLOT_IDENTITY, 0xFFFBC000, 1),
    Slot(SLOT_APIC, 0xFEE00000, 1),
)


def stated(text: str) -> Slot:
    """Read "NAME=GPA:PAGES", such as tss=0xfffbd000:3.

    Raises:
        UsageError: it is none.

    """
    name, _, place = text.partition("=")
    gpa, _, pages = place.partition(":")
    try:
        slot = Slot(_NAMES[name], int(gpa, 0), int(pages), stated=True)
    except (KeyError, ValueError):
        slot = Slot(-1, 1, 0)
    if slot.base % 4096 or not 1 <= slot.pages <= 16 or not 0 <= slot.base < 1 << 52:
        raise UsageError(
            f"--internal-slot is NAME=GPA:PAGES with NAME one of {', '.join(_NAMES)}, such as "
            f"tss=0xfffbd000:3, not {text!r}"
        )
    return slot


class At(NamedTuple):
    """The slot presumed at each of some addresses: id (-1: none), flags, first byte, pages."""

    slot: NDArray[np.int16]
    flags: NDArray[np.uint32]
    base: NDArray[np.uint64]
    pages: NDArray[np.uint64]


class Presumed:
    """The slots presumed in all VMs of a trace, and what the trace has shown of their pages."""

    def __init__(self, slots: tuple[Slot, ...] = ()) -> None:
        """Presume the slots stated, and the well-known addresses of those that aren't."""
        named = {slot.id for slot in slots}
        self._slots = (*slots, *(slot for slot in WELL_KNOWN if slot.id not in named))
        gfns = {
            (slot.base >> 12) + page: number
            for number, slot in reversed(tuple(enumerate(self._slots)))
            for page in range(slot.pages)
        }
        self._gfns = np.array(sorted(gfns), np.uint64)
        self._slot_of = np.array([gfns[gfn] for gfn in sorted(gfns)], np.int64)
        #: (vm, page) -> shown, since the trace began: memory behind it; mapped writable.
        self._backed: set[int] = set()
        self._writable: set[int] = set()
        self._first_backed: dict[int, int] = {}
        self._first_writable: dict[int, int] = {}

    def _page(self, gfn: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The number of each page among those presumed, -1 for the rest."""
        at = np.minimum(np.searchsorted(self._gfns, gfn), len(self._gfns) - 1)
        return np.where(self._gfns[at] == gfn, at, -1)

    def table(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The pages presumed: gfns, sorted; and of each (slot id, first byte, pages, 1: stated)."""
        slots = [self._slots[number] for number in self._slot_of.tolist()]
        about = [(slot.id, slot.base, slot.pages, slot.stated) for slot in slots]
        return self._gfns, np.array(about, np.uint64)

    def learn(self, records: NDArray[Any], vm: NDArray[np.int64], when: NDArray[np.int64]) -> None:
        """Take in what a batch shows of the pages.

        Args:
            records: dtype RECORD.
            vm: the VM of each.
            when: the place of each in the batch.

        """
        self._backed.update(self._first_backed)
        self._writable.update(self._first_writable)
        point = records["point"]
        set_spte = (point == Point.SET_SPTE) & ((records["b"] & _SPTE_READ_OR_PRESENT) != 0)
        resolved = (point == Point.SPTE_REQUESTED) & (
            (records["b"] & (PFN_ERROR | PFN_NOSLOT)) == 0
        )
        writable = set_spte & ((records["b"] & _SPTE_WRITE) != 0)
        self._first_backed = self._first(set_spte | resolved, records, vm, when)
        self._first_writable = self._first(writable, records, vm, when)

    def _first(
        self,
        shows: NDArray[np.bool_],
        records: NDArray[Any],
        vm: NDArray[np.int64],
        when: NDArray[np.int64],
    ) -> dict[int, int]:
        rows = np.flatnonzero(shows)
        page = self._page(records["a"][rows])
        rows, page = rows[page >= 0], page[page >= 0]
        first: dict[int, int] = {}
        for key, at in zip((vm[rows] << 8 | page).tolist(), when[rows].tolist(), strict=True):
            first[key] = min(at, first.get(key, _NEVER))
        return first

    def at(
        self,
        address: NDArray[np.uint64],
        vm: NDArray[np.int64],
        when: NDArray[np.int64],
        kept: NDArray[np.bool_] | None = None,
    ) -> At:
        """Look up what is presumed at some addresses.

        Args:
            address: gpa.
            vm: the VM of each.
            when: the place of each in the batch given to `learn`.
            kept: which of them were faults that found memory, and so could acquit.

        """
        page = self._page(address >> _SHIFT)
        rows = np.flatnonzero(page >= 0)
        found = At(
            np.full(len(address), -1, np.int16),
            np.zeros(len(address), np.uint32),
            np.zeros(len(address), np.uint64),
            np.zeros(len(address), np.uint64),
        )
        if len(rows):
            number = self._slot_of[page[rows]]
            keys, which = np.unique(vm[rows] << 8 | page[rows], return_inverse=True)
            shown = self._since(keys, self._backed, self._first_backed)[which] < when[rows]
            if kept is not None:
                writable = self._since(keys, self._writable, self._first_writable)[which]
                shown = np.where(kept[rows], writable < when[rows], shown)
            shown |= np.array([slot.stated for slot in self._slots])[number]
            found.flags[rows] = np.where(shown, _PRESUMED, _UNSHOWN)
            for name, column in (("id", found.slot), ("base", found.base), ("pages", found.pages)):
                column[rows] = np.array([getattr(slot, name) for slot in self._slots])[number]
        return found

    @staticmethod
    def _since(keys: NDArray[np.int64], ever: set[int], first: dict[int, int]) -> NDArray[np.int64]:
        """From which place of the batch on each page is shown to be what is asked."""
        return np.array(
            [-1 if key in ever else first.get(key, _NEVER) for key in keys.tolist()], np.int64
        )
