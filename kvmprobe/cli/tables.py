# SPDX-License-Identifier: MIT
"""Plain text tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from kvmprobe.capture.plan import Row


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Rows of cells as lines, every column but the last padded to its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    return [
        indent
        + "  ".join(
            [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    ]


def plan_lines(rows: Sequence[Row]) -> list[str]:
    """A plan as text: what is attached by observation, then what is not and why.

    A capture's plan may hold null for a site, an attachment or a reason.
    """
    used = [
        (r["observation"], r["site"] or "-", r["attachment"] or "-") for r in rows if r["attached"]
    ]
    left: dict[str, dict[str, None]] = {}
    for r in rows:
        if not r["attached"]:
            target = (r["attachment"] or r["observation"]).rpartition(":")[2]
            left.setdefault(r["reason"] or "no reason given", {})[target] = None
    lines = ["attached:", *columns(used, "  ")]
    if left:
        lines.append("not attached:")
    for reason, targets in left.items():
        lines += textwrap.wrap(", ".join(targets), 76, initial_indent="  ", subsequent_indent="  ")
        lines += textwrap.wrap(reason, 76, initial_indent="    ", subsequent_indent="    ")
    return lines
