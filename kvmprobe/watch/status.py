# SPDX-License-Identifier: MIT
"""The status file: what a running watch knows, for `kvmprobe check` and whoever else asks.

It is one JSON object, /run/kvmprobe/status.json, written anew once a second and renamed into its
place, so that a reader always sees a whole one.  Names of VMs in it are printable.
schema/status-1.json describes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from kvmprobe.errors import KvmprobeError

SCHEMA = "kvmprobe.status/1"
RUNTIME_DIRECTORY = Path("/run/kvmprobe")
FILE_NAME = "status.json"
#: A status is believed while it is younger than this, seconds.
MAX_AGE = 60.0
#: A status is never so large: VMs and findings in it are bounded.
_MAX_BYTES = 16 << 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

#: "watching": probes are attached and awake.  "detached": they are not, and `reason` says why.
State = Literal["watching", "detached"]


class StatusError(KvmprobeError):
    """There is no status that can be believed."""


@dataclass(frozen=True)
class FaultVerdict:
    """The verdict on one fault: its word (`analysis.words.VERDICTS`), and why."""

    verdict: str
    basis: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class WatchedVm:
    """A VM that runs: its number in this watch, its name, its process, and what is said of it.

    `verdict` is the worst of `verdicts` (by fault).  `lost` are records lost by observation that
    concern this VM alone.
    """

    id: int
    name: str | None
    pid: int | None
    verdict: str
    verdicts: dict[str, str]
    lost: dict[str, int]


@dataclass(frozen=True)
class Latched:
    """One fault on one VM, kept until `kvmprobe ack ID` or a new boot.

    `severity` is the worst of `rules` (occurrences by rule).  `first` and `last` are RFC 3339, UTC.
    `ignored` is the reason of the configuration's [[ignore]] entry that covers it, None without.
    `capture` is the file with the evidence, None while there is none.
    """

    id: str
    fault: str
    severity: str
    rules: dict[str, int]
    vm: str | None
    pid: int | None
    count: int
    first: str
    last: str
    ignored: str | None
    capture: str | None


@dataclass(frozen=True)
class Status:
    """What a running watch knows.

    `written_ns` is CLOCK_BOOTTIME, so that a stepped clock makes no status young or old, and a
    suspended host none young.  `since` is when the watch began (RFC 3339, UTC), `seconds` how long
    its probes were awake since.  `attached` are (observation, site) names of `schema.Type` and
    `schema.Site`.  `lost` are all records lost by observation.  `vms_seen` counts also VMs that are
    gone; `vms_left_out` counts VMs that run and are not in `vms`, which is bounded; `findings` is
    bounded too, and `findings_left_out` counts what had no place.
    """

    schema: str
    version: str
    boot_id: str
    pid: int
    written_ns: int
    since: str
    seconds: float
    state: State
    reason: str | None
    verdict: str
    verdicts: dict[str, FaultVerdict]
    vms: tuple[WatchedVm, ...]
    vms_seen: int
    vms_left_out: int
    findings: tuple[Latched, ...]
    findings_left_out: int
    events: dict[str, int]
    lost: dict[str, int]
    attached: tuple[tuple[str, str], ...]
    metrics: str | None

    def age(self) -> float:
        """Seconds since it was written."""
        return (now_ns() - self.written_ns) / 1e9


def now_ns() -> int:
    """CLOCK_BOOTTIME, ns: time since boot, suspension included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """The id of this boot."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def write(status: Status, directory: Path = RUNTIME_DIRECTORY) -> None:
    """Put a status into its place; everybody may read it.  Raises OSError."""
    replace_file(directory / FILE_NAME, json.dumps(asdict(status)).encode(), mode=0o644)


def replace_file(path: Path, data: bytes, *, mode: int, sync: bool = False) -> None:
    """Write `data` beside `path` and rename it there, so that no reader sees half of it.

    With `sync` it is on the disk before.  Raises OSError; what was at `path` is then still there.
    """
    made = path.parent / f".{path.name}.tmp"
    # Left over from a killed watch; the directory is ours alone, see `service`.
    made.unlink(missing_ok=True)
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            if sync:
                file.flush()
                os.fsync(fd)
        made.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)
        raise


def read(directory: Path = RUNTIME_DIRECTORY) -> Status:
    """Read the status that a watch has written, however old it is: see `Status.age`.

    Raises:
        StatusError: there is none, it is of another boot, or it is no status of this version.

    """
    path = directory / FILE_NAME
    try:
        data = _read(path)
    except FileNotFoundError:
        raise StatusError(f"{path} does not exist: no kvmprobe watch runs") from None
    except OSError as error:
        raise StatusError(f"can't read {path}: {error.strerror}") from None
    from pydantic import TypeAdapter, ValidationError

    try:
        found = json.loads(data)
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise StatusError(f"{path} is no {SCHEMA}: restart kvmprobe watch with this version")
        status = TypeAdapter(Status).validate_python(found)
    except (ValueError, RecursionError, ValidationError):
        raise StatusError(f"{path} is damaged: restart kvmprobe watch") from None
    if status.boot_id != boot_id():
        raise StatusError(f"{path} is of another boot: no kvmprobe watch runs")
    return status


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(None, "it is no regular file")
        return file.read(_MAX_BYTES)
