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
    from kvmprobe.fleet.progress import tell
    from kvmprobe.fleet.run import analyze_fleet
    from kvmprobe.fleet.text import render

    if scheduler is not None and workers is not None:
        raise UsageError("--workers is for this machine; a scheduler has its own")
    try:
        summary = analyze_fleet(places, output, scheduler, workers)
    except KeyboardInterrupt:
        tell("ended; the same command goes on from here")
        raise
    print(render(summary), end="")
    print(f"{output}: the tables", file=sys.stderr)
    return int(bool(summary["with_problems"]))


@fleet.command()
def report(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="A folder that `fleet analyze` made.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page.  [default: the result's name with .html]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
) -> None:
    """Make one self-contained HTML page of a fleet's result.

    The page has the hosts by verdict, since when there are findings, on which kernels and
    configurations, and each such host's findings. It loads nothing from anywhere.
    """
    from kvmprobe.fleet.page import render
    from kvmprobe.store.files import create_output

    path = output or Path(f"{result.absolute().name}.html")
    parts = render(result)
    with create_output(path, force=force) as file:
        for part in parts:
            file.write(part.encode("utf-8", "replace"))
    print(path, file=sys.stderr)


@fleet.command()
def simulate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    hosts: Annotated[int, typer.Option(min=1, help="Hosts.")] = 100,
    days: Annotated[int, typer.Option(min=1, max=3650, help="Days of each host.")] = 7,
    events: Annotated[
        int, typer.Option(min=1, help="Events of all hosts and days together.")
    ] = 10_000_000,
    kernels: Annotated[int, typer.Option(min=1, max=1000, help="Different kernels.")] = 4,
    vulnerable: Annotated[
        float, typer.Option(min=0, max=1, help="Share of hosts that show the fault.")
    ] = 0.1,
    hit: Annotated[
        float, typer.Option(min=0, max=1, help="Share of hosts whose L1 is hit, among those.")
    ] = 0.05,
    lossy: Annotated[
        float, typer.Option(min=0, max=1, help="Share of hosts that lose records.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(min=0, help="Another number makes another fleet.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.  [default: the cores]")
    ] = None,
) -> None:
    """Make the captures of hosts that don't exist, to size a cluster and to test with.

    Writes DIR/HOST/DAY.parquet, and DIR/truth.json: what `kvmprobe fleet analyze` has to find.
    """
    import os

    from kvmprobe.fleet.simulate import Fleet, simulate_fleet

    wanted = Fleet(
        hosts=hosts, days=days, events=events, kernels=kernels, vulnerable=vulnerable, hit=hit,
        lossy=lossy, seed=seed,
    )  # fmt: skip
    truth = simulate_fleet(wanted, folder, workers or os.cpu_count() or 1)
    made = sum(host["events"] for host in truth)
    print(f"{folder}: {len(truth):,} hosts, {made:,} events", file=sys.stderr)
