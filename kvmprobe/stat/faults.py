# SPDX-License-Identifier: MIT
"""How the faults of a capture ended, told by the events around them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import Columns, FaultinResult, Flag, Type
from kvmprobe.stat.model import Fault, Result, result_of

#: Bit of PFERR_RSVD_MASK in an error code.
_RSVD = np.uint64(8)
#: Rows kept of a vCPU whose next fault has not come: far more than one fault makes.
_KEPT = 16
_ROW = np.dtype([("ident", "<u8"), ("ts", "<u8"), ("long", "<u8"), ("level", "u1"), ("bits", "u1")])

Found = Counter[tuple[int, int, Result]]


class FaultResults:
    """Counts faults by (vm << 16 | vcpu, level, result), batch by batch.

    A FAULT of kvm_mmu_page_fault() is sent at its exit and says how long it took: what belongs to
    it lies before it, inside that time.  A FAULT of the tracepoint begins the fault: what follows
    belongs to it, until the vCPU's next.
    """

    def __init__(self, *, at_exit: bool, intel: bool) -> None:
        """Begin.

        Args:
            at_exit: FAULTs are kvm_mmu_page_fault()'s, and not the tracepoint's.
            intel: kvm_page_fault gives an exit qualification, in which bit 3 is not RSVD.

        """
        self._at_exit, self._intel = at_exit, intel
        self._rows = np.zeros(0, _ROW)

    def take(self, columns: Columns, ident: NDArray[np.uint64], levels: NDArray[Any]) -> Found:
        """Count one batch's faults; those that may go on in the next are kept for it."""
        types, kinds = columns["type"], columns["kind"]
        fault, faultin = types == Type.FAULT, types == Type.FAULTIN
        emulate = (types == Type.EMULATE) & ((columns["flags"] & np.uint32(Flag.FAILED)) == 0)
        rsvd = fault & ((columns["value"] & _RSVD) != 0) & (self._at_exit or not self._intel)
        bits = np.zeros(len(types), np.uint8)
        bits[fault] = Fault.SEEN
        bits[rsvd] = Fault.SEEN | Fault.RSVD
        bits[faultin & (kinds == FaultinResult.KEPT)] = Fault.KEPT
        bits[faultin & (kinds == FaultinResult.NOSLOT)] = Fault.NOSLOT
        bits[emulate] = Fault.EMULATED
        chosen = np.flatnonzero(bits)
        rows = np.zeros(len(chosen), _ROW)
        rows["ident"], rows["ts"] = ident[chosen], columns["ts"][chosen]
        rows["long"], rows["level"] = columns["gen"][chosen], levels[chosen]
        rows["bits"] = bits[chosen]
        rows = np.concatenate([self._rows, rows])
        rows = rows[np.argsort(rows["ident"], kind="stable")]
        return self._before(rows) if self._at_exit else self._behind(rows)

    def rest(self) -> Found:
        """Count the faults that were kept, at the end of the capture."""
        found: Found = Counter()
        if not self._at_exit:
            found.update(_key(row, int(row["bits"])) for row in self._rows)
        self._rows = self._rows[:0]
        return found

    def _behind(self, rows: NDArray[Any]) -> Found:
        """Faults with what follows them; each vCPU's last is kept, as one row."""
        heads, bits = _grouped(rows)
        seen = (rows["bits"][heads] & Fault.SEEN) != 0
        heads, bits = heads[seen], bits[seen]
        last = np.append(rows["ident"][heads][1:] != rows["ident"][heads][:-1], True)[: len(heads)]
        self._rows = rows[heads[last]].copy()
        self._rows["bits"] = bits[last]
        return _count(rows[heads[~last]], bits[~last])

    def _before(self, rows: NDArray[Any]) -> Found:
        """Faults with what lies before them; what follows each vCPU's last fault is kept."""
        rows = rows[::-1].copy()
        heads, _ = _grouped(rows)
        # The head of the group that each row is in.
        head = np.repeat(heads, np.diff(np.append(heads, len(rows))))
        own = (rows["bits"][head] & Fault.SEEN) != 0
        self._rows = rows[~own & (np.arange(len(rows)) - head < _KEPT)][::-1]
        within = rows["ts"] + rows["long"][head] >= rows["ts"][head]
        rows["bits"] *= within
        rows = rows[own]
        heads, bits = _grouped(rows)
        return _count(rows[heads], bits)


def _grouped(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Begin a group at each fault and at each other vCPU: first rows, and all bits of each."""
    if not len(rows):
        return np.zeros(0, np.int64), np.zeros(0, np.uint8)
    begins = (rows["bits"] & Fault.SEEN) != 0
    begins[0] = True
    begins[1:] |= rows["ident"][1:] != rows["ident"][:-1]
    heads = np.flatnonzero(begins)
    return heads, np.bitwise_or.reduceat(rows["bits"], heads)


def _count(heads: NDArray[Any], bits: NDArray[np.uint8]) -> Found:
    found: Found = Counter()
    keys = heads["ident"] << np.uint64(16) | heads["level"].astype(np.uint64) << np.uint64(8) | bits
    for key, count in zip(
        *(part.tolist() for part in np.unique(keys, return_counts=True)), strict=True
    ):
        found[key >> 16, key >> 8 & 0xFF, result_of(key & 0xFF)] += count
    return found


def _key(row: np.void, bits: int) -> tuple[int, int, Result]:
    return int(row["ident"]), int(row["level"]), result_of(bits)
