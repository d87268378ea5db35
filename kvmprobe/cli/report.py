# SPDX-License-Identifier: MIT
"""`kvmprobe report`: a capture as one web page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    capture: Annotated[Path, typer.Argument(help="A capture.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page.  [default: the capture's name with .html]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
) -> None:
    """Make one self-contained HTML page of a capture.  Needs no root.

    The page has the verdict, the findings with their evidence, a timeline of each vCPU's MMIO
    cache, the map of guest memory, rates and losses.  It loads nothing from anywhere.
    """
    from kvmprobe.report.gather import gather
    from kvmprobe.report.page import render
    from kvmprobe.store.files import create_output
    from kvmprobe.store.reader import CaptureReader

    path = output or Path(capture.name).with_suffix(".html")
    with CaptureReader(capture) as reader, create_output(path, force=force) as file:
        found = gather(reader)
        for part in render(found):
            file.write(part.encode("utf-8", "replace"))
    number = len(found.capture.findings)
    many = "finding" if number == 1 else "findings"
    print(f"{path}: {found.analysis.verdict}, {number} {many}", file=sys.stderr)
