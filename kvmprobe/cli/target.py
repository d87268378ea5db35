# SPDX-License-Identifier: MIT
"""What the commands that watch live share: which process, and when to stop."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from kvmprobe.errors import UsageError

#: The option that forces one way to probe functions; `capture.plan.BACKENDS` has those known.
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend", help="Probe functions only by: kprobe, fentry, or tracepoint (not at all)."
    ),
]


def process_of(pid: int | None, vm: str | None) -> int | None:
    """The process that --pid or --vm chose, None for all.

    Raises UsageError when both are given, or there is no such process or VM.
    """
    if pid is not None and vm is not None:
        raise UsageError("--pid and --vm exclude each other")
    if vm is not None:
        from kvmprobe.host.vms import find_vm

        return find_vm(vm).pid
    if pid is not None and not Path(f"/proc/{pid}").exists():
        raise UsageError(f"no process has the id {pid}")
    return pid


class Interrupts:
    """Makes the first SIGINT, SIGTERM or SIGHUP a wish to stop; a second SIGINT ends at once."""

    def __init__(self) -> None:
        """Handle nothing yet."""
        self.reason: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        """Begin to handle signals."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Handle signals as before."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
