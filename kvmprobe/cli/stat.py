# SPDX-License-Identifier: MIT
"""`kvmprobe stat`: what KVM does, counted and timed."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmprobe.cli.target import Interrupts, process_of
from kvmprobe.errors import UsageError

if TYPE_CHECKING:
    from kvmprobe.stat.live import LiveStat
    from kvmprobe.stat.model import Counted

#: Seconds between two looks at the clock and at signals, and between two pictures on a terminal.
_TICK = 0.05
_REFRESH = 1.0


def stat(
    captures: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[CAPTURE...]", help="Captures; without any, count live."),
    ] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", "-d", min=0, help="Stop after this many seconds.")
    ] = None,
    pid: Annotated[
        int | None, typer.Option("--pid", "-p", min=1, help="Only the VM of this process.")
    ] = None,
    vm: Annotated[
        str | None, typer.Option("--vm", help="Only the VM of this name (QEMU, libvirt).")
    ] = None,
    by: Annotated[
        str, typer.Option("--by", help="Rows of their own for: vm, vcpu, level, or none.")
    ] = "vm,level",
    sort: Annotated[
        str, typer.Option("--sort", help="count, total, min, mean, p50, p99, max or name.")
    ] = "count",
    top: Annotated[int, typer.Option("--top", min=0, help="Rows of a table; 0 for all.")] = 20,
    interval: Annotated[
        float | None,
        typer.Option("--interval", min=0.1, help="Print a line of counts every so many seconds."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one line a row.")] = False,
) -> None:
    """Count and time what KVM does, until Ctrl-C.  Needs root; with captures none.

    Nothing is recorded: the kernel counts.  The tables of captures have no times.
    """
    from kvmprobe.stat.tables import GROUPS, SORTS

    groups = tuple(name for name in by.split(",") if name != "none")
    if not set(groups) <= set(GROUPS):
        raise UsageError(f"--by is a list of {', '.join(GROUPS)}, or none; not {by!r}")
    if sort not in SORTS:
        raise UsageError(f"--sort is one of {', '.join(SORTS)}, not {sort!r}")
    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other")
    if captures and (pid or vm or interval or duration is not None):
        raise UsageError("-d, -p, --vm and --interval are for counting live, not for captures")
    if interval and (as_json or as_csv):
        raise UsageError("--interval prints lines: leave out --json and --csv")
    show = _Output(tuple(dict.fromkeys(groups)), sort, top, as_json, as_csv)
    if captures:
        from kvmprobe.stat.capture import count_captures
        from kvmprobe.store.reader import CaptureReader

        with ExitStack() as opened:
            readers = [opened.enter_context(CaptureReader(path)) for path in captures]
            show.print(count_captures(readers))
    else:
        _live(process_of(pid, vm), duration, interval, show)


class _Output:
    """How the tables are wanted."""

    def __init__(
        self, by: tuple[str, ...], sort: str, top: int, as_json: bool, as_csv: bool
    ) -> None:
        from kvmprobe.stat.reasons import ReasonNames

        self._by, self._sort, self._top = by, sort, top
        self._json, self._csv = as_json, as_csv
        self._names = ReasonNames.live()

    @property
    def is_text(self) -> bool:
        return not self._json and not self._csv

    def render(self, counted: Counted, top: int) -> str:
        from kvmprobe.stat import render
        from kvmprobe.stat.tables import tables

        made = tables(counted, self._by, self._sort, self._names)
        if self._json:
            return json.dumps(render.document(counted, made, self._by), indent=2) + "\n"
        if self._csv:
            return render.csv_text(counted, made)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        return render.text(counted, made, self._by, width, top)

    def print(self, counted: Counted) -> None:
        """Print the last word."""
        print(self.render(counted, self._top), end="")

    def picture(self, counted: Counted) -> str:
        """What a terminal shows meanwhile."""
        lines = self.render(counted, self._top or 20).splitlines()
        return "\n".join(lines[: shutil.get_terminal_size().lines - 1])


def _live(pid: int | None, duration: float | None, interval: float | None, show: _Output) -> None:
    from kvmprobe.stat.live import LiveStat

    if sys.stderr.isatty():
        print("compiling the probes …  (Ctrl-C ends the count)", file=sys.stderr)
    with Interrupts() as interrupts, LiveStat(pid) as live:
        live.start()
        end = None if duration is None else time.monotonic() + duration
        with ExitStack() as stack:
            tell, period = _teller(stack, live, interval, show)
            due = time.monotonic() + period
            while interrupts.reason is None and (end is None or time.monotonic() < end):
                time.sleep(_TICK if end is None else max(0.0, min(_TICK, end - time.monotonic())))
                if time.monotonic() >= due:
                    due += period
                    tell()
            live.stop()
        if interval is None:
            show.print(live.counted())


def _teller(
    stack: ExitStack, live: LiveStat, interval: float | None, show: _Output
) -> tuple[Callable[[], None], float]:
    """What is told while the count goes on, and how often."""
    if interval is not None:
        from kvmprobe.stat.render import interval_head, interval_line

        last = live.counted()
        print(interval_head(), flush=True)

        def line() -> None:
            nonlocal last
            now = live.counted()
            print(interval_line(last, now), flush=True)
            last = now

        return line, interval
    if not (sys.stdout.isatty() and show.is_text):
        return lambda: None, _REFRESH
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    screen = stack.enter_context(Live(console=Console(), auto_refresh=False, transient=True))
    return lambda: screen.update(Text(show.picture(live.counted())), refresh=True), _REFRESH
