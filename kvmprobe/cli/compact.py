# SPDX-License-Identifier: MIT
"""`kvmprobe compact`: recordings as Parquet, to be kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmprobe.errors import CaptureError, UsageError

if TYPE_CHECKING:
    from kvmprobe.store.parquet import End


def compact(
    captures: Annotated[
        list[Path], typer.Argument(metavar="CAPTURE...", help="Recordings, each by itself.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to make, of one capture.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory", "-d", help="Where to make a file of each, NAME.parquet.  [default: .]"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace existing files.")] = False,
) -> int:
    """Turn recordings into Parquet files, which take less room.  Needs no root.

    Nothing is lost: every command that reads a recording reads such a file too, and says the same
    of it. The recordings stay. Ends with 1 when a part of a recording was damaged; the rest is in
    the file, and the file says so.
    """
    if output is not None and directory is not None:
        raise UsageError("--output and --directory exclude each other; give one of them")
    if output is not None and len(captures) > 1:
        raise UsageError("--output takes one capture; use --directory for more")
    targets = [output or _target(capture, directory or Path()) for capture in captures]
    if len(set(targets)) < len(targets):
        raise UsageError("two captures have one name; compact them into different directories")
    status = 0
    for capture, target in zip(captures, targets, strict=True):
        events, end = _compact(capture, target, force)
        size = target.stat().st_size
        print(
            f"{target}: {events:,} events in {size:,} bytes, of {capture.stat().st_size:,} before",
            file=sys.stderr,
        )
        for problem in _problems(end):
            print(f"kvmprobe: {capture}: {problem}", file=sys.stderr)
        status |= bool(end.damaged or end.unknown_events)
    return status


def _target(capture: Path, directory: Path) -> Path:
    stem = capture.name.removesuffix(".kvmprobe")
    return directory / f"{stem}.parquet"


def _compact(capture: Path, target: Path, force: bool) -> tuple[int, End]:
    """Make the new file `target`; returns how many events it has, and what could not be read."""
    from kvmprobe.formats.export_parquet import ParquetWriter
    from kvmprobe.store.files import create_output
    from kvmprobe.store.parquet import End
    from kvmprobe.store.reader import CaptureReader

    events = 0
    with CaptureReader(capture) as reader:
        if target.exists() and target.samefile(capture):
            raise CaptureError(f"{target} is the capture itself; choose another place")
        with create_output(target, force=force) as file:
            writer = ParquetWriter(file, reader.header)
            try:
                for columns in reader.batches():
                    events += writer.write(columns)
                end = End.of(reader)
                writer.close(end)
            except BaseException:
                writer.abandon()
                raise
    return events, end


def _problems(end: End) -> list[str]:
    problems = [f"batch {d.batch_index} is damaged: {d.reason}" for d in end.damaged[:1]]
    if len(end.damaged) > 1:
        problems.append(f"{len(end.damaged) - 1} more parts are damaged")
    if end.unknown_events:
        total = sum(n for _, n in end.unknown_events)
        problems.append(f"{total} events are of types this kvmprobe doesn't know: left out")
    if end.truncated:
        problems.append(end.truncated)
    return problems
