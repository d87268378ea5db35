# SPDX-License-Identifier: MIT
"""Tables for notebooks; everything in them is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from kvmprobe.analysis.text import duration, slot_name, vm_name
from kvmprobe.analysis.vms import printable
from kvmprobe.analysis.words import VERDICTS

if TYPE_CHECKING:
    from kvmprobe.analysis.run import Analysis

#: Rows shown.
_SHOWN = 100


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an HTML table; a head of empty names is left out."""

    def line(tag: str, cells: Sequence[object]) -> str:
        return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"

    top = f"<thead>{line('th', head)}</thead>" if any(head) else ""
    body = "".join(line("td", row) for row in rows)
    return f"<table><caption>{_text(caption)}</caption>{top}<tbody>{body}</tbody></table>"


def analysis_html(analysis: Analysis) -> str:
    """Return the verdicts, VM by VM where they differ, and the findings."""
    verdicts = table(
        f"Verdict: {analysis.verdict}",
        ("fault", "verdict", "because", "missing"),
        [
            (fault, v.verdict, "; ".join(v.basis), "; ".join(v.missing))
            for fault, v in analysis.verdicts.items()
        ],
    )
    reports = [
        (capture, report) for capture in analysis.captures for report in capture.vms.values()
    ]
    reports.sort(key=lambda each: VERDICTS.index(each[1].verdict))
    if len({report.verdict for _, report in reports}) > 1:
        more = f"; the first {_SHOWN} are shown" if len(reports) > _SHOWN else ""
        verdicts += table(
            f"{len(reports):,} VMs{more}",
            ("capture", "VM", "verdict", "missing"),
            [
                (
                    capture.path,
                    vm_name(report.vm),
                    report.verdict,
                    "; ".join(
                        dict.fromkeys(m for v in report.verdicts.values() for m in v.missing)
                    ),
                )
                for capture, report in reports[:_SHOWN]
            ],
        )
    findings = analysis.findings
    if not findings:
        return verdicts
    more = f"; the first {_SHOWN} are shown" if len(findings) > _SHOWN else ""
    return verdicts + table(
        f"{len(findings):,} findings{more}",
        ("severity", "rule", "VM", "vCPU", "level", "gpa", "memslot", "first seen", "times"),
        [
            (
                f.rule.severity,
                f.rule.id,
                " ".join(filter(None, (str(f.vm), capture.names.get(f.vm).name))),
                f.vcpu,
                f.level,
                f"0x{f.gpa:x}" if f.has_gpa else "",
                slot_name(f.slot),
                duration(capture.since_start(f.first_ts)),
                f"{f.count:,}",
            )
            for capture, f in findings[:_SHOWN]
        ],
    )


def _text(value: object) -> str:
    return escape(printable(str(value)))
