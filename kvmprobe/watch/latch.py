# SPDX-License-Identifier: MIT
"""Latched findings: one a fault and VM, kept over restarts until they are acknowledged.

The state directory has `latched.json`, the findings of this boot, and `ack-ID.json`, an
acknowledgement that `kvmprobe ack` left for the watch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvmprobe.analysis.rules import rule as rule_of
from kvmprobe.analysis.rules.model import SEVERITIES
from kvmprobe.errors import UsageError
from kvmprobe.watch.status import Latched, replace_file

SCHEMA = "kvmprobe.latched/1"
FILE_NAME = "latched.json"
#: Most findings that are kept; what comes beyond is counted.
MAX_LATCHED = 1000
_MAX_BYTES = 16 << 20
_ID = re.compile(r"[0-9a-f]{10}")


@dataclass(frozen=True)
class VmKey:
    """What a VM is across restarts of a watch: its process.  Two VMs of one process are one."""

    pid: int | None
    start: int


@dataclass(frozen=True)
class Acknowledgement:
    """What `kvmprobe ack` leaves: who took note of which finding, why and when (RFC 3339, UTC)."""

    id: str
    reason: str
    user: str
    time: str


def latch_id(boot: str, fault: str, vm: VmKey) -> str:
    """The id of a fault on a VM: the same whenever it is found in this boot."""
    text = f"{boot} {fault} {vm.pid} {vm.start}"
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def worst_rule(latched: Latched) -> str:
    """The rule that says most of a finding: one of its severity."""
    return max(latched.rules, key=lambda rule: rule_of(rule).severity == latched.severity)


class Latches:
    """The findings of this boot that nobody has acknowledged yet."""

    def __init__(self, directory: Path, boot: str) -> None:
        """Read what an earlier watch of this boot kept.

        A file of another boot is void.  So is one that can't be read: `damaged` then says why.
        """
        self.path = directory / FILE_NAME
        self._boot = boot
        self.damaged: str | None = None
        #: Findings by id, the oldest first.
        self.kept: dict[str, Latched] = {}
        #: Occurrences that found no place.
        self.left_out = 0
        #: Whether there is something that `path` does not hold yet.
        self.unsaved = False
        self._load()

    def _load(self) -> None:
        from pydantic import TypeAdapter

        try:
            with self.path.open("rb") as file:
                found = json.loads(file.read(_MAX_BYTES))
            if found["schema"] != SCHEMA:
                raise ValueError(found["schema"])
            if found["boot_id"] == self._boot:
                latched = TypeAdapter(tuple[Latched, ...]).validate_python(found["latched"])
                self.kept = {each.id: each for each in latched[:MAX_LATCHED]}
                self.left_out = int(found["left_out"])
        except FileNotFoundError:
            pass
        except OSError as error:
            self.damaged = f"can't read {self.path}: {error.strerror}"
        except (ValueError, KeyError, TypeError, RecursionError):
            self.damaged = f"{self.path} is damaged; what it held is forgotten"

    def add(
        self,
        rule: str,
        count: int,
        vm: VmKey,
        name: str | None,
        first: str,
        last: str,
    ) -> Latched | None:
        """Count `count` more occurrences of a rule on a VM; None when there is no place for it.

        `first` and `last` are when these occurrences were, RFC 3339, UTC.
        """
        fault, severity = rule_of(rule).fault, rule_of(rule).severity
        key = latch_id(self._boot, fault, vm)
        before = self.kept.get(key)
        if before is None:
            if len(self.kept) >= MAX_LATCHED:
                self.left_out += count
                self.unsaved = True
                return None
            rules = {rule: count}
            now = Latched(key, fault, severity, rules, name, vm.pid, count, first, last, None, None)
        else:
            rules = before.rules | {rule: before.rules.get(rule, 0) + count}
            now = replace(
                before,
                severity=max(before.severity, severity, key=SEVERITIES.index),
                rules=rules,
                vm=name or before.vm,
                count=before.count + count,
                first=min(before.first, first),
                last=max(before.last, last),
            )
        return self.put(now)

    def put(self, latched: Latched) -> Latched:
        """Keep a changed finding."""
        self.kept[latched.id] = latched
        self.unsaved = True
        return latched

    def drop(self, key: str) -> Latched | None:
        """Forget a finding that was acknowledged; None if there is none of that id."""
        found = self.kept.pop(key, None)
        self.unsaved |= found is not None
        return found

    def data(self) -> bytes:
        """What the file at `path` is to hold."""
        found = {
            "schema": SCHEMA,
            "boot_id": self._boot,
            "left_out": self.left_out,
            "latched": [asdict(each) for each in self.kept.values()],
        }
        return json.dumps(found).encode()


def request_ack(directory: Path, ack: Acknowledgement) -> Path:
    """Leave an acknowledgement for the watch that has the directory; it removes the file.

    Raises OSError.
    """
    path = directory / f"ack-{check_id(ack.id)}.json"
    replace_file(path, json.dumps(asdict(ack)).encode(), mode=0o600, sync=True)
    return path


def take_acks(directory: Path) -> Iterator[tuple[Path, Acknowledgement]]:
    """The acknowledgements that wait, and their files, which the caller removes.  Raises OSError.

    A file that is none is removed here.
    """
    from pydantic import TypeAdapter

    for path in sorted(directory.glob("ack-*.json")):
        try:
            ack = TypeAdapter(Acknowledgement).validate_json(path.read_bytes())
            check_id(ack.id)
        except (ValueError, UsageError):
            path.unlink(missing_ok=True)
            continue
        yield path, ack


def check_id(text: str) -> str:
    """Return `text` if it can be an id; it becomes part of a path.  Raises UsageError."""
    if not _ID.fullmatch(text):
        raise UsageError(f"{text!r} is no id: kvmprobe ack lists them")
    return text
