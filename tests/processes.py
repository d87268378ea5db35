# SPDX-License-Identifier: MIT
"""Processes that tests start: kvmprobe itself, and guests for it to see."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
KVMPROBE = (sys.executable, "-m", "kvmprobe")
LOAD = (sys.executable, "-m", "kvmprobe.guests.load")


class Gated:
    """A command that waits for `go`, so that its process id is known before it begins."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            ["sh", "-c", 'read go && exec "$@"', "sh", *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.close()

    def output(self) -> str:
        assert self.process.stdout is not None
        text = self.process.stdout.read()
        self.process.stdout.close()
        assert self.process.wait() == 0
        return text

    def counts(self) -> dict[str, int]:
        """What the load's VMM counted, when it ended."""
        return counts(self.output())


def counts(output: str) -> dict[str, int]:
    """What the load's VMM counted: the first number of each line by the line's first word."""
    lines = (line.split() for line in output.splitlines())
    return {line[0]: int(line[1]) for line in lines}


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs until the context ends, which kills it."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
