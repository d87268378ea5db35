# SPDX-License-Identifier: MIT
"""`kvmprobe import`: other tools' traces made into a capture."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvmprobe.formats.importer import Imported


def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Traces of one host, parts of one recording in order: ftrace text, trace-cmd's "
            "trace.dat, perf.data, or what trace-cmd report and perf script print; gzip, xz and "
            "zstd are read through.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The capture to write.")],
    internal_slot: Annotated[
        list[str] | None,
        typer.Option(
            "--internal-slot",
            metavar="NAME=GPA:PAGES",
            help="Where KVM put a slot of its own: NAME is tss, identity or apic, such as "
            "tss=0xfffbd000:3. Otherwise the well-known addresses are presumed.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail on lines or records that are not understood.")
    ] = False,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Keep what stands before damage, instead of failing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the capture.")] = False,
) -> None:
    """Turn other tools' traces into a capture, to be read with analyze.  Needs no root."""
    # What is loaded stays; looking for garbage among it would take a quarter of a second.
    gc.disable()
    try:
        done = _import(files, output, internal_slot or [], strict, salvage, force)
    finally:
        gc.enable()
    tally = done.tally
    print(
        f"{', '.join(done.kinds)}: {tally.read} events read, {done.events} kept, "
        f"{tally.unknown} not understood, {tally.lost} lost",
        file=sys.stderr,
    )
    for sample in tally.samples:
        print(f"  not understood: {sample}", file=sys.stderr)
    for ended in done.ended:
        print(f"salvaged: {ended}", file=sys.stderr)
    for doubt in done.doubts:
        print(f"info: {doubt}", file=sys.stderr)
    print(f"next: kvmprobe analyze {output}", file=sys.stderr)


def _import(
    files: list[Path], output: Path, slots: list[str], strict: bool, salvage: bool, force: bool
) -> Imported:
    from kvmprobe.formats.importer import import_traces
    from kvmprobe.formats.slots import stated

    return import_traces(
        files, output, slots=tuple(map(stated, slots)), strict=strict, salvage=salvage, force=force
    )
