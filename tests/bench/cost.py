# SPDX-License-Identifier: MIT
"""What a command costs: time, processor time and memory."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from kvmprobe.errors import KvmprobeError

KVMPROBE = [sys.executable, "-m", "kvmprobe"]
Command = Sequence[str | Path]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cost:
    """Seconds, seconds of CPU, and the most resident memory in bytes; and what was printed."""

    seconds: float
    cpu: float
    memory: int
    printed: str


def cost(command: Command, limit: float, environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command from the checkout; `limit` is in seconds.

    The caller must be small: Linux counts the memory of the process that a command is started from.

    Raises:
        KvmprobeError: it failed, or didn't end in time.

    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = monotonic()
        child = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            stdout=out,
            stderr=err,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        late = threading.Timer(limit, os.killpg, (child.pid, signal.SIGKILL))
        late.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            late.cancel()
        seconds = monotonic() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        name = " ".join(Path(str(part)).name for part in command[:4])
        if child.returncode == -signal.SIGKILL and seconds >= limit:
            raise KvmprobeError(f"{name} did not end within {limit:.0f} s")
        if child.returncode:
            err.seek(0)
            said = err.read().decode("utf-8", "replace").strip().splitlines() or ["nothing"]
            raise KvmprobeError(f"{name} failed and said: {said[-1][:200]}")
        out.seek(0)
        printed = out.read().decode("utf-8", "replace")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10, printed)


def median(costs: Sequence[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(
        statistics.median(c.seconds for c in costs),
        statistics.median(c.cpu for c in costs),
        int(statistics.median(c.memory for c in costs)),
        costs[-1].printed,
    )
