# SPDX-License-Identifier: MIT
"""Where an answer comes from: a running watch, a recording made now, or a capture."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kvmprobe.analysis.findings import Finding
from kvmprobe.analysis.judge import Judge, Reading, Report
from kvmprobe.analysis.verdict import INCONCLUSIVE
from kvmprobe.analysis.vms import VmNames
from kvmprobe.capture.plan import Row
from kvmprobe.check.model import Found, Seen, VmSeen, vm_label
from kvmprobe.errors import KvmprobeError
from kvmprobe.host.exposure import Exposure, exposures
from kvmprobe.store.reader import CaptureReader
from kvmprobe.watch import status as statuses

#: What a live check may take beyond its duration, seconds: monitoring gives up at 10.
STARTUP = 1.5
#: Seconds that are watched however long the start took.
_LEAST = 1.0


def ask_watch(
    directory: Path, configured: Iterable[Exposure]
) -> tuple[Seen | None, tuple[str, ...]]:
    """What a running watch knows; without a status to believe, what is wrong with the one there.

    directory: its runtime directory.  configured: what this host's configuration says.
    """
    try:
        status = statuses.read(directory)
    except statuses.StatusError as error:
        there = (directory / statuses.FILE_NAME).exists()
        return None, (str(error),) if there else ()
    age = status.age()
    if not 0 <= age < statuses.MAX_AGE:
        return None, (f"kvmprobe watch hangs: its status is {age:.0f} s old",)
    verdicts = {fault: said.verdict for fault, said in status.verdicts.items()}
    missing = _unique(m for said in status.verdicts.values() for m in said.missing)
    seen = Seen(
        source="watch",
        seconds=status.seconds,
        vms=len(status.vms) + status.vms_left_out,
        events=sum(status.events.values()),
        lost=status.lost,
        found=[
            Found(
                rules=tuple(latched.rules),
                severity=latched.severity,
                fault=latched.fault,
                vm=vm_label(latched.vm, latched.pid),
                count=latched.count,
                ignored=latched.ignored,
            )
            for latched in status.findings
        ],
        verdicts=verdicts,
        missing=missing,
        each=[
            VmSeen(
                vm_label(vm.name, vm.pid),
                vm.verdicts,
                tuple(f"lost: {count} of {name}" for name, count in vm.lost.items() if count)
                or missing,
            )
            for vm in status.vms
        ],
        unreachable=_unreachable(configured),
        attached=[(observation, site, True) for observation, site in status.attached],
    )
    return seen, ()


def record(duration: float, begun: float, configured: Iterable[Exposure]) -> Seen:
    """Watch this host for `duration` seconds, less where the start was slow; nothing is kept.

    begun: when the check began (CLOCK_MONOTONIC, s).
    """
    from kvmprobe.capture.session import Filters, Session
    from kvmprobe.probes.schema import columns

    unreachable = _unreachable(configured)
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
        unreachable=_unreachable(configured),
        notes=(f"the capture ends early: {reading.truncated}",) if reading.truncated else (),
    )


def _of_report(report: Report, names: VmNames, plan: Sequence[Row]) -> Seen:
    return Seen(
        source="live",
        vms=len(report.vms),
        lost={name: count for name, count in report.coverage.lost.items() if count},
        found=[_found(finding, names) for finding in report.findings],
        verdicts={fault: said.verdict for fault, said in report.verdicts.items()},
        missing=_unique(m for said in report.verdicts.values() for m in said.missing),
        each=[
            VmSeen(
                vm_label(said.vm.name, said.vm.pid),
                {fault: v.verdict for fault, v in said.verdicts.items()},
                _unique(
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


def _unreachable(configured: Iterable[Exposure]) -> Mapping[str, str]:
    return {e.fault: e.reason for e in configured if e.word == "unreachable"}


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
