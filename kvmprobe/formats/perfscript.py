# SPDX-License-Identifier: MIT
"""The text that `perf script` prints, and asking perf for it.

Its lines are those of `lines`; they name the trace system before the event.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO

from kvmprobe.errors import CaptureError

_LINE = re.compile(rb"^[^\n]*\[\d{3,}\] +\d+\.\d+: +(\w+:)?\w+: ", re.M)
#: Fields that make a line of one sample, with the process and with all digits of the time.
_COMMAND = (
    "script", "--ns", "--show-lost-events", "-F", "comm,pid,tid,cpu,time,event,trace", "-i",
)  # fmt: skip


def is_perf_script(head: bytes) -> bool:
    """Whether the beginning of a text is of perf script: the first event names its system."""
    m = _LINE.search(head)
    return m is not None and m[1] is not None


@contextmanager
def perf_script(file: BinaryIO, why: str) -> Iterator[IO[bytes]]:
    """Let perf print a perf.data that only perf can read: a context that gives the text.

    Raises:
        CaptureError: perf is not installed, or fails.

    """
    perf = shutil.which("perf")
    if perf is None:
        raise CaptureError(
            f"{why}: only perf itself reads this perf.data; install perf, or run perf script where "
            "it was recorded and import the text"
        )
    name = f"/proc/self/fd/{file.fileno()}"
    with subprocess.Popen(  # noqa: S603 - a fixed command
        [perf, *_COMMAND, name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, pass_fds=[file.fileno()],
    ) as process:  # fmt: skip
        if process.stdout is None:
            raise CaptureError("perf gave no output")
        try:
            yield process.stdout
        finally:
            process.stdout.close()
            process.kill()
