# SPDX-License-Identifier: MIT
"""The page of a fleet: the overview, and each host's findings below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kvmprobe import __version__
from kvmprobe.analysis.rules import RULES
from kvmprobe.analysis.rules.model import SEVERITIES
from kvmprobe.analysis.text import duration, slot_name
from kvmprobe.analysis.words import INCONCLUSIVE, NOT_EXERCISED, VERDICTS, VULNERABLE
from kvmprobe.errors import CaptureError
from kvmprobe.fleet.results import read_summary
from kvmprobe.fleet.text import moment
from kvmprobe.probes.schema import NO_VCPU
from kvmprobe.report import page as single

_HERE = Path(__file__).parent
#: Hosts with a card of their own, rows of findings in it, and hosts in the table of all others.
MAX_CARDS = 500
MAX_FINDINGS = 50
MAX_ROWS = 5000
#: Days between the first and the last up to which those with nothing are drawn too.
MAX_DAYS = 1000
_SEVERITY = {rule.id: rule.severity for rule in RULES}
_ORDER = {rule.id: number for number, rule in enumerate(RULES)}


@dataclass
class Card:
    """A host of which there is something to tell."""

    anchor: str
    name: str
    verdict: str
    began: str
    lines: list[tuple[str, str]]
    missing: list[str]
    problems: list[str]
    notes: list[str]
    findings: list[Mapping[str, str]] = field(default_factory=list)
    more: int = 0


@dataclass(frozen=True)
class Bar:
    """A part of a bar, in thousandths of its width."""

    verdict: str
    x: float
    width: float
    count: int


def render(folder: Path) -> Iterator[str]:
    """Yield the page's text, part by part: HTML, UTF-8, without anything outside itself.

    Raises:
        CaptureError: the folder has no finished result.

    """
    summary = read_summary(folder)
    hosts = sorted(
        _rows(folder, "hosts"),
        key=lambda h: (VERDICTS.index(h["verdict"]), -h["findings"], h["host"], h["id"]),
    )
    cards, others = _cards(folder, hosts)
    common = Path(single.__file__).parent
    script = single.joined(common / "page.js", _HERE / "fleet.js")
    style = single.joined(common / "report.css", _HERE / "fleet.css")
    faults = {**summary["faults"], "the worst of all": summary["verdicts"]}
    return (
        single.templates(_HERE)
        .get_template("fleet.html.j2")
        .generate(
            version=__version__,
            script=Markup(script),  # noqa: S704 - our own files
            style=Markup(style),  # noqa: S704
            script_hash=single.digest(script),
            style_hash=single.digest(style),
            summary=summary,
            worst=_worst(summary["verdicts"]),
            began=summary["began"] and moment(summary["began"]["ns"]),
            faults={fault: _bars(counts) for fault, counts in faults.items()},
            counts=faults,
            days=_days(summary["hosts_began_by_day"]),
            rules=_rules(summary["rules"]),
            verdicts=VERDICTS,
            cards=cards,
            others=others[:MAX_ROWS],
            left_out=max(0, len(others) - MAX_ROWS),
        )
    )


def _rows(folder: Path, table: str) -> list[dict[str, Any]]:
    """Return a table's rows, times as ns since 1970; raises CaptureError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{table}.parquet"
    try:
        columns = pq.read_table(path)
        for number, column in enumerate(columns.schema):
            if pa.types.is_timestamp(column.type):
                values = columns.column(number).cast("int64")
                columns = columns.set_column(number, column.name, values)
        return list(columns.to_pylist())
    except (OSError, ValueError):
        raise CaptureError(f"{path} can't be read; analyse again") from None


def _worst(counts: Mapping[str, int]) -> str:
    return next((verdict for verdict in VERDICTS if counts[verdict]), NOT_EXERCISED)


def _cards(
    folder: Path, hosts: list[dict[str, Any]]
) -> tuple[list[Card], list[tuple[str, str, str, str]]]:
    """Make cards of hosts with something to tell, and rows of all others."""
    cards: dict[str, Card] = {}
    others = []
    for host in hosts:
        telling = host["findings"] or host["problems"] or host["notes"]
        if len(cards) < MAX_CARDS and (telling or host["verdict"] in (VULNERABLE, INCONCLUSIVE)):
            cards[host["id"]] = _card(host, f"host-{len(cards) + 1}")
        else:
            kernels = ", ".join(host["kernels"]) or "unknown"
            others.append((host["host"], host["verdict"], kernels, f"{host['events']:,}"))
    for verdict in _rows(folder, "verdicts"):
        card = cards.get(verdict["id"])
        if card is not None and verdict["verdict"] == INCONCLUSIVE:
            card.missing += [m for m in verdict["missing"] if m not in card.missing]
    findings = sorted(
        _rows(folder, "findings"),
        key=lambda f: (
            -SEVERITIES.index(f["severity"]),
            _ORDER.get(f["rule"], 99),
            f["first"] or 0,
        ),
    )
    for finding in findings:
        card = cards.get(finding["id"])
        if card is None:
            continue
        if len(card.findings) < MAX_FINDINGS:
            card.findings.append(_finding(finding))
        else:
            card.more += 1
    return list(cards.values()), others


def _card(host: Mapping[str, Any], anchor: str) -> Card:
    return Card(
        anchor=anchor,
        name=host["host"],
        verdict=host["verdict"],
        began=moment(host["began"]) if host["began"] is not None else "",
        lines=[
            ("Kernels", ", ".join(host["kernels"]) or "unknown"),
            ("Configurations", "; ".join(host["configurations"]) or "unknown"),
            ("Seen", f"{moment(host['first'])} to {moment(host['last'])}"),
            ("Files", f"{host['files']:,}"),
            ("Recordings", f"{host['recordings']:,}"),
            ("Events", f"{host['events']:,}, {host['lost']:,} lost"),
            ("Machine", host["machine"] or "unknown"),
        ],
        missing=[],
        problems=host["problems"],
        notes=host["notes"],
    )


def _finding(finding: Mapping[str, Any]) -> dict[str, str]:
    vm = f"VM {finding['vm']}"
    named = [finding["vm_name"], finding["pid"] is not None and f"pid {finding['pid']}"]
    vm += f" ({', '.join(str(n) for n in named if n)})" if any(named) else ""
    vcpu = "" if finding["vcpu"] == NO_VCPU else f", vCPU {finding['vcpu']}, {finding['level']}"
    where = "" if finding["gpa"] is None else f"0x{finding['gpa']:x} ({slot_name(finding['slot'])})"
    cause = ""
    if finding["cause"] and finding["cause_age_ns"] is not None:
        cause = f"{finding['cause']}, {duration(finding['cause_age_ns'])} before"
    return {
        "rule": finding["rule"],
        "severity": finding["severity"],
        "where": where,
        "place": vm + vcpu,
        "when": moment(finding["first"]),
        "count": f"{finding['count']:,}",
        "cause": cause,
        "kernel": finding["kernel"] or "unknown",
        "file": finding["file"],
    }


def _bars(counts: Mapping[str, int]) -> list[Bar]:
    """Cut a bar into its verdicts; what is there is wide enough to be seen."""
    there = [(verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict]]
    total = sum(count for _, count in there)
    widths = [max(6.0, 1000 * count / total) for _, count in there]
    scale = 1000 / sum(widths) if widths else 1
    bars, x = [], 0.0
    for (verdict, count), width in zip(there, widths, strict=True):
        bars.append(Bar(verdict, round(x, 1), round(width * scale, 1), count))
        x += width * scale
    return bars


def _days(days: Mapping[str, int]) -> list[tuple[str, int, float, float, float]]:
    """Make a column of each day: day, hosts, x, width and height in thousandths and hundredths."""
    if days:
        first, last = date.fromisoformat(min(days)), date.fromisoformat(max(days))
        if (last - first).days < MAX_DAYS:
            every = [f"{first + timedelta(n)}" for n in range((last - first).days + 1)]
            days = {day: days.get(day, 0) for day in every}
    most = max(days.values(), default=1)
    width = 1000 / max(len(days), 1)
    return [
        (day, count, round(n * width, 1), round(width * 0.9, 1), round(100 * count / most, 1))
        for n, (day, count) in enumerate(days.items())
    ]


def _rules(rules: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    known = {rule.id: rule for rule in RULES}
    listed = sorted(
        rules, key=lambda r: (-SEVERITIES.index(_SEVERITY.get(r, "info")), _ORDER.get(r, 99))
    )
    return [
        {
            "id": rule,
            "severity": _SEVERITY.get(rule, "info"),
            "title": known[rule].title if rule in known else "",
            "to_do": known[rule].to_do if rule in known else "",
            **rules[rule],
        }
        for rule in listed
    ]
