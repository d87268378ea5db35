# SPDX-License-Identifier: MIT
"""One host: its files in the order of their events, analysed as `analyze` does."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from kvmprobe import __version__
from kvmprobe.analysis.findings import Finding
from kvmprobe.analysis.integrity import name_of
from kvmprobe.analysis.run import Analysis, CaptureAnalysis, analyze
from kvmprobe.analysis.verdict import worst
from kvmprobe.analysis.words import INCONCLUSIVE, VERDICTS
from kvmprobe.errors import CaptureError
from kvmprobe.fleet.stream import Stream
from kvmprobe.fleet.survey import Facts, Surveyed, span_of
from kvmprobe.probes.schema import LossCause, Type

#: Of a host's result: a worker of another kvmprobe would make another.
FORMAT = 1


@dataclass(frozen=True)
class Host:
    """A host of the fleet and all its files.

    `id` names it in the result's files; `notes` are told to the user: nothing is wrong in them.
    """

    id: str
    name: str
    machine: str | None
    files: tuple[Surveyed, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(each.file.size for each in self.files)


@dataclass
class _Part:
    """A file that belongs to a recording, and the times of its events."""

    each: Surveyed
    span: tuple[int, int, int]


def analyze_host(host: Host) -> dict[str, Any]:
    """Analyse a host's files and return its result: what JSON takes, rows of all tables.

    Files of one recording are one stream, in the order of their events; each recording numbers its
    VMs anew.  What can't be read is among `problems`, and weakens the verdict.  Runs on a worker.
    """
    began = time.process_time()
    result = empty_result(host)
    problems = [f"{s.file.url}: {s.facts.problem}" for s in host.files if s.facts.problem]
    refused = len(problems)
    notes: list[str] = []
    captures: list[tuple[list[_Part], CaptureAnalysis]] = []
    times: list[int] = []
    for parts in _recordings(host.files, problems, notes):
        facts = parts[0].each.facts
        try:
            with ExitStack() as opened:
                files = [part.each.file for part in parts]
                stream = opened.enter_context(Stream(files, facts.recording))
                captures.append((parts, analyze([stream]).captures[0]))
                problems += stream.problems
        except CaptureError as error:
            problems.append(str(error))
            refused += 1
            continue
        ends = (_wall(facts, ts) for part in parts if part.span[2] for ts in part.span[:2])
        times += [ns for ns in ends if ns is not None]
    analysis = Analysis(tuple(capture for _, capture in captures))
    verdicts = _verdicts(analysis, refused)
    findings = [
        _finding(parts, capture, finding)
        for parts, capture in captures
        for finding in capture.findings
    ]
    seen = [parts[0].each.facts for parts, _ in captures]
    return result | {
        "done": True,
        "notes": notes,
        "problems": problems,
        "verdict": worst(v["verdict"] for v in verdicts),
        "verdicts": verdicts,
        "kernels": _distinct(facts.kernel for facts in seen),
        "configurations": _distinct(facts.configuration for facts in seen),
        "schemas": _distinct(facts.schema for facts in seen),
        "recordings": len(captures),
        "events": analysis.events,
        "lost": analysis.lost,
        "vms": sum(len(capture.vms) for capture in analysis.captures),
        "first_ns": min(times, default=None),
        "last_ns": max(times, default=None),
        "findings": findings,
        "losses": [
            loss
            for facts, (_, capture) in zip(seen, captures, strict=True)
            for loss in _losses(facts, capture)
        ],
        "seconds": time.process_time() - began,
    }


def empty_result(host: Host, why: str | None = None) -> dict[str, Any]:
    """Return the result of a host of which nothing is known, because of `why`."""
    return {
        "format": FORMAT,
        "version": __version__,
        "done": False,
        "id": host.id,
        "name": host.name,
        "machine": host.machine,
        "inputs": [each.to_json() for each in host.files],
        "notes": [],
        "problems": [] if why is None else [why],
        "verdict": INCONCLUSIVE,
        "verdicts": _verdicts(Analysis(()), 1),
        **{name: [] for name in ("kernels", "configurations", "schemas", "findings", "losses")},
        **dict.fromkeys(("recordings", "events", "lost", "vms", "seconds"), 0),
        "first_ns": None,
        "last_ns": None,
    }


def _recordings(
    files: Iterable[Surveyed], problems: list[str], notes: list[str]
) -> list[list[_Part]]:
    """Put the files of each recording in order, without copies; recordings in order of time."""
    by_recording: dict[str, list[Surveyed]] = {}
    for each in files:
        if each.facts.problem is None:
            by_recording.setdefault(each.facts.recording, []).append(each)
    recordings = []
    for own in by_recording.values():
        parts = []
        for each in own:
            try:
                span = each.facts.span or span_of(each.file)
            except CaptureError as error:
                problems.append(str(error))
                continue
            parts.append(_Part(each, span or (0, 0, 0)))
        parts.sort(key=lambda part: (part.span[0], -part.span[2], part.each.file.url))
        kept = _without_copies(parts, notes)
        if own[0].facts.clock is None:
            # Without a clock, equal headers don't mean one recording.
            recordings += [[part] for part in kept]
        elif kept:
            recordings.append(kept)
    return sorted(recordings, key=lambda parts: (parts[0].each.facts.started or "", parts[0].span))


def _without_copies(parts: list[_Part], notes: list[str]) -> list[_Part]:
    """Leave out what lies within the times of the file before it, and tell."""
    kept: list[_Part] = []
    for part in parts:
        name = part.each.file.url
        if kept and not part.span[2]:
            notes.append(f"{name} has no events")
        elif kept and part.span[1] <= kept[-1].span[1]:
            what = "a copy" if part.span == kept[-1].span else "a copy of a part"
            notes.append(f"{name} is {what} of {kept[-1].each.file.url}: not counted again")
        else:
            kept.append(part)
    return kept


def _verdicts(analysis: Analysis, refused: int) -> list[dict[str, Any]]:
    """Return the verdict on each fault; what was refused unread weakens it."""
    rows = []
    for fault, verdict in analysis.verdicts.items():
        word, missing = verdict.verdict, list(verdict.missing)
        if refused:
            missing.append(f"refused: {refused} file(s)")
            word = min(word, INCONCLUSIVE, key=VERDICTS.index)
        rows.append(
            {"fault": fault, "verdict": word, "basis": list(verdict.basis), "missing": missing}
        )
    return rows


def _finding(parts: list[_Part], capture: CaptureAnalysis, finding: Finding) -> dict[str, Any]:
    vm, facts = capture.names.get(finding.vm), parts[0].each.facts
    before = [part for part in parts if part.span[0] <= finding.first_ts]
    return {
        "rule": finding.rule.id,
        "fault": finding.rule.fault,
        "severity": finding.rule.severity,
        "convicts": finding.rule.convicts,
        "kernel": facts.kernel,
        "configuration": facts.configuration,
        "file": (before or parts)[-1].each.file.url,
        "vm": finding.vm,
        "vm_name": vm.name,
        "pid": vm.pid,
        "vcpu": finding.vcpu,
        "level": finding.level,
        "gpa": finding.gpa if finding.has_gpa else None,
        "slot": finding.slot,
        "slot_confidence": finding.slot_confidence,
        "first_ns": _wall(facts, finding.first_ts),
        "last_ns": _wall(facts, finding.last_ts),
        "count": finding.count,
        "cause": None if finding.cause is None else finding.cause.rule,
        "cause_age_ns": None if finding.cause is None else _within(finding.cause.age_ns),
        "evidence": finding.evidence_total,
    }


def _wall(facts: Facts, ts: int) -> int | None:
    """Turn an event's time into ns since 1970; None: not known, or no time that a clock shows."""
    return None if facts.clock is None else _within(facts.clock + ts)


def _within(ns: int) -> int | None:
    """Leave out a time that only a damaged event can show."""
    return ns if 0 <= ns < 1 << 63 else None


def _losses(facts: Facts, capture: CaptureAnalysis) -> list[dict[str, Any]]:
    return [
        {
            "recording": facts.started,
            "observation": name_of(Type, observation),
            "cpu": cpu,
            "cause": name_of(LossCause, cause),
            "vm": vm or None,
            "records": records,
        }
        for (observation, cpu, cause, vm), records in sorted(capture.integrity.lost.items())
    ]


def _distinct(values: Iterable[str | None]) -> list[str]:
    """Different values, in order; what is not known is left out."""
    return list(dict.fromkeys(value for value in values if value))
