# SPDX-License-Identifier: MIT
"""`kvmprobe record`: record this host's KVM into a capture."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmprobe.cli.target import Backend, Interrupts, process_of
from kvmprobe.errors import UsageError

if TYPE_CHECKING:
    from kvmprobe.capture.recorder import Limits, Recorder
    from kvmprobe.capture.session import Session

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(option: str, text: str) -> int:
    """A size as people write it ("512M", "2G", "1048576"), in bytes.

    Raises UsageError that names the option.
    """
    found = re.fullmatch(r"([0-9]{1,18})([KMGT]?)", text.upper())
    if found is None:
        raise UsageError(f"{option}: {text!r} is not a size: write 1048576, 512M or 2G")
    return int(found[1]) * _UNITS[found[2]]


def record(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            help="After --: record while this command runs; its status is ours.",
            metavar="[-- COMMAND...]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The capture.  [default: kvmprobe-TIME.kvmprobe]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    duration: Annotated[
        float | None, typer.Option("--duration", "-d", min=0, help="Stop after this many seconds.")
    ] = None,
    pid: Annotated[
        int | None, typer.Option("--pid", "-p", min=1, help="Only the VM of this process.")
    ] = None,
    vm: Annotated[
        str | None, typer.Option("--vm", help="Only the VM of this name (QEMU, libvirt).")
    ] = None,
    vcpu: Annotated[
        int | None,
        typer.Option("--vcpu", min=0, max=0xFFFE, help="Only vCPUs with this id."),
    ] = None,
    max_size: Annotated[
        str, typer.Option("--max-size", help="Stop when the capture has this size.")
    ] = "2G",
    min_free: Annotated[
        str | None,
        typer.Option(
            "--min-free",
            help="Stop when less than this is free on the disk.  "
            "[default: the larger of 1G and 5 %]",
        ),
    ] = None,
    backend: Backend = None,
    kernel_headers: Annotated[
        Path | None,
        typer.Option(
            "--kernel-headers",
            help="Compile against this kernel source directory.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show which probes would be attached and why; record nothing."
        ),
    ] = False,
) -> int:
    """Record this host's KVM until Ctrl-C, a limit, or the end of COMMAND.  Needs root."""
    from kvmprobe.capture.plan import BACKENDS
    from kvmprobe.capture.recorder import Limits
    from kvmprobe.capture.session import Filters, Session

    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"--backend is one of {', '.join(BACKENDS)}, not {backend!r}")
    if command and shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]}: no such command")
    limits = Limits(
        duration,
        parse_size("--max-size", max_size),
        None if min_free is None else parse_size("--min-free", min_free),
    )
    path = output or Path(time.strftime("kvmprobe-%Y%m%d-%H%M%S.kvmprobe"))
    filters = Filters(process_of(pid, vm), vm, vcpu)
    if sys.stderr.isatty():
        print("compiling the probes …  (Ctrl-C ends the recording)", file=sys.stderr)
    # Arrow is imported while BCC compiles.
    threading.Thread(target=importlib.import_module, args=("pyarrow",), daemon=True).start()
    with Session(filters, backend=backend, kernel_headers=kernel_headers) as session:
        session.prepare()
        if dry_run:
            from kvmprobe.cli.tables import plan_lines

            print("\n".join(plan_lines(session.plan.rows())))
            return 0
        return _record(session, path, force, limits, command or [])


def _record(session: Session, path: Path, force: bool, limits: Limits, command: list[str]) -> int:
    from kvmprobe.capture.header import live_header
    from kvmprobe.capture.recorder import Recorder, free_space_problem
    from kvmprobe.cli.live import Status
    from kvmprobe.errors import CaptureError
    from kvmprobe.store.writer import CaptureWriter

    problem = (
        free_space_problem(path.absolute().parent, limits.min_free)
        if path.absolute().parent.is_dir()
        else None
    )
    if problem:
        raise CaptureError(f"not recorded: {problem}; free some space or choose another -o")
    with Interrupts() as interrupts:
        session.attach()
        with CaptureWriter(path, live_header(session, sys.argv), force=force) as writer:
            recorder = Recorder(session, writer, limits)
            child = _Child(command)
            with Status(recorder) as status:
                recorder.start()
                try:
                    child.start()
                    reason = recorder.run(lambda: interrupts.reason or child.ended(), status.show)
                finally:
                    child.stop()
        _summarize(recorder, path, reason)
        return child.status if command and reason == _COMMAND_ENDED else 0


_COMMAND_ENDED = "command ended"


class _Child:
    """The command given after `--`, if any."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._command:
            try:
                self._process = subprocess.Popen(self._command)  # noqa: S603 - the user's own
            except OSError as error:
                raise UsageError(f"{self._command[0]}: {error.strerror}") from None

    def ended(self) -> str | None:
        if self._process is not None and self._process.poll() is not None:
            return _COMMAND_ENDED
        return None

    def stop(self) -> None:
        """End a command that outlived the recording."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=2)
            finally:
                # also when a second Ctrl-C ends the wait
                self._process.kill()
                self._process.wait()

    @property
    def status(self) -> int:
        """The command's exit status as a shell says it."""
        status = self._process.returncode if self._process is not None else 0
        return status if status >= 0 else 128 - status


def _summarize(recorder: Recorder, path: Path, reason: str) -> None:
    progress = recorder.progress
    print(
        f"{path}: {progress.events:,} events of {progress.vcpus} vCPUs in {progress.vms} VMs, "
        f"{progress.lost:,} lost, {progress.bytes / 1e6:.1f} MB in {progress.seconds:.1f} s "
        f"(ended: {reason})",
        file=sys.stderr,
    )
    for finding in recorder.judge.findings():
        print(
            f"found: {finding.rule.id} ({finding.rule.severity}), {finding.count} times",
            file=sys.stderr,
        )
    print(f"next: kvmprobe analyze {shlex.quote(str(path))}", file=sys.stderr)
