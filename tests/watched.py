# SPDX-License-Identifier: MIT
"""A `kvmprobe watch` in a process of its own, and what it leaves in the kernel."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmprobe.watch.status import Status, StatusError, read
from tests.processes import KVMPROBE, ROOT

#: The capabilities of packaging/kvmprobe-watch.service, and no more.
CONFINED = ("setpriv", "--bounding-set=-all,+bpf,+perfmon", "--no-new-privs")
#: Seconds to wait for what happens soon, on a machine that may be busy.
PATIENCE = 300.0
_BPF_PROG_GET_FD_BY_ID = 13
_SYS_BPF = 321


class Watch:
    """A running watch: a context, which kills it."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        prefix: Sequence[str] = CONFINED,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.state, self.runtime = directory / "state", directory / "run"
        self.process = subprocess.Popen(
            [
                *prefix,
                *(*KVMPROBE, "watch", "--listen", "127.0.0.1:0"),
                *("--state-directory", str(self.state), "--runtime-directory", str(self.runtime)),
                *options,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.programs: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def status(self) -> Status | None:
        """What its status file says; None while there is none of this process."""
        try:
            found = read(self.runtime)
        except StatusError:
            return None
        return found if found.pid == self.process.pid else None

    def until(self, true: Callable[[Status], bool]) -> Status:
        """Wait until its status is so, and return it."""
        end = time.monotonic() + PATIENCE
        status = None
        while time.monotonic() < end and self.process.poll() is None:
            status = self.status()
            if status is not None and true(status):
                return status
            time.sleep(0.05)
        ended = self.process.poll()
        said = self.process.communicate()[1] if ended is not None else "it still runs"
        raise AssertionError(f"its last status: {status}; it ended with {ended}: {said}")

    def watching(self) -> Status:
        """Wait until its probes are attached, and note them."""
        status = self.until(lambda status: status.state == "watching")
        self.programs |= programs_of(self.process.pid)
        return status

    def metrics(self) -> dict[str, float]:
        """Its metrics, by name with labels."""
        status = self.status()
        assert status is not None
        with urllib.request.urlopen(f"http://{status.metrics}/metrics", timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def end(self) -> tuple[int, list[str]]:
        """Wait for its end: the exit status, and what it said; nothing is left in the kernel."""
        out, err = self.process.communicate(timeout=PATIENCE)
        assert out == ""
        assert "Traceback" not in err, err
        assert left_behind(self.programs) == set()
        return self.process.returncode, err.splitlines()


def programs_of(pid: int) -> set[int]:
    """Ids of the BPF programs that a process holds."""
    ids: set[int] = set()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = info.read_text()
        except OSError:
            continue
        ids.update(int(line.split()[1]) for line in text.splitlines() if line.startswith("prog_id"))
    return ids


def alive(program: int) -> bool:
    """Whether the kernel still has a BPF program."""
    attributes = ctypes.create_string_buffer(program.to_bytes(4, "little"), 64)
    fd: int = ctypes.CDLL(None).syscall(
        ctypes.c_long(_SYS_BPF),
        ctypes.c_long(_BPF_PROG_GET_FD_BY_ID),
        attributes,
        ctypes.c_long(64),
    )
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def left_behind(programs: set[int]) -> set[int]:
    """Those that are still there; the kernel frees them a moment after their last user."""
    end = time.monotonic() + 5
    while (left := {program for program in programs if alive(program)}) and time.monotonic() < end:
        time.sleep(0.02)
    return left
