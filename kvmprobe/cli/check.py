# SPDX-License-Identifier: MIT
"""`kvmprobe check`: one line for monitoring."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmprobe.errors import UsageError

if TYPE_CHECKING:
    from kvmprobe.check.model import Seen

_RUNTIME_DIRECTORY = Path("/run/kvmprobe")


def check(
    capture: Annotated[
        Path | None, typer.Argument(help="Judge this capture instead of the host.")
    ] = None,
    duration: Annotated[
        float,
        typer.Option("--duration", "-d", min=0.1, max=3600, help="Seconds to watch the host."),
    ] = 8.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, not the line.")
    ] = False,
    textfile: Annotated[
        Path | None,
        typer.Option("--textfile", help="Also write metrics here, for a textfile collector."),
    ] = None,
    runtime_directory: Annotated[
        Path, typer.Option("--runtime-directory", help="Where kvmprobe watch keeps its status.")
    ] = _RUNTIME_DIRECTORY,
) -> int:
    """Say in one line how this host is, for monitoring.  Needs root.

    Asks a running `kvmprobe watch`; where none runs, watches the host itself.

    \b
    Exit status, as of monitoring plugins:
    0 OK        nothing found
    1 WARNING   the kernel is proven vulnerable, or a warning was found
    2 CRITICAL  a critical finding: a guest was harmed
    3 UNKNOWN   an observation was lost or not attached (the line names the
                VMs), the check could not run, or was called wrongly
    """  # noqa: D301 - click wants the character itself
    from kvmprobe.check.model import conclude
    from kvmprobe.check.output import document, line, write_failed
    from kvmprobe.check.output import textfile as metrics
    from kvmprobe.watch.status import replace_file

    if math.isnan(duration):
        raise UsageError("--duration is a number of seconds, not nan")
    if capture is not None:
        from kvmprobe.check.sources import read_capture

        seen = read_capture(capture)
    else:
        seen = _look(duration, runtime_directory)
    result = conclude(seen)
    if textfile is not None:
        data = metrics(result, seen, time.time()).encode()
        try:
            replace_file(textfile, data, mode=0o644, sync=True)
        except OSError as error:
            result = write_failed(result, textfile, error.strerror or str(error))
    print(json.dumps(document(result, seen), indent=2) if as_json else line(result, seen))
    return int(result.code)


def _look(duration: float, directory: Path) -> Seen:
    from kvmprobe.check.ask import ask_watch
    from kvmprobe.doctor.configured import configured
    from kvmprobe.host.facts import host_facts, process_age

    begun = time.monotonic() - process_age()
    exposed = configured(host_facts())
    seen, notes = ask_watch(directory, exposed)
    if seen is not None:
        return seen
    from kvmprobe.check.sources import record

    return dataclasses.replace(record(duration, begun, exposed), notes=notes)
