# SPDX-License-Identifier: MIT
"""The answer of a running watch: quick, for nothing is observed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvmprobe.check.model import Found, Seen, VmSeen, unique, unreachable_by, vm_label
from kvmprobe.host.exposure import Exposure
from kvmprobe.watch import status as statuses


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
    missing = unique(m for said in status.verdicts.values() for m in said.missing)
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
        unreachable=unreachable_by(configured),
        attached=[(observation, site, True) for observation, site in status.attached],
    )
    return seen, ()
