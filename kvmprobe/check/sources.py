# SPDX-License-Identifier: MIT
"""Answers from events: of a recording made now, or of a capture."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from kvmprobe.analysis.findings import Finding
from kvmprobe.analysis.judge import Judge, Reading, Report
from kvmprobe.analysis.vms import VmNames
from kvmprobe.analysis.words import INCONCLUSIVE
from kvmprobe.capture.plan import Row
from kvmprobe.check.model import Found, Seen, VmSeen, unique, unreachable_by, vm_label
from kvmprobe.errors import KvmprobeError
from kvmprobe.host.exposure import Exposure, exposures
from kvmprobe.store.reader import CaptureReader

#: What a live check may take beyond its duration, seconds: monitoring gives up at 10.
STARTUP = 1.5
#: Seconds that are watched however long the start took.
_LEAST = 1.0


def record(duration: float, begun: float, configured: Iterable[Exposure]) -> Seen:
    """Watch this host for `duration` seconds, less where the start was slow; nothing is kept.

    begun: when the check began (CLOCK_MONOTONIC, s).
    """
    from kvmprobe.capture.session import Filters, Session
    from kvmprobe.probes.schema import columns

    unreachable = unreachable_by(configured)
    try:
        with Session(Filters()) as session:
            session.prepare()
            session.attach()
            plan = session.plan.rows()
            judge = Judge(plan, from_first=True)
            started = time.monotonic()
            end = min(started + duration, max(begun + duration + STARTUP, started + _LEAST))
            session.start()
            while time.monotonic() < end:
                time.sleep(session.tick)
                judge.feed(columns(session.drain()))
            seconds = time.monotonic() - started
            judge.feed(columns(session.stop()))
    except KvmprobeError as error:
        return Seen(source="live", unreachable=unreachable, error=str(error))
    seen = _of_report(judge.report(), judge.names, plan)
    events = judge.integrity.total
    return replace(seen, source="live", seconds=seconds, events=events, unreachable=unreachable)


def read_capture(path: Path) -> Seen:
    """What a capture shows.  Its host can't be asked, so only its parameters rule faults out."""
    try:
        with CaptureReader(path) as reader:
            header = reader.header
            judge = Judge(header["plan"], jit=True)
            first = last = None
            for columns in reader.batches():
                judge.feed(columns)
                if len(columns["ts"]):
                    low, high = int(columns["ts"].min()), int(columns["ts"].max())
                    first = low if first is None else min(first, low)
                    last = high if last is None else max(last, high)
            reading = Reading(
                damaged=len(reader.damaged),
                unknown=sum(reader.unknown_events.values()),
                truncated=reader.truncated,
            )
    except KvmprobeError as error:
        return Seen(source="capture", error=str(error))
    seen = _of_report(judge.report(reading), judge.names, header["plan"])
    host = header["host"]
    configured = exposures(host["vendor"], host["parameters"], smm=None, nests=None)
    return replace(
        seen,
        source="capture",
        seconds=0.0 if first is None or last is None else (last - first) / 1e9,
        events=judge.integrity.total,
        unreachable=unreachable_by(configured),
        notes=(f"the capture ends early: {reading.truncated}",) if reading.truncated else (),
    )


def _of_report(report: Report, names: VmNames, plan: Sequence[Row]) -> Seen:
    return Seen(
        source="live",
        vms=len(report.vms),
        lost={name: count for name, count in report.coverage.lost.items() if count},
        found=[_found(finding, names) for finding in report.findings],
        verdicts={fault: said.verdict for fault, said in report.verdicts.items()},
        missing=unique(m for said in report.verdicts.values() for m in said.missing),
        each=[
            VmSeen(
                vm_label(said.vm.name, said.vm.pid),
                {fault: v.verdict for fault, v in said.verdicts.items()},
                unique(
                    m
                    for v in said.verdicts.values()
                    if v.verdict == INCONCLUSIVE
                    for m in v.missing
                ),
            )
            for said in report.vms.values()
        ],
        attached=_attached(plan),
    )


def _found(finding: Finding, names: VmNames) -> Found:
    vm = names.get(finding.vm)
    rule = finding.rule
    label = vm_label(vm.name, vm.pid)
    return Found((rule.id,), rule.severity, rule.fault, label, finding.count)


def _attached(plan: Sequence[Row]) -> list[tuple[str, str, bool]]:
    places: dict[tuple[str, str], bool] = {}
    for row in plan:
        key = row["observation"], row["site"] or ""
        places[key] = places.get(key, False) or row["attached"]
    return [(*key, attached) for key, attached in places.items()]
