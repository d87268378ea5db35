# SPDX-License-Identifier: MIT
"""What is counted: the rows that the kernel keeps, and the same rows from captures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from kvmprobe.stat.histogram import BUCKETS, Times


class Table(IntEnum):
    """The tables.  What `a` of a key means in each stands behind it."""

    EXIT = 1  # 1 VMX, 2 SVM: how to read the reason in `what`
    FAULT = 2  # a Result
    MMIO = 3  # 1 write; `what` is the gpa of the page
    FILL = 4  # a Fill
    HIT = 5  # the level that filled
    SPTE = 6  # a schema.SpteChange
    GENERATION = 7  # the address space; made in user space
    NESTING = 8  # 1 entered L2, 0 left it
    EMULATE = 9  # 1 could not be emulated


#: More than the largest Table, a power of two.
TABLES = 16


class Result(IntEnum):
    """How a fault ended, told by what followed it."""

    RETRY = 0
    FIXED = 1
    NO_SLOT = 2
    MMIO = 3
    EMULATED = 4


class Fill(IntEnum):
    """Where the contents of the MMIO cache came from."""

    FROM_FAULT = 0
    FROM_SPTE = 1


class Fault(IntEnum):
    """Bits of what followed a fault."""

    SEEN = 1
    RSVD = 2
    NOSLOT = 4
    KEPT = 8
    EMULATED = 16


#: `slot` of a key: no memslot, or none that could be looked up.
SLOT_HOLE = -1
SLOT_UNKNOWN = -2
REASON_UNKNOWN = (1 << 64) - 1


@dataclass(frozen=True)
class Key:
    """What one row counts: a table, whose it is, and what it is, as numbers (see Table).

    `level` is 1, 2, or 0 where it is not known; `slot` a memslot's id, SLOT_HOLE or SLOT_UNKNOWN.
    """

    table: Table
    vm: int
    vcpu: int
    level: int
    what: int = 0
    a: int = 0
    slot: int = SLOT_HOLE


@dataclass
class Cell:
    """How often, and how long it took where that is known."""

    count: int = 0
    times: Times | None = None

    def add(self, count: int, times: Times | None) -> None:
        """Add another cell's."""
        self.count += count
        if times is not None:
            self.times = times if self.times is None else self.times + times


@dataclass(frozen=True)
class VmInfo:
    """A VM: its number, its name where one is known, and the id of its process."""

    number: int
    name: str | None
    pid: int | None


@dataclass
class Counted:
    """All rows of a time, and what is to be known about them.

    `evicted` counts by table what rows counted that gave way to others, `evicted_rows` those rows;
    `seconds` is how long was counted; `notes` are sentences about what could not be seen.
    """

    cells: dict[Key, Cell] = field(default_factory=dict)
    vms: dict[int, VmInfo] = field(default_factory=dict)
    seconds: float = 0.0
    evicted: dict[Table, int] = field(default_factory=dict)
    evicted_rows: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, key: Key, count: int, times: Times | None = None) -> None:
        """Add to a row."""
        self.cells.setdefault(key, Cell()).add(count, times)

    def total(self, table: Table) -> int:
        """How often a table's things happened, evicted rows included."""
        rows = sum(cell.count for key, cell in self.cells.items() if key.table == table)
        return rows + self.evicted.get(table, 0)


def result_of(bits: int) -> Result:
    """How a fault ended; close_fault() of probes/stat.bpf.c is the same rule."""
    if bits & Fault.NOSLOT:
        return Result.NO_SLOT
    if bits & Fault.KEPT:
        return Result.FIXED
    if bits & Fault.EMULATED:
        return Result.MMIO if bits & Fault.RSVD else Result.EMULATED
    return Result.RETRY


def definitions() -> str:
    """The numbers above as C definitions, for probes/stat.h."""
    enums: Iterable[tuple[str, type[IntEnum]]] = (
        ("TABLE", Table),
        ("RESULT", Result),
        ("FILL", Fill),
        ("FAULT", Fault),
    )
    lines = [f"#define {prefix}_{m.name} {m.value}" for prefix, enum in enums for m in enum]
    lines += [
        f"#define TABLES {TABLES}",
        f"#define BUCKETS {BUCKETS}",
        f"#define SLOT_HOLE ({SLOT_HOLE})",
        f"#define SLOT_UNKNOWN ({SLOT_UNKNOWN})",
        f"#define REASON_UNKNOWN {REASON_UNKNOWN:#x}ULL",
    ]
    return "\n".join(lines) + "\n"
