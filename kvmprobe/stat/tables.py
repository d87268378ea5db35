# SPDX-License-Identifier: MIT
"""Tables from counted rows: grouped, named, with shares and rates, sorted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvmprobe.analysis.text import slot_name
from kvmprobe.probes.schema import NO_VCPU, SpteChange
from kvmprobe.stat.histogram import Times
from kvmprobe.stat.model import SLOT_HOLE, SLOT_UNKNOWN, Cell, Counted, Fill, Key, Result, Table
from kvmprobe.stat.reasons import ReasonNames

#: Whose: what --by takes.
GROUPS = ("vm", "vcpu", "level")
SORTS = ("count", "total", "min", "mean", "p50", "p99", "max", "name")


@dataclass(frozen=True)
class Shape:
    """A table's name for programs, its title, and its own columns: how each is said of a key."""

    name: str
    title: str
    columns: tuple[tuple[str, Callable[[Key], str]], ...]


_RESULTS = {
    Result.RETRY: "retry",
    Result.FIXED: "fixed",
    Result.NO_SLOT: "no slot",
    Result.MMIO: "MMIO SPTE or cache",
    Result.EMULATED: "emulated",
}
_SPTES = {
    SpteChange.MARKED: "made",
    SpteChange.VALID: "checked: current",
    SpteChange.STALE: "checked: stale",
}


def level_name(level: int) -> str:
    """L1, L2, or ? where a capture does not tell."""
    return f"L{level}" if level else "?"


def _memory(key: Key) -> str:
    if key.slot == SLOT_HOLE:
        return "hole"
    return "unknown" if key.slot == SLOT_UNKNOWN else slot_name(key.slot)


def shapes(names: ReasonNames) -> dict[Table, Shape]:
    """All tables, in the order in which they are shown."""

    def of(name: str, title: str, *columns: tuple[str, Callable[[Key], str]]) -> Shape:
        return Shape(name, title, columns)

    return {
        Table.EXIT: of("exits", "Exits", ("reason", lambda k: names.name(k.a, k.what))),
        Table.FAULT: of("faults", "Faults", ("result", lambda k: _RESULTS[Result(k.a)])),
        Table.MMIO: of(
            "mmio",
            "MMIO",
            ("page", lambda k: f"{k.what:#x}"),
            ("access", lambda k: "write" if k.a else "read"),
            ("memory", _memory),
        ),
        Table.FILL: of(
            "fills",
            "MMIO cache fills",
            ("from", lambda k: "MMIO SPTE" if k.a == Fill.FROM_SPTE else "fault"),
            ("memory", _memory),
        ),
        Table.HIT: of(
            "hits",
            "MMIO cache hits",
            ("filled by", lambda k: level_name(k.a)),
            ("memory", _memory),
        ),
        Table.SPTE: of(
            "sptes", "MMIO SPTEs", ("what", lambda k: _SPTES.get(SpteChange(k.a), "unknown"))
        ),
        Table.GENERATION: of(
            "generations", "Memslot generations", ("address space", lambda k: str(k.a))
        ),
        Table.NESTING: of(
            "nesting", "Nested entries and exits", ("what", lambda k: "entered" if k.a else "left")
        ),
        Table.EMULATE: of(
            "instructions",
            "Emulated instructions",
            ("result", lambda k: "failed" if k.a else "emulated"),
        ),
    }


@dataclass(frozen=True)
class Row:
    """One line: its group's and its own cells, and its figures.

    `share` is of the table, 0 to 1; `rate` a second, None where the time is not known.
    """

    vm: int | None
    vcpu: int | None
    level: int | None
    cells: tuple[str, ...]
    count: int
    share: float
    rate: float | None
    times: Times | None


@dataclass(frozen=True)
class Rows:
    """One table: all its rows, sorted; `evicted` is how often what has no row any more happened."""

    shape: Shape
    rows: list[Row]
    total: int
    evicted: int


def tables(counted: Counted, by: Sequence[str], sort: str, names: ReasonNames) -> list[Rows]:
    """All tables that have something in them.

    Args:
        counted: what was counted.
        by: the groups of `GROUPS` that make rows of their own; what is not in it is added up.
        sort: one of `SORTS`; largest first, names and pages from the first on.
        names: the kernel's names of exit reasons.

    """
    made = []
    for table, shape in shapes(names).items():
        cells: dict[tuple[int | None, int | None, int | None, tuple[str, ...]], Cell] = {}
        for key, cell in counted.cells.items():
            if key.table == table and cell.count:
                group = (
                    key.vm if "vm" in by else None,
                    key.vcpu if "vcpu" in by and key.vcpu != NO_VCPU else None,
                    # A generation is nobody's level.
                    key.level if "level" in by and table != Table.GENERATION else None,
                )
                own = tuple(say(key) for _, say in shape.columns)
                cells.setdefault((*group, own), Cell()).add(cell.count, cell.times)
        evicted = counted.evicted.get(table, 0)
        total = sum(cell.count for cell in cells.values()) + evicted
        if not total:
            continue
        rows = [
            Row(
                *place[:3],
                place[3],
                cell.count,
                cell.count / total,
                cell.count / counted.seconds if counted.seconds else None,
                cell.times,
            )
            for place, cell in cells.items()
        ]
        made.append(Rows(shape, _sorted(rows, sort), total, evicted))
    return made


def figure(times: Times, name: str) -> float:
    """A figure of times by its name in `SORTS`, ns."""
    if name in ("p50", "p99"):
        return times.quantile(int(name[1:]) / 100)
    return float(
        {"total": times.total, "min": times.min, "mean": times.mean, "max": times.max}[name]
    )


def _sorted(rows: Iterable[Row], sort: str) -> list[Row]:
    def size(row: Row) -> float:
        if sort == "count":
            return row.count
        return figure(row.times, sort) if row.times else -1.0

    named = sorted(rows, key=lambda r: (r.vm or 0, r.vcpu or 0, r.level or 0, _by_name(r.cells)))
    return named if sort == "name" else sorted(named, key=size, reverse=True)


def _by_name(cells: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Names in their order, and numbers in theirs."""
    return tuple((len(cell) if cell.startswith("0x") else 0, cell) for cell in cells)
