# SPDX-License-Identifier: MIT
"""What all hosts together show: how many, which kernels and configurations, since when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kvmprobe.analysis.words import VERDICTS
from kvmprobe.fleet.tables import earliest

#: Kernels and configurations that are told; those with the most hosts hit first.
_LISTED = 1000
_UNKNOWN = "unknown"


class Summary:
    """Adds up hosts."""

    def __init__(self) -> None:
        """Begin with none."""
        self._totals: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._faults: dict[str, Counter[str]] = {}
        self._rules: dict[str, Counter[str]] = {}
        self._kernels: dict[str, Counter[str]] = {}
        self._configurations: dict[str, Counter[str]] = {}
        self._days: Counter[str] = Counter()
        self._began: tuple[int, str, str] | None = None

    def add(self, result: Mapping[str, Any]) -> None:
        """Add one host's result."""
        self._totals.update(
            hosts=1,
            done=int(result["done"]),
            with_problems=bool(result["problems"]),
            files=len(result["inputs"]),
            bytes=sum(each["file"]["size"] for each in result["inputs"]),
            seconds=result["seconds"],
            **{name: result[name] for name in ("recordings", "vms", "events", "lost")},
            findings=len(result["findings"]),
        )
        self._verdicts[result["verdict"]] += 1
        for verdict in result["verdicts"]:
            self._faults.setdefault(verdict["fault"], Counter())[verdict["verdict"]] += 1
        for rule in {f["rule"] for f in result["findings"]}:
            own = [f for f in result["findings"] if f["rule"] == rule]
            self._rules.setdefault(rule, Counter()).update(
                hosts=1, findings=len(own), times=sum(f["count"] for f in own)
            )
        convicting = [f for f in result["findings"] if f["convicts"]]
        for table, seen, column in (
            (self._kernels, result["kernels"], "kernel"),
            (self._configurations, result["configurations"], "configuration"),
        ):
            hit = {f[column] or _UNKNOWN for f in convicting}
            for name in {*seen, *hit}:
                table.setdefault(name, Counter()).update(hosts=1, hit=int(name in hit))
        began = earliest(convicting)
        if began is not None:
            self._days[f"{datetime.fromtimestamp(began / 1e9, UTC):%Y-%m-%d}"] += 1
            first = min(convicting, key=lambda f: (f["first_ns"] is None, f["first_ns"] or 0))
            if self._began is None or began < self._began[0]:
                self._began = began, result["name"], first["rule"]

    def document(self) -> dict[str, Any]:
        """Return all as JSON takes it."""
        began = self._began
        return {
            **{name: self._totals[name] for name in (
                "hosts", "done", "with_problems", "files", "bytes", "recordings", "vms", "events",
                "lost", "findings", "seconds",
            )},
            "verdicts": {verdict: self._verdicts[verdict] for verdict in VERDICTS},
            "faults": {
                fault: {verdict: counts[verdict] for verdict in VERDICTS}
                for fault, counts in self._faults.items()
            },
            "rules": {rule: dict(counts) for rule, counts in sorted(self._rules.items())},
            "kernels": _ranked(self._kernels, "kernel"),
            "configurations": _ranked(self._configurations, "configuration"),
            "began": began and {"ns": began[0], "host": began[1], "rule": began[2]},
            "hosts_began_by_day": dict(sorted(self._days.items())),
        }  # fmt: skip


def _ranked(table: Mapping[str, Counter[str]], column: str) -> list[dict[str, Any]]:
    """Those with the most hosts hit first."""
    ranked = sorted(table.items(), key=lambda item: (-item[1]["hit"], -item[1]["hosts"], item[0]))
    return [
        {column: name, "hosts": counts["hosts"], "hosts_with_findings": counts["hit"]}
        for name, counts in ranked[:_LISTED]
    ]
