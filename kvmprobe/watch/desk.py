# SPDX-License-Identifier: MIT
"""The desk: events come in, and what they show is latched, logged and told."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.findings import Finding
from kvmprobe.analysis.integrity import name_of
from kvmprobe.analysis.judge import Judge
from kvmprobe.analysis.rules import rule as rule_of
from kvmprobe.analysis.vms import VmNames
from kvmprobe.probes.schema import EVENT, NO_VCPU, Flag, LifecycleChange, Site, Type, columns
from kvmprobe.watch.config import Config, today
from kvmprobe.watch.evidence import Evidence, Recent, gather
from kvmprobe.watch.host import ended
from kvmprobe.watch.keeper import Keeper
from kvmprobe.watch.latch import Latches, VmKey, take_acks, worst_rule
from kvmprobe.watch.output import CRITICAL, ERROR, NOTICE, WARNING, Journal, Log, wall
from kvmprobe.watch.status import Latched, replace_file

#: Findings that the judge may hold before it is replaced: memory stays bounded.
MAX_FOUND = 4096
#: VMs that are gone and still judged: their vCPUs' last records may come late.
GONE_LIMIT = 256
#: Seconds between two lines in the log on a finding that goes on.
AGAIN_SECONDS = 60.0
#: Seconds between two looks for VMs whose process is gone.
SWEEP_SECONDS = 10.0
_NAMED = int(LifecycleChange.VM_NAMED)
_VM_SEEN = int(LifecycleChange.VM_SEEN)
_VM_GONE = int(LifecycleChange.VM_GONE)
_VCPU_GONE = int(LifecycleChange.VCPU_GONE)


@dataclass
class _Told:
    """What was said of a finding: with which alarm, at which count, when (CLOCK_MONOTONIC, s)."""

    alarm: str
    count: int
    at: float


class Desk:
    """Judges the events, and keeps what is found until somebody acknowledges it."""

    def __init__(self, config: Config, boot: str, journal: Journal) -> None:
        """Take up the findings that an earlier watch of this boot has kept."""
        self.config = config
        self.keeper = Keeper(journal)
        #: Occurrences by rule, events and lost records by observation, since the process began.
        self.found: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.vms_seen = 0
        self.evidence_written = 0
        self._journal = journal
        self._directory = config.state_directory
        self._log = Log(self._directory, config.log.max_kib, config.log.files)
        self._evidence = Evidence(self._directory)
        self.latches = Latches(self._directory, boot)
        self._recent = Recent()
        self._written: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._saving = threading.Event()
        self._acked: set[Path] = set()
        if self.latches.damaged:
            journal.say(ERROR, self.latches.damaged)
        if self.latches.kept:
            journal.say(
                WARNING,
                f"{len(self.latches.kept)} finding(s) of this boot are not acknowledged yet: "
                "kvmprobe ack lists them",
            )
        self._told = {
            each.id: _Told(self._alarm(each), each.count, 0.0)
            for each in self.latches.kept.values()
        }
        self.judge: Judge | None = None
        self._new_stream()

    def _new_stream(self) -> None:
        self._swept = 0.0
        self.vms: dict[int, VmKey] = {}
        self.names = VmNames()
        self._gone: list[int] = []
        self._life: dict[int, dict[tuple[int, int, int], np.void]] = {}
        self._counted: dict[tuple[int, int, str], int] = {}
        self._lossy: dict[int, tuple[int, float]] = {}
        self._occurrences = 0

    def configure(self, config: Config) -> None:
        """Go on with another configuration, whose directories are the same."""
        self.config = config
        self._log.configure(config.log.max_kib, config.log.files)

    def begin(self, header: Mapping[str, Any]) -> None:
        """Begin a new stream of events: VMs are numbered anew."""
        self._header = {
            **header,
            "source": {"kind": "live", "note": "events around a finding of kvmprobe watch"},
        }
        self._new_stream()
        self._begin_judge(from_first=True)

    def _begin_judge(self, *, from_first: bool) -> None:
        self.judge = Judge(self._header["plan"], from_first=from_first, gone_limit=GONE_LIMIT)
        self._counted = {}
        self._lossy = {}
        self._occurrences = 0

    def feed(self, rows: NDArray[Any]) -> None:
        """Take in events, dtype EVENT, in the order of their draining."""
        if not len(rows) or self.judge is None:
            return
        counts = np.bincount(rows["type"])
        for kind in np.flatnonzero(counts).tolist():
            if kind != Type.LOSS:
                self.events[name_of(Type, kind)] += int(counts[kind])
        if len(counts) > Type.LOSS and counts[Type.LOSS]:
            for loss in rows[rows["type"] == Type.LOSS]:
                self.lost[name_of(Type, int(loss["kind"]))] += int(loss["addr"])
        self._recent.add(rows)
        self._judge(rows)

    def _judge(self, rows: NDArray[Any]) -> None:
        lifecycle = rows[rows["type"] == Type.LIFECYCLE]
        self.names.feed(columns(lifecycle))
        for row in lifecycle:
            self._follow(row.copy())
        if self.judge is not None:
            self.judge.feed(columns(rows))

    def _follow(self, row: np.void) -> None:
        vm, kind, vcpu = int(row["vm"]), int(row["kind"]), int(row["vcpu"])
        if kind == _VM_GONE:
            self._gone.append(vm)
            return
        if kind == _VM_SEEN:
            self.vms[vm] = VmKey(int(row["aux"]), int(row["addr"]))
            self.vms_seen += 1
        if kind != _VCPU_GONE:
            part = int(row["len"]) if kind == _NAMED else 0
            self._life.setdefault(vm, {})[kind, vcpu, part] = row

    def _sweep(self, now: float) -> None:
        """Note the VMs whose process is gone: not every kernel lets us see a VM's end."""
        if now - self._swept < SWEEP_SECONDS:
            return
        self._swept = now
        over = ended({vm.pid for vm in self.vms.values() if vm.pid is not None})
        rows = np.zeros(sum(vm.pid in over for vm in self.vms.values()), EVENT)
        rows["ts"], rows["vcpu"], rows["slot"] = time.monotonic_ns(), NO_VCPU, -1
        rows["type"], rows["kind"], rows["site"] = Type.LIFECYCLE, _VM_GONE, Site.DRAIN
        rows["flags"] = Flag.CANDIDATE
        rows["vm"] = [number for number, vm in self.vms.items() if vm.pid in over]
        rows["aux"] = [vm.pid for vm in self.vms.values() if vm.pid in over]
        self._judge(rows)

    def look(self, now: float, flight: Callable[[], NDArray[Any]]) -> None:
        """Tell and keep what is new.

        Args:
            now: CLOCK_MONOTONIC, s.
            flight: gives the flight recorder's events, dtype EVENT, when evidence is wanted.

        """
        self._take_acks()
        self._note_written()
        self._sweep(now)
        if self.judge is not None and self.judge.occurrences != self._occurrences:
            self._occurrences = self.judge.occurrences
            self._latch(self.judge.findings(), flight)
        for vm in self._gone:
            self.vms.pop(vm, None)
            self._life.pop(vm, None)
            self.names.forget(vm)
        self._gone = []
        self._forgive(now)
        self._tell(now)
        self.save()
        self._remove_acks()
        if len(self._counted) > MAX_FOUND:
            self._begin_judge(from_first=False)

    def ignored(self, latched: Latched) -> str | None:
        """Why a finding raises no alarm: an [[ignore]] entry for each of its rules; else None."""
        day = today()
        reasons = [
            next((i.reason for i in self.config.ignore if i.covers(rule, latched.vm, day)), None)
            for rule in latched.rules
        ]
        return "; ".join(dict.fromkeys(r for r in reasons if r)) if all(reasons) else None

    def latched(self) -> Iterable[Latched]:
        """The findings kept, with what the configuration says of them."""
        return tuple(replace(f, ignored=self.ignored(f)) for f in self.latches.kept.values())

    def save(self) -> None:
        """Have the findings brought to the disk, if that is needed and not under way."""
        if not self.latches.unsaved or self._saving.is_set():
            return
        data = self.latches.data()

        def write() -> None:
            try:
                replace_file(self.latches.path, data, mode=0o600, sync=True)
            except OSError:
                self.latches.unsaved = True
                raise
            finally:
                self._saving.clear()

        self._saving.set()
        self.latches.unsaved = False
        if not self.keeper.do("state", write):
            self.latches.unsaved = True
            self._saving.clear()

    def _alarm(self, latched: Latched) -> str:
        return "ignored" if self.ignored(latched) is not None else latched.severity

    def _latch(self, findings: Iterable[Finding], flight: Callable[[], NDArray[Any]]) -> None:
        new: dict[str, tuple[int, list[NDArray[Any]]]] = {}
        judge = self.judge
        if judge is None:
            return
        for f in findings:
            key = f.vm, f.vcpu, f.rule.id
            more = f.count - self._counted.get(key, 0)
            if not more:
                continue
            self._counted[key] = f.count
            self.found[f.rule.id] += more
            if f.rule.severity == "info":
                continue
            vm = self.vms.get(f.vm) or VmKey(None, f.vm)
            first = f.first_ts if more == f.count else f.last_ts
            kept = self.latches.add(
                f.rule.id, more, vm, self.names.get(f.vm).name, wall(first), wall(f.last_ts)
            )
            if kept is not None:
                new.setdefault(kept.id, (f.vm, []))[1].append(f.evidence)
        recorded: NDArray[Any] | None = None
        for key_, (number, evidence) in new.items():
            if self.latches.kept[key_].capture is None and self.config.evidence.files:
                if recorded is None:
                    recorded = flight()
                self._write_evidence(key_, number, evidence, recorded)

    def _write_evidence(
        self, key: str, vm: int, evidence: list[NDArray[Any]], recorded: NDArray[Any]
    ) -> None:
        life = [np.array([row], EVENT) for row in self._life.get(vm, {}).values()]
        own = recorded[recorded["vm"] == vm]
        rows = gather(*life, *evidence, self._recent.of(vm), own)
        keep = set(self.latches.kept)

        def write() -> None:
            files = self.config.evidence.files
            path = self._evidence.write(key, self._header, rows, keep, files)
            if path is not None:
                self._written.put((key, str(path)))

        self.keeper.do("evidence", write)

    def _note_written(self) -> None:
        while not self._written.empty():
            key, path = self._written.get()
            self.evidence_written += 1
            kept = self.latches.kept.get(key)
            if kept is not None:
                self.latches.put(replace(kept, capture=path))
                self._say_in_log("evidence", self.latches.kept[key])

    def _tell(self, now: float) -> None:
        """Log and tell what has become another alarm; log what goes on, now and then."""
        for each in self.latches.kept.values():
            alarm, told = self._alarm(each), self._told.get(each.id)
            if told is None or told.alarm != alarm:
                self._told[each.id] = _Told(alarm, each.count, now)
                self._say_in_log("found" if told is None else "changed", each)
                self._say(each, alarm)
            elif each.count != told.count and now - told.at >= AGAIN_SECONDS:
                self._told[each.id] = _Told(alarm, each.count, now)
                self._say_in_log("again", each)

    def _say_in_log(self, what: str, latched: Latched, **more: str) -> None:
        line = {
            "time": wall(),
            "what": what,
            **asdict(replace(latched, ignored=self.ignored(latched))),
            **more,
        }
        self.keeper.do("log", lambda: self._log.write(line))

    def _say(self, latched: Latched, alarm: str) -> None:
        worst = worst_rule(latched)
        ignored = self.ignored(latched)
        message = (
            f"{latched.severity} finding {latched.id}: {worst}: {rule_of(worst).title}; "
            f"VM {latched.vm or 'without a name'} (process {latched.pid or 'unknown'}), "
            f"{latched.count} time(s)"
        )
        if ignored is not None:
            message += f"; ignored: {ignored}"
        priority = {"critical": CRITICAL, "warning": WARNING}.get(alarm, NOTICE)
        self._journal.say(
            priority,
            message,
            id=latched.id,
            fault=latched.fault,
            rule=worst,
            severity=latched.severity,
            vm=latched.vm,
            vm_pid=latched.pid,
            count=latched.count,
        )

    def _take_acks(self) -> None:
        try:
            acks = list(take_acks(self._directory))
        except OSError:
            return
        for path, ack in acks:
            if path in self._acked:
                continue
            self._acked.add(path)
            latched = self.latches.drop(ack.id)
            if latched is not None:
                self._told.pop(ack.id, None)
                self._say_in_log("acknowledged", latched, reason=ack.reason, user=ack.user)
                self._journal.say(
                    NOTICE,
                    f"finding {ack.id} was acknowledged by {ack.user}: {ack.reason}",
                    id=ack.id,
                )

    def _remove_acks(self) -> None:
        """Remove the acknowledgements that the findings on the disk already know of."""
        if self.latches.unsaved or self._saving.is_set():
            return
        for path in self._acked:
            with contextlib.suppress(OSError):
                path.unlink()
        self._acked.clear()

    def _forgive(self, now: float) -> None:
        """Let go of losses to which none was added for `loss.degrades` seconds."""
        if self.judge is None:
            return
        integrity = self.judge.integrity
        for vm, doubts in integrity.vms.items():
            amount = doubts.lost.total() + doubts.missing
            if amount and self._lossy.get(vm, (0, now))[0] != amount:
                self._lossy[vm] = amount, now
        for vm, (_, since) in list(self._lossy.items()):
            if now - since >= self.config.loss.degrades:
                integrity.forgive(vm)
                del self._lossy[vm]
