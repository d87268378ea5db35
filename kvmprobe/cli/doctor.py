# SPDX-License-Identifier: MIT
"""`kvmprobe doctor`: can this host be recorded, how, and can the faults occur here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvmprobe.errors import HostError


def doctor(
    captures: Annotated[
        list[Path] | None,
        typer.Option("--capture", help="A capture of this host that may show a fault; repeatable."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also run what `kvmprobe verify` runs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what this host is, what can be observed on it, and what is exposed.

    Attaches every probe for one second, to see that it can be done and which
    VMs run.  Exposure is one word a fault: unreachable (the configuration
    rules it out), reachable (nothing does), shown (by a capture or a verify).

    Exits with 1 when recording is impossible here.
    """
    from kvmprobe.cli.tables import columns, plan_lines
    from kvmprobe.doctor.report import document, examine
    from kvmprobe.doctor.text import facts, rest

    report = examine(captures or [], verify=verify)
    if as_json:
        print(json.dumps(document(report), indent=2), flush=True)
    else:
        lines = columns(facts(report))
        if report.sample.plan:
            lines += plan_lines(report.sample.plan)
        print("\n".join([*lines, *rest(report)]), flush=True)
    if report.problems:
        raise HostError("this host can't be recorded: " + "; ".join(report.problems))
