# SPDX-License-Identifier: MIT
"""Tables for people, and the same as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from kvmprobe import __version__
from kvmprobe.stat.histogram import Times
from kvmprobe.stat.model import Counted, Table
from kvmprobe.stat.tables import Row, Rows, figure, level_name

SCHEMA = "kvmprobe.stat/1"
_FIGURES = ("min", "mean", "p50", "p99", "max")
#: What goes first where there is no room.
_LESS = ("min", "p50", "max", "mean", "rate/s")
_GROUP_TITLES = {"vm": "VM", "vcpu": "vCPU", "level": "level"}


def text(counted: Counted, made: Sequence[Rows], by: Sequence[str], width: int, top: int) -> str:
    """All tables as text, ending in a newline.

    Args:
        counted: what was counted.
        made: its tables.
        by: the groups that have columns.
        width: columns of the terminal; figures are left out where they don't fit.  0: no limit.
        top: rows of a table at most; 0: all.

    """
    timed = any(row.times for table in made for row in table.rows)
    lines = [_summary(counted)]
    for table in made:
        lines += ["", *_table(table, by, width, top, timed)]
    if not made:
        lines += ["", "Nothing happened."]
    notes = [*counted.notes, *_losses(counted)]
    if made and not timed and counted.cells:
        notes.append("times are n/a: no exit and entry were seen")
    if notes:
        lines += ["", *(f"note: {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _summary(counted: Counted) -> str:
    vms = [
        f"VM {vm.number}: {vm.name or 'unknown'}" + (f", pid {vm.pid}" if vm.pid else "")
        for vm in sorted(counted.vms.values(), key=lambda vm: vm.number)
    ]
    return "\n".join([f"{counted.seconds:.3f} s", *vms])


def _losses(counted: Counted) -> list[str]:
    lines = []
    if counted.evicted_rows:
        events = sum(counted.evicted.values())
        lines.append(
            f"{counted.evicted_rows:,} rows gave way to others; they had counted {events:,} times"
        )
    if counted.lost:
        lines.append(f"{counted.lost:,} records or reads were lost: the counts are too low")
    return lines


def _table(table: Rows, by: Sequence[str], width: int, top: int, timed: bool) -> list[str]:
    groups = [name for name in by if any(getattr(row, name) is not None for row in table.rows)]
    heads = [_GROUP_TITLES[name] for name in groups]
    if "level" in groups and table.shape.name in ("fills", "hits"):
        heads[groups.index("level")] = "filled by" if table.shape.name == "fills" else "hit by"
    heads += [title for title, _ in table.shape.columns]
    figures = ["count", "share", "rate/s", *(_FIGURES if timed else ())]
    shown = table.rows[:top] if top else table.rows
    body = [_cells(row, groups, figures) for row in shown]
    rest = len(table.rows) - len(shown)
    left = list(_LESS)
    while True:
        columns = [i for i, name in enumerate(heads + figures) if name not in _LESS or name in left]
        grid = [[line[i] for i in columns] for line in [heads + figures, *body]]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        if not width or not left or sum(widths) + 2 * len(widths) - 2 <= width:
            break
        del left[0]
    lines = [f"{table.shape.title}: {table.total:,}"]
    for line in grid:
        cells = [
            cell.ljust(w) if i < len(heads) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if rest:
        lines.append(f"... and {rest:,} more rows (--top 0 shows all)")
    if table.evicted:
        lines.append(f"{table.evicted:,} were in rows that gave way")
    return lines


def _cells(row: Row, groups: Sequence[str], figures: Sequence[str]) -> list[str]:
    said = {"vm": str(row.vm), "vcpu": "-" if row.vcpu is None else str(row.vcpu)}
    said["level"] = "-" if row.level is None else level_name(row.level)
    numbers = {
        "count": f"{row.count:,}",
        "share": f"{100 * row.share:.1f}%",
        "rate/s": "n/a" if row.rate is None else _rate(row.rate),
    }
    for name in _FIGURES:
        numbers[name] = "n/a" if row.times is None else short_time(figure(row.times, name))
    return [*(said[name] for name in groups), *row.cells, *(numbers[name] for name in figures)]


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"


def short_time(ns: float) -> str:
    """A time for a table: three digits and a unit."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size * 0.9995:
            return f"{ns / size:.3g}{unit}" if ns < size * 999.5 else f"{ns / size:.0f}{unit}"
    return f"{ns:.0f}ns"


def document(counted: Counted, made: Sequence[Rows], by: Sequence[str]) -> dict[str, Any]:
    """The same for programs: all rows, times in ns, None where something is not known.

    schema/stat-1.json describes it.
    """
    return {
        "schema": SCHEMA,
        "tool": {"name": "kvmprobe", "version": __version__},
        "seconds": counted.seconds,
        "by": list(by),
        "vms": [
            {"vm": vm.number, "name": vm.name, "pid": vm.pid}
            for vm in sorted(counted.vms.values(), key=lambda vm: vm.number)
        ],
        "tables": [
            {
                "name": table.shape.name,
                "total": table.total,
                "evicted": table.evicted,
                "rows": [_object(table, row, by) for row in table.rows],
            }
            for table in made
        ],
        "evicted_rows": counted.evicted_rows,
        "lost": counted.lost,
        "notes": counted.notes,
    }


def _object(table: Rows, row: Row, by: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(row, name) for name in by}
    if row.level is not None:
        found["level"] = level_name(row.level)
    titles = (title.replace(" ", "_") for title, _ in table.shape.columns)
    found |= dict(zip(titles, row.cells, strict=True))
    found |= {"count": row.count, "share": row.share, "rate": row.rate}
    found["time_ns"] = None if row.times is None else _figures(row.times)
    return found


def _figures(times: Times) -> dict[str, float]:
    return {
        "exits": times.count,
        "total": times.total,
        **{name: figure(times, name) for name in _FIGURES},
    }


def csv_text(counted: Counted, made: Sequence[Rows]) -> str:
    """One line a row of any table; empty where something is not known."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ("exits", "total", *_FIGURES)
    writer.writerow(
        [
            *("table", "vm", "vm_name", "pid", "vcpu", "level", "what", "access", "memory"),
            *("count", "share", "rate", "exits", *(f"{name}_ns" for name in names[1:])),
        ]
    )
    for table in made:
        titles = [title for title, _ in table.shape.columns]
        for row in table.rows:
            vm = counted.vms.get(row.vm) if row.vm is not None else None
            cells = dict(zip(titles, row.cells, strict=True))
            access, memory = cells.pop("access", ""), cells.pop("memory", "")
            figures = {} if row.times is None else _figures(row.times)
            level = "" if row.level is None else level_name(row.level)
            writer.writerow(
                [table.shape.name, row.vm, vm and vm.name, vm and vm.pid, row.vcpu, level]
                + [next(iter(cells.values()), ""), access, memory]
                + [row.count, f"{row.share:.6f}", row.rate and f"{row.rate:.3f}"]
                + [f"{figures[name]:.0f}" if figures else "" for name in names]
            )
    return file.getvalue()


#: Columns of a line of --interval, and the tables they count.
INTERVAL = {
    "exits": Table.EXIT,
    "faults": Table.FAULT,
    "mmio": Table.MMIO,
    "fills": Table.FILL,
    "hits": Table.HIT,
    "sptes": Table.SPTE,
    "gens": Table.GENERATION,
    "nested": Table.NESTING,
    "insns": Table.EMULATE,
}


def interval_line(before: Counted, now: Counted) -> str:
    """What came between two readings: seconds since the start, then one count a table."""
    counts = [now.total(table) - before.total(table) for table in INTERVAL.values()]
    return " ".join([f"{now.seconds:8.1f}", *(f"{count:>7,}" for count in counts)])


def interval_head() -> str:
    """The heads of such lines."""
    return " ".join([f"{'seconds':>8}", *(f"{name:>7}" for name in INTERVAL)])
