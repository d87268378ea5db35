# SPDX-License-Identifier: MIT
"""Where a watch says things: the findings' log, the journal, the service manager."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvmprobe.analysis.vms import printable

#: syslog(3) priorities.
CRITICAL, ERROR, WARNING, NOTICE, INFO = 2, 3, 4, 5, 6
JOURNAL = Path("/run/systemd/journal/socket")
LOG_NAME = "findings.ndjson"


class Log:
    """Findings as NDJSON: `findings.ndjson`, and older ones as `findings.ndjson.1`, `.2`, …."""

    def __init__(self, directory: Path, max_kib: int, files: int) -> None:
        """Write to `directory`; see `config.Log`."""
        self.path = directory / LOG_NAME
        self.configure(max_kib, files)

    def configure(self, max_kib: int, files: int) -> None:
        """Change the limits."""
        self._max_bytes = max_kib << 10
        self._files = files

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line; never half of one.  Raises OSError when it can't be written."""
        line = json.dumps(entry).encode() + b"\n"
        fd = self._open()
        try:
            size = os.fstat(fd).st_size
            if size and size + len(line) > self._max_bytes:
                os.close(fd)
                self._rotate()
                fd = self._open()
                size = os.fstat(fd).st_size
            try:
                done = os.write(fd, line)
                if done < len(line):
                    os.write(fd, line[done:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.path, flags, 0o640)

    def _rotate(self) -> None:
        older = [self.path.with_name(f"{LOG_NAME}.{n}") for n in range(1, self._files)]
        for path in self.path.parent.glob(f"{LOG_NAME}.*"):
            if path not in older:
                path.unlink(missing_ok=True)
        chain = [self.path, *older]
        chain[-1].unlink(missing_ok=True)
        for path, to in reversed([*itertools.pairwise(chain)]):
            with contextlib.suppress(FileNotFoundError):
                path.replace(to)


class Journal:
    """Messages for the person who runs the host.

    Under systemd they go to the journal with fields of their own, by its native protocol
    (systemd.journal-fields(7)); elsewhere to stderr, a line each.
    """

    def __init__(self, path: Path = JOURNAL, *, native: bool | None = None) -> None:
        """Find out where to write.  `native` None: if systemd has connected stderr to the journal.

        Args:
            path: the journal's socket.
            native: whether to use it.

        """
        self._path = str(path)
        self._socket: socket.socket | None = None
        if native if native is not None else "JOURNAL_STREAM" in os.environ and path.exists():
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            # A journal that doesn't read must not stop the watch.
            self._socket.setblocking(False)

    def say(self, priority: int, message: str, **fields: object) -> None:
        """Say one line; `fields` become KVMPROBE_… ones, None left out.  Never raises OSError."""
        message = printable(message)
        if self._socket is not None:
            data = entry(priority, message, fields)
            with contextlib.suppress(OSError):
                self._socket.sendto(data, self._path)
                return
        with contextlib.suppress(OSError, ValueError):
            print(f"kvmprobe: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()


def entry(priority: int, message: str, fields: Mapping[str, object]) -> bytes:
    """A message of the journal's native protocol: FIELD=value lines, all values printable."""
    lines = {
        "MESSAGE": message,
        "PRIORITY": str(priority),
        "SYSLOG_IDENTIFIER": "kvmprobe",
    } | {
        f"KVMPROBE_{name.upper()}": printable(str(value))
        for name, value in fields.items()
        if value is not None
    }
    return "".join(f"{name}={value}\n" for name, value in lines.items()).encode("utf-8", "replace")


class Notify:
    """sd_notify(3): tells the service manager how the service is; nothing where there is none."""

    def __init__(self) -> None:
        """Find the manager's socket and how often it wants to hear from us."""
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        watchdog = os.environ.get("WATCHDOG_USEC", "")
        wanted = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._watchdog = int(watchdog) if watchdog.isdecimal() and wanted else None
        self._every = self._watchdog / 3e6 if self._watchdog is not None else None
        self._pinged = 0.0

    def send(self, *assignments: str) -> None:
        """Send assignments such as READY=1.  A manager that doesn't listen is no error."""
        if not self._address:
            return
        # "@" stands for the zero byte with which names of the abstract namespace begin.
        address = re.sub("^@", "\0", self._address)
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to,
        ):
            to.sendto("\n".join(assignments).encode(), address)

    def reloading(self) -> None:
        """Say that a reload begins; READY=1 ends it."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    @contextlib.contextmanager
    def busy(self, seconds: float) -> Iterator[None]:
        """Let the manager wait so long for a sign of life while the context lasts."""
        if self._watchdog is not None:
            self.send(f"WATCHDOG_USEC={int(seconds * 1e6)}")
        try:
            yield
        finally:
            if self._watchdog is not None:
                self.send(f"WATCHDOG_USEC={self._watchdog}")

    def alive(self) -> None:
        """Say that the service works, if it is time to."""
        now = time.monotonic()
        if self._every is not None and now - self._pinged >= self._every:
            self._pinged = now
            self.send("WATCHDOG=1")


def wall(monotonic_ns: int | None = None) -> str:
    """A time of CLOCK_MONOTONIC (None: now) by the wall clock: RFC 3339, UTC, milliseconds.

    The clocks are compared now, so that a stepped wall clock is told as it is set.
    """
    ns = time.time_ns()
    if monotonic_ns is not None:
        ns += monotonic_ns - time.monotonic_ns()
    # Before 1970 the clock is not set, and a time has no text.
    told = datetime.fromtimestamp(max(0, ns // 10**6) / 1e3, UTC)
    return told.isoformat(timespec="milliseconds").replace("+00:00", "Z")
