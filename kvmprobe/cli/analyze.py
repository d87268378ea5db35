# SPDX-License-Identifier: MIT
"""`kvmprobe analyze`: findings and verdicts of captures."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kvmprobe.errors import UsageError

#: Exit statuses of --fail-on.
_INCONCLUSIVE = 3
_FOUND = 4


def analyze(
    captures: Annotated[
        list[Path], typer.Argument(metavar="CAPTURE...", help="Captures of one host.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    fail_on: Annotated[
        str | None,
        typer.Option(
            "--fail-on",
            help="Exit with 4 for a finding of this severity or above (info, warning, critical), "
            "else with 3 when the verdict is inconclusive.",
        ),
    ] = None,
) -> int:
    """Say what captures show: verdicts, findings and their evidence.  Needs no root."""
    from kvmprobe.analysis.rules.model import SEVERITIES
    from kvmprobe.analysis.run import analyze as analyze_readers
    from kvmprobe.analysis.text import render
    from kvmprobe.analysis.words import INCONCLUSIVE
    from kvmprobe.store.reader import CaptureReader

    if fail_on is not None and fail_on not in SEVERITIES:
        raise UsageError(f"--fail-on is one of {', '.join(SEVERITIES)}, not {fail_on!r}")
    with ExitStack() as opened:
        result = analyze_readers([opened.enter_context(CaptureReader(path)) for path in captures])
    if as_json:
        json.dump(result.to_document(), sys.stdout, indent=2)
        print()
    else:
        print(render(result), end="")
    if fail_on is None:
        return 0
    wanted = SEVERITIES.index(fail_on)
    if any(SEVERITIES.index(f.rule.severity) >= wanted for _, f in result.findings):
        return _FOUND
    return _INCONCLUSIVE if result.verdict == INCONCLUSIVE else 0
