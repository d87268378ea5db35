# SPDX-License-Identifier: MIT
"""The summary of a fleet, for people."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kvmprobe.analysis.vms import printable
from kvmprobe.analysis.words import VERDICTS

#: Kernels and configurations shown.
_SHOWN = 10


def moment(ns: int | None) -> str:
    """Write a time in ns since 1970 as a date and a time in UTC."""
    if ns is None:
        return "unknown"
    return f"{datetime.fromtimestamp(ns / 1e9, UTC):%Y-%m-%d %H:%M:%S} UTC"


def render(summary: Mapping[str, Any]) -> str:
    """Return the summary as lines of text."""
    lines = [
        f"{summary['hosts']:,} hosts, {summary['recordings']:,} recordings, "
        f"{summary['events']:,} events, {summary['lost']:,} lost",
        "",
    ]
    lines.append("Hosts by verdict  " + "".join(f"{verdict:>14}" for verdict in VERDICTS))
    for fault, counts in (*summary["faults"].items(), ("the worst of all", summary["verdicts"])):
        lines.append(f"  {fault:<16}" + "".join(f"{counts[verdict]:>14,}" for verdict in VERDICTS))
    if summary["with_problems"]:
        lines += ["", f"{summary['with_problems']:,} hosts have files that can't be read whole"]
    if summary["began"]:
        began = summary["began"]
        lines += ["", f"It began {moment(began['ns'])} on {began['host']}: {began['rule']}"]
    for rule, counts in summary["rules"].items():
        lines.append(f"  {counts['hosts']:>9,}  hosts with {rule}, {counts['times']:,} times")
    for title, key, column in (
        ("kernel", "kernels", "kernel"),
        ("configuration", "configurations", "configuration"),
    ):
        hit = [row for row in summary[key] if row["hosts_with_findings"]]
        if hit:
            lines += ["", f"Hosts with findings by {title}:"]
        for row in hit[:_SHOWN]:
            lines.append(f"  {row['hosts_with_findings']:>9,}  of {row['hosts']:,}  {row[column]}")
        if len(hit) > _SHOWN:
            lines.append(f"  {len(hit) - _SHOWN:,} more in fleet.json")
    return "".join(f"{printable(line)}\n" for line in lines)
