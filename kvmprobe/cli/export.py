# SPDX-License-Identifier: MIT
"""`kvmprobe export`: a capture in another tool's format, or one that may be given away."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvmprobe.errors import UsageError


def export(
    capture: Annotated[Path, typer.Argument(help="A capture.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The file to make; - for standard output (csv, ndjson)."
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="perfetto, parquet, csv, ndjson or capture.  [default: by the file's ending]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    anonymize: Annotated[
        bool,
        typer.Option(
            "--anonymize",
            help="Replace names, process ids, host and command line; drop gva and rip.",
        ),
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            help="Only events from this time on: 1.5, 250ms after the start, or RFC 3339.",
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="Only events before this time.")
    ] = None,
) -> int:
    """Write a capture in another tool's format.  Needs no root.

    Ends with 1 when a part of the capture was damaged; the rest is in the output.
    """
    from kvmprobe.formats import export as formats
    from kvmprobe.formats.export_window import window
    from kvmprobe.store.reader import CaptureReader

    piped = str(output) == "-"
    if to is not None and to not in formats.FORMATS:
        raise UsageError(f"--to is one of {', '.join(formats.FORMATS)}, not {to!r}")
    if piped and to not in formats.TEXT:
        raise UsageError("-o - needs --to csv or --to ndjson; other formats go to a file")
    form = to or formats.format_of(output)
    with CaptureReader(capture) as reader:
        part = window(reader.header, since, until)
        if piped:
            summary = formats.export_stream(
                reader, sys.stdout.buffer, form, anonymize=anonymize, window=part
            )
            sys.stdout.buffer.flush()
        else:
            summary = formats.export_file(
                reader, output, form, force=force, anonymize=anonymize, window=part
            )
    if summary.problems:
        problems = "; ".join(summary.problems)
        print(f"kvmprobe: {capture}: what could be read is exported: {problems}", file=sys.stderr)
    if not piped:
        print(f"{output}: {summary.events:,} events as {form}", file=sys.stderr)
    return 0 if summary.complete else 1
