# SPDX-License-Identifier: MIT
"""An analysis for people: the verdict first, what it rests on, then the findings."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from kvmprobe.analysis.findings import Finding
from kvmprobe.analysis.vms import Vm, printable
from kvmprobe.analysis.words import VERDICTS
from kvmprobe.probes.schema import NO_VCPU, SLOT_APIC, SLOT_IDENTITY, SLOT_TSS

if TYPE_CHECKING:
    from kvmprobe.analysis.run import Analysis, CaptureAnalysis

#: Lines are never longer.
MAX_WIDTH = 100
#: VMs named in a line.
_LISTED = 8
_SLOTS = {SLOT_TSS: "TSS", SLOT_APIC: "APIC access page", SLOT_IDENTITY: "identity map"}


def slot_name(slot: int | None) -> str:
    """Name a memslot: TSS, identity map, APIC access page, user slot N, or none."""
    if slot is None:
        return "no slot"
    return _SLOTS.get(slot) or f"user slot {slot}"


def duration(ns: int) -> str:
    """Write a time in the unit that suits it: ns, us, ms or s."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if abs(ns) >= size:
            return f"{ns / size:.3f} {unit}"
    return f"{ns} ns"


def _many(count: int, one: str) -> str:
    return f"{count:,} {one}{'' if count == 1 else 's'}"


class _Page:
    """Lines of at most `width` columns, wrapped under their heads."""

    def __init__(self, width: int) -> None:
        self.width = min(width, MAX_WIDTH)
        self.lines: list[str] = []

    def put(self, text: str = "", *, head: str = "", indent: int = 0, hang: int = 0) -> None:
        lead = " " * indent + head
        wrapped = textwrap.wrap(
            printable(text),
            self.width,
            initial_indent=lead,
            subsequent_indent=" " * max(hang, indent),
        )
        self.lines += wrapped or [lead.rstrip()]


def render(analysis: Analysis, width: int = 80) -> str:
    """Return the whole text, ending in a newline.

    Args:
        analysis: what to tell.
        width: columns to fill; more than `MAX_WIDTH` counts as that.

    """
    page = _Page(width)
    page.put(f"Verdict: {analysis.verdict}")
    for fault, verdict in analysis.verdicts.items():
        page.put()
        page.put(f"{fault}: {verdict.verdict}", indent=2)
        for line in verdict.basis:
            page.put(line, head="because ", indent=4, hang=12)
        for line in verdict.missing:
            page.put(line, head="missing ", indent=4, hang=12)
    page.put()
    _put_captures(page, analysis)
    _put_vms(page, analysis)
    findings = analysis.findings
    page.put()
    page.put(_many(len(findings), "finding") + (":" if findings else "."))
    explained: set[str] = set()
    several = len(analysis.captures) > 1
    for capture, finding in findings:
        page.put()
        _put_finding(page, capture, finding, name_capture=several)
        if finding.rule.id not in explained:
            explained.add(finding.rule.id)
            page.put(finding.rule.explain, indent=4)
    return "\n".join(page.lines) + "\n"


def _put_captures(page: _Page, analysis: Analysis) -> None:
    for capture in analysis.captures:
        integrity = capture.integrity
        text = (
            f"{capture.path}: {_many(integrity.total, 'event')}, "
            f"{_many(integrity.lost_total, 'record')} lost"
        )
        if capture.header["started"]:
            text += f", recorded {capture.header['started']}"
        page.put(text, hang=2)
        if integrity.anomaly_counts:
            kinds = sorted(integrity.anomaly_counts.items())
            named = ", ".join(f"{kind} ({count:,})" for kind, count in kinds)
            page.put(f"events that no kernel makes: {named}", indent=2, hang=4)
        source = capture.header["source"]
        if source["note"]:
            page.put(str(source["note"]), indent=2)


def _put_vms(page: _Page, analysis: Analysis) -> None:
    """Tell of VMs whose verdict isn't that of most: of which something was lost, say."""
    for capture in analysis.captures:
        verdicts = Counter(report.verdict for report in capture.vms.values())
        if len(verdicts) < 2:
            continue
        page.put()
        name = f" in {capture.path}" if len(analysis.captures) > 1 else ""
        page.put(f"VMs{name}:")
        for verdict in sorted(verdicts, key=VERDICTS.index):
            own = [r.vm for r in capture.vms.values() if r.verdict == verdict]
            listed = ", ".join(vm_name(vm) for vm in own[:_LISTED])
            more = f" and {len(own) - _LISTED:,} more" if len(own) > _LISTED else ""
            page.put(f"{verdict}: {listed}{more}", indent=2, hang=4)


def vm_name(vm: Vm) -> str:
    """A VM's number, and its name and process where they are known; printable."""
    process = ", ".join(
        part for part in (vm.name, None if vm.pid is None else f"pid {vm.pid}") if part
    )
    return f"VM {vm.id}{f' ({process})' if process else ''}"


def _put_finding(
    page: _Page, capture: CaptureAnalysis, finding: Finding, *, name_capture: bool
) -> None:
    vm = capture.names.get(finding.vm)
    presumed = ", presumed" if finding.slot_confidence == "presumed" else ""
    level = "level unknown" if finding.level == "unknown" else finding.level
    page.put(f"{finding.rule.severity} {finding.rule.id}: {finding.rule.title}", indent=2, hang=4)
    if name_capture:
        page.put(capture.path, head="in      ", indent=4, hang=12)
    where = vm_name(vm)
    if finding.has_gpa:
        where = f"gpa 0x{finding.gpa:x} ({slot_name(finding.slot)}{presumed}), {where}"
    if finding.vcpu != NO_VCPU:
        thread = capture.names.thread(finding.vm, finding.vcpu)
        in_thread = "" if thread in (None, vm.pid) else f" (thread {thread})"
        where += f", vCPU {finding.vcpu}{in_thread}, {level}"
    page.put(
        where,
        head="where   ",
        indent=4,
        hang=12,
    )
    when = f"{duration(capture.since_start(finding.first_ts))} after the start"
    if finding.count > 1:
        span = duration(finding.last_ts - finding.first_ts)
        when += f", {finding.count:,} times within {span}"
        if finding.rate is not None:
            when += f" ({finding.rate:,.1f} a second)"
    else:
        when += ", once"
    page.put(when, head="when    ", indent=4, hang=12)
    if finding.cause is not None:
        page.put(
            f"the newest {finding.cause.rule} on this vCPU, {duration(finding.cause.age_ns)} "
            f"before; {finding.cause.count:,} in all",
            head="cause   ",
            indent=4,
            hang=12,
        )
    kept = f", the first {len(finding.evidence)} kept"
    page.put(
        _many(finding.evidence_total, "event")
        + (kept if finding.evidence_total > len(finding.evidence) else ""),
        head="proof   ",
        indent=4,
        hang=12,
    )
