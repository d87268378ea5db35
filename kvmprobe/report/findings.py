# SPDX-License-Identifier: MIT
"""Findings for the page: by rule, the worst first; none is left out."""

from __future__ import annotations

from dataclasses import dataclass

from kvmprobe.analysis.findings import Finding, level_of
from kvmprobe.analysis.integrity import name_of
from kvmprobe.analysis.rules.model import SEVERITIES, Rule
from kvmprobe.analysis.run import CaptureAnalysis
from kvmprobe.analysis.text import duration, slot_name, vm_name
from kvmprobe.probes.schema import NO_VCPU, Flag, Site, Type
from kvmprobe.report.gather import Gathered
from kvmprobe.report.story import sentence

#: Rows of evidence on the page, over all findings; beyond that each finding shows its first few.
MAX_EVIDENCE = 2000
#: Findings with a card of their own; the others are rows of a table.
MAX_CARDS = 200
_FEW = 5
#: Flags that say only that others mean something, or what is said in words.
_DULL = Flag.LEVEL_KNOWN | Flag.AS_KNOWN | Flag.SLOT_KNOWN | Flag.GEN_KNOWN | Flag.CANDIDATE
_DULL |= Flag.FILL_AS_KNOWN | Flag.L2
_SITES = frozenset(int(site) for site in Site)


@dataclass(frozen=True)
class Step:
    """One event of evidence: when (since the start, and since the step before), and what."""

    at: str
    after: str
    level: str
    text: str
    convicts: bool
    raw: str


@dataclass(frozen=True)
class Card:
    """One finding as the page tells it; times in ns as the events have them."""

    anchor: str
    vm: int
    vcpu: int
    place: str
    where: str
    when: str
    cause: str
    first_ts: int
    last_ts: int
    count: int
    marks: tuple[int, ...]
    steps: tuple[Step, ...]
    evidence_total: int


@dataclass(frozen=True)
class RuleGroup:
    """The findings of one rule: `cards` are all of them, the first `detailed` in full."""

    rule: Rule
    cards: tuple[Card, ...]
    detailed: int
    total: int


def rule_groups(found: Gathered) -> list[RuleGroup]:
    """Return the findings by rule: by severity, then in the order they were seen."""
    capture = found.capture
    by_rule: dict[str, list[Finding]] = {}
    for finding in capture.findings:
        by_rule.setdefault(finding.rule.id, []).append(finding)
    groups = sorted(
        by_rule.values(), key=lambda own: -SEVERITIES.index(own[0].rule.severity)
    )  # sorted() keeps the order of equals
    shown = min(MAX_CARDS, len(capture.findings))
    limit = max(_FEW, MAX_EVIDENCE // max(shown, 1))
    result, number = [], 0
    for own in groups:
        cards = []
        for finding in own:
            number += 1
            cards.append(
                _card(capture, finding, f"finding-{number}", limit if number <= shown else 0)
            )
        detailed = max(0, min(len(cards), shown - (number - len(cards))))
        result.append(RuleGroup(own[0].rule, tuple(cards), detailed, sum(f.count for f in own)))
    return result


def _card(capture: CaptureAnalysis, finding: Finding, anchor: str, limit: int) -> Card:
    vm = capture.names.get(finding.vm)
    place = vm_name(vm)
    if finding.vcpu != NO_VCPU:
        thread = capture.names.thread(finding.vm, finding.vcpu)
        in_thread = "" if thread in (None, vm.pid) else f" (thread {thread})"
        place += f", vCPU {finding.vcpu}{in_thread}"
        place += f", {'level unknown' if finding.level == 'unknown' else finding.level}"
    where = ""
    if finding.has_gpa:
        presumed = ", presumed" if finding.slot_confidence == "presumed" else ""
        where = f"0x{finding.gpa:x} ({slot_name(finding.slot)}{presumed})"
    when = f"{duration(capture.since_start(finding.first_ts))} after the start"
    if finding.count > 1:
        when += f", {finding.count:,} times within {duration(finding.last_ts - finding.first_ts)}"
        when += f" ({finding.rate:,.1f} a second)" if finding.rate is not None else ""
    else:
        when += ", once"
    cause = ""
    if finding.cause is not None:
        cause = (
            f"the newest {finding.cause.rule} on this vCPU, {duration(finding.cause.age_ns)} "
            f"before; {finding.cause.count:,} in all"
        )
    return Card(
        anchor=anchor,
        vm=finding.vm,
        vcpu=finding.vcpu,
        place=place,
        where=where,
        when=when,
        cause=cause,
        first_ts=finding.first_ts,
        last_ts=finding.last_ts,
        count=finding.count,
        marks=tuple(finding.evidence["ts"][:limit].tolist()),
        steps=tuple(_steps(capture, finding, limit)),
        evidence_total=finding.evidence_total,
    )


def _steps(capture: CaptureAnalysis, finding: Finding, limit: int) -> list[Step]:
    steps = []
    before: int | None = None
    for row in finding.evidence[:limit]:
        ts, flags = int(row["ts"]), int(row["flags"])
        names = [str(flag.name) for flag in Flag if flags & flag and flag not in _DULL]
        site = int(row["site"])
        steps.append(
            Step(
                at=duration(capture.since_start(ts)),
                after="" if before is None else f"+{duration(ts - before)}",
                level=level_of(flags),
                text=sentence(row),
                convicts=bool(row == finding.first),
                raw=" ".join(
                    [
                        name_of(Type, int(row["type"])),
                        f"at {Site(site).name if site in _SITES else site},",
                        f"seq {row['seq']},",
                        f"generation {row['gen']}",
                        *names,
                    ]
                ),
            )
        )
        before = ts
    return steps
