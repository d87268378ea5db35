# SPDX-License-Identifier: MIT
"""The table between the readers of other tools' files and the translator.

Every reader turns its format into records of dtype `RECORD`: one row an occurrence of a KVM
tracepoint, in the order of the trace.  What `a`, `b`, `c` and `note` hold depends on the
tracepoint.

| point            | a        | b         | c        | note                               |
|------------------|----------|-----------|----------|------------------------------------|
| PAGE_FAULT       | address  | error     | -        | -                                  |
| SPTE_REQUESTED   | gfn      | pfn       | -        | -                                  |
| MARK_MMIO        | gfn      | access    | gen      | -                                  |
| HANDLE_MMIO      | gfn      | access    | -        | -                                  |
| CHECK_MMIO       | kvm_gen  | spte_gen  | spte     | -                                  |
| EMULATE          | rip      | opcode, 4 | -        | 1: failed                          |
| MATCH            | gpa      | gva       | -        | 1: write; 2: by gpa                |
| MMIO             | gpa      | length    | -        | type, as schema.MmioType           |
| USERSPACE_EXIT   | reason   | -         | -        | 1: errno, and the reason is none   |
| SMM              | -        | -         | -        | 1: entering, 0: leaving            |
| SET_SPTE         | gfn      | spte      | -        | -                                  |
| SPTE_CHANGED     | gfn      | spte      | -        | address space                      |
| LOST             | records  | -         | -        | -                                  |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.store.format import printable

RECORD = np.dtype(
    [
        ("ts", "<u8"),  # ns of the trace's clock
        ("tid", "<u4"),
        ("tgid", "<u4"),  # 0: not known
        ("vcpu", "<u4"),  # NO_VCPU: not said by this event
        ("cpu", "<u2"),
        ("point", "u1"),
        ("note", "u1"),
        ("a", "<u8"),
        ("b", "<u8"),
        ("c", "<u8"),
    ]
)
NO_VCPU = 0xFFFFFFFF

#: "Lines not understood" are shown up to so many.
SHOWN = 3


class Point(IntEnum):
    """A tracepoint that the translator knows what to do with, or a loss mark."""

    LOST = 0
    PAGE_FAULT = 1
    SPTE_REQUESTED = 2
    MARK_MMIO = 3
    HANDLE_MMIO = 4
    CHECK_MMIO = 5
    EMULATE = 6
    MATCH = 7
    MMIO = 8
    USERSPACE_EXIT = 9
    ENTRY = 10
    EXIT = 11
    NESTED_ENTER = 12
    NESTED_ENTER_FAILED = 13
    NESTED_EXIT = 14
    NESTED_INJECT = 15
    SMM = 16
    SET_SPTE = 17
    SPTE_CHANGED = 18


class Block(NamedTuple):
    """Some records in order, and the task names of threads by tid: at least of the new ones."""

    records: NDArray[Any]
    comms: dict[int, bytes]


@dataclass
class Tally:
    """What a reader met on its way.

    `enabled` are the tracepoints that the file says were recorded; None where the format doesn't
    say.  `seen` are those that occurred, `systems` the trace systems that were recorded whole.
    `garbled` counts those of the unknown that are events of ours.
    """

    read: int = 0
    lost: int = 0
    unknown: int = 0
    garbled: int = 0
    samples: list[str] = field(default_factory=list)
    seen: set[Point] = field(default_factory=set)
    enabled: set[Point] | None = None
    systems: set[str] = field(default_factory=set)
    kernel: str | None = None

    def not_understood(self, count: int, first: list[bytes], *, ours: bool = False) -> None:
        """Count lines or records that no reader understood, and keep the first few."""
        self.unknown += count
        self.garbled += count if ours else 0
        for text in first[: SHOWN - len(self.samples)]:
            self.samples.append(printable(text.decode("latin-1").rstrip("\n"), 160))

    def took(self, records: NDArray[Any]) -> None:
        """Count the records of a block."""
        counts = np.bincount(records["point"], minlength=1)
        self.seen.update(Point(p) for p in np.flatnonzero(counts).tolist())
        if counts[Point.LOST]:
            self.lost += int(records["a"][records["point"] == Point.LOST].sum())
