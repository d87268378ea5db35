# SPDX-License-Identifier: MIT
"""A judge's report in the words of the status file."""

from __future__ import annotations

from collections.abc import Mapping

from kvmprobe.analysis.judge import Report
from kvmprobe.analysis.rules import FAULTS
from kvmprobe.analysis.vms import VmNames
from kvmprobe.analysis.words import INCONCLUSIVE, VERDICTS, VULNERABLE
from kvmprobe.watch.latch import VmKey
from kvmprobe.watch.status import FaultVerdict, WatchedVm


def fault_verdicts(report: Report | None, detached: str | None) -> dict[str, FaultVerdict]:
    """The verdict on each fault.

    Args:
        report: what the judge says; None: nothing was observed yet.
        detached: why no probe is attached, if so; then what isn't proven is not known.

    """
    verdicts = {}
    for fault in FAULTS:
        said = report.verdicts[fault] if report is not None else None
        verdict = said.verdict if said is not None else INCONCLUSIVE
        basis, missing = (said.basis, said.missing) if said is not None else ((), ())
        if detached is not None:
            verdict = verdict if verdict == VULNERABLE else INCONCLUSIVE
            missing = (*missing, f"not attached: {detached}")
        verdicts[fault] = FaultVerdict(verdict, basis, missing)
    return verdicts


def watched_vms(
    report: Report, running: Mapping[int, VmKey], names: VmNames
) -> tuple[WatchedVm, ...]:
    """The VMs that run, the worst verdicts first."""
    found = [
        WatchedVm(
            id=number,
            name=names.get(number).name,
            pid=key.pid,
            verdict=said.verdict,
            verdicts={fault: v.verdict for fault, v in said.verdicts.items()},
            lost=dict(said.coverage.lost),
        )
        for number, key in running.items()
        if (said := report.vms.get(number)) is not None
    ]
    return tuple(sorted(found, key=lambda vm: VERDICTS.index(vm.verdict)))
