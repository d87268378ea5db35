# SPDX-License-Identifier: MIT
"""`kvmprobe fleet`: the captures of many hosts at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

fleet = typer.Typer(
    name="fleet",
    help="Analyze the captures of many hosts at once.  Needs no root.",
    rich_markup_mode=None,
    no_args_is_help=False,
)


@fleet.command()
def analyze(
    places: Annotated[
        list[str],
        typer.Argument(metavar="DIR|URL...", help="Folders of captures: DIR/HOST/FILE."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the result.")],
    scheduler: Annotated[
        str | None,
        typer.Option(help="A dask scheduler, as tcp://HOST:PORT.  [default: this machine]"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine.  [default: its cores]")
    ] = None,
) -> int:
    """Analyze the captures of many hosts, each by itself, side by side.

    Recordings and what `kvmprobe compact` made of them are read from folders and object stores
    (s3://BUCKET/FOLDER), a folder a host. The result is a folder of Parquet tables (hosts,
    verdicts, findings, losses) and a summary, fleet.json. A run that was ended goes on where it
    ended; hosts whose files did not change are not analyzed again.

    Ends with 1 when a file was damaged or a host could not be analyzed; all others are in the
    result, and it says which.
    """
    from kvmprobe.errors import UsageError
    from kvmprobe.fleet.run import analyze_fleet
    from kvmprobe.fleet.text import render

    if scheduler is not None and workers is not None:
        raise UsageError("--workers is for this machine; a scheduler has its own")
    summary = analyze_fleet(places, output, scheduler, workers)
    print(render(summary), end="")
    print(f"{output}: the tables", file=sys.stderr)
    return int(bool(summary["with_problems"]))
