# SPDX-License-Identifier: MIT
"""Captures of a fleet that doesn't exist, and the truth about it."""

from __future__ import annotations

import hashlib
import json
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from kvmprobe.analysis.rules import RULES
from kvmprobe.analysis.words import FIXED, INCONCLUSIVE, NOT_EXERCISED, VULNERABLE
from kvmprobe.errors import CaptureError, UsageError
from kvmprobe.fleet import scenario
from kvmprobe.fleet.background import ROUND, Background
from kvmprobe.fleet.progress import Progress
from kvmprobe.formats.export_parquet import ParquetWriter
from kvmprobe.probes.schema import (
    NO_VCPU,
    SLOT_TSS,
    FaultinResult,
    Flag,
    LifecycleChange,
    Site,
    Type,
    columns,
)
from kvmprobe.store import format as fmt
from kvmprobe.store.files import create_output, write_error

TRUTH = "truth.json"
_START = datetime(2026, 1, 1, tzinfo=UTC)
_DAY = 86_400 * 10**9
#: CLOCK_MONOTONIC when a recording begins, ns.
_BOOTED = 60 * 10**9
#: Time from one calm event to the next: a busy host has 10,000 a second.
_STEP = 10**5
#: One host in so many is booted anew on some day.
_BOOTS = 4
_VERDICT = {
    "hit": VULNERABLE, "filled": VULNERABLE, "lossy": INCONCLUSIVE, "fixed": FIXED,
    "calm": NOT_EXERCISED,
}  # fmt: skip


@dataclass(frozen=True)
class Fleet:
    """What to simulate: `events` in all; shares of all hosts, `hit` among the `vulnerable`."""

    hosts: int
    days: int
    events: int
    kernels: int = 4
    vulnerable: float = 0.1
    hit: float = 0.05
    lossy: float = 0.02
    vms: int = 4
    vcpus: int = 4
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse what can't be; raises UsageError."""
        if not 0 <= self.hit <= self.vulnerable <= 1:
            raise UsageError("--hit is a share of all hosts and at most that of --vulnerable")
        if not 0 <= self.lossy <= 1 - self.vulnerable:
            raise UsageError("--lossy and --vulnerable are shares of all hosts, together at most 1")
        if self.events < self.hosts * self.days:
            raise UsageError("--events is the number of all events: at least one a host and day")


@dataclass
class _Recording:
    """One recording of a host: its days, and the rows that decide, by day."""

    days: range
    kernel: str
    decide: dict[int, list[list[scenario.Row]]]


def simulate_fleet(fleet: Fleet, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Write a fleet's captures as Parquet, FOLDER/HOST/DAY.parquet, and FOLDER/truth.json.

    Returns the truth of each host: its verdict on internal-slot, and all findings there are.

    Raises:
        KvmprobeError: the folder is there already, or can't be written to.

    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise CaptureError(f"{folder} exists; name a new folder") from None
    except OSError as error:
        raise write_error(folder, error) from None
    truth: list[dict[str, Any]] = []
    context = get_context("spawn")  # pyarrow's threads don't survive a fork
    with Progress(fleet.hosts, fleet.hosts) as progress:
        pool = ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
        try:
            made = [pool.submit(simulate_host, fleet, folder, n) for n in range(fleet.hosts)]
            for host in as_completed(made):
                truth.append(host.result())
                progress.done(1)
        finally:
            pool.shutdown(cancel_futures=True)
    truth.sort(key=lambda host: str(host["host"]))
    with create_output(folder / TRUTH) as file:
        file.write(json.dumps({"fleet": asdict(fleet), "hosts": truth}, indent=1).encode())
    return truth


def simulate_host(fleet: Fleet, folder: Path, number: int) -> dict[str, Any]:
    """Write one host's captures, and return the truth about it."""
    random = np.random.default_rng([fleet.seed, number])
    kind = _kinds(fleet)[number]
    name = f"host-{number:0{len(str(fleet.hosts))}}"
    (folder / name).mkdir()
    events = fleet.events // fleet.hosts + (number < fleet.events % fleet.hosts)
    recordings = _recordings(fleet, kind, random)
    verdict = _VERDICT[kind]
    if verdict == FIXED and len(recordings) > 1:
        verdict = NOT_EXERCISED  # proof in one recording is none in the other
    truth: dict[str, Any] = {
        "host": name, "kind": kind, "verdict": verdict, "findings": [], "events": 0,
        "lost": 0, "kernels": list(dict.fromkeys(r.kernel for r in recordings)),
    }  # fmt: skip
    for index, recording in enumerate(recordings):
        header = _header(fleet, number, index, recording)
        taken, offset = 0, int(random.integers(0, ROUND))
        writer = _Host(fleet, header, recording)
        for day in recording.days:
            many = events // fleet.days + (day < events % fleet.days)
            path = folder / name / f"{_START + timedelta(day):%Y-%m-%d}.parquet"
            with create_output(path) as file:
                truth["events"] += writer.write_day(file, day, offset, taken, many)
            taken += many
        truth["findings"] += writer.findings
        truth["lost"] += writer.lost
    return truth


@lru_cache
def _kinds(fleet: Fleet) -> list[str]:
    """What each host is, by its number."""
    vulnerable, hit = round(fleet.hosts * fleet.vulnerable), round(fleet.hosts * fleet.hit)
    lossy = round(fleet.hosts * fleet.lossy)
    rest = fleet.hosts - vulnerable - lossy
    kinds = ["hit"] * hit + ["filled"] * (vulnerable - hit) + ["lossy"] * lossy
    kinds += ["fixed"] * (rest // 2) + ["calm"] * (rest - rest // 2)
    order = np.random.default_rng(fleet.seed).permutation(fleet.hosts)
    return [kinds[place] for place in order.tolist()]


@lru_cache
def _background(vms: int, vcpus: int, seed: int) -> Background:
    return Background(vms, vcpus, seed)


def _recordings(fleet: Fleet, kind: str, random: np.random.Generator) -> list[_Recording]:
    """Choose a host's recordings, and what happens in them."""
    unfixed = [f"6.1.{n}-sim" for n in range((fleet.kernels + 1) // 2)]
    fixed = [f"6.12.{n}-sim" for n in range(fleet.kernels // 2)] or unfixed
    kernels = {"hit": unfixed, "filled": unfixed, "fixed": fixed}.get(kind, unfixed + fixed)
    days = [range(fleet.days)]
    if fleet.days > 1 and random.integers(0, _BOOTS) == 0:
        again = int(random.integers(1, fleet.days))
        days = [range(again), range(again, fleet.days)]
    recordings = [_Recording(own, str(random.choice(kernels)), {}) for own in days]
    chosen = recordings[int(random.integers(0, len(recordings)))]
    day = int(random.integers(chosen.days.start, chosen.days.stop))
    decide = chosen.decide
    if kind == "hit":
        decide[day] = [scenario.filled() + scenario.armed()]
        # Half of them are hit on another day than the cache was filled: in another file.
        later = min(day + int(random.integers(0, 2)), chosen.days.stop - 1)
        hits = int(random.integers(1, 6))
        own = [row for n in range(hits) for row in scenario.hit(write=bool(n % 2))]
        decide.setdefault(later, []).append(own)
    elif kind == "filled":
        decide[day] = [scenario.filled()]
    elif kind == "fixed":
        decide[day] = [scenario.kept()]
    elif kind == "lossy":
        decide[day] = [scenario.lost(int(random.integers(1, 1000)), int(random.integers(0, 64)))]
    return recordings


def _header(fleet: Fleet, number: int, index: int, recording: _Recording) -> dict[str, Any]:
    header = fmt.new_header("live")
    started = _START + timedelta(recording.days.start)
    who = f"{fleet.seed} {number}"
    unfixed = recording.kernel.startswith("6.1.")
    header["started"] = started.isoformat().replace("+00:00", "Z")
    header["clock"] = {
        "monotonic_ns": _BOOTED,
        "wall_ns": int(started.timestamp()) * 10**9,
    }
    header["source"]["note"] = "simulated: kvmprobe fleet simulate"
    header["host"] |= {
        "boot_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{who} {index}")),
        "machine": hashlib.sha256(who.encode()).hexdigest()[:32],
        "kernel": recording.kernel,
        "vendor": "intel",
        "parameters": {
            "kvm_intel.ept": "Y",
            "kvm_intel.nested": "Y",
            "kvm_intel.unrestricted_guest": "N" if unfixed or number % 2 else "Y",
        },
    }
    header["plan"] = [
        {"observation": observation, "site": site, "attachment": None, "attached": True,
         "reason": None}
        for observation, site in _sites()
    ]  # fmt: skip
    return header


@lru_cache
def _sites() -> list[tuple[str, str]]:
    """Everything that rules need to see: nothing is missing in a simulated host's recording."""
    needed = {
        (wanted.type.name, site.name)
        for rule in RULES
        for group in (*rule.needs.convicts, rule.needs.acquits)
        for wanted in group
        for site in wanted.sites or (Site.FIRST_SIGHT,)
    }
    return sorted(needed)


class _Host:
    """Writes the days of one recording, and notes what is to be found in them."""

    def __init__(self, fleet: Fleet, header: dict[str, Any], recording: _Recording) -> None:
        self.fleet, self.header, self.recording = fleet, header, recording
        self.background = _background(fleet.vms, fleet.vcpus, fleet.seed)
        self.findings: list[dict[str, Any]] = []
        self.lost = 0
        #: The VM to which what decides happens has nothing else to do.
        self.victim = fleet.vms + 1
        self._seq = 0

    def write_day(self, file: Any, day: int, offset: int, taken: int, many: int) -> int:  # noqa: ANN401
        """Write a day's part; returns how many events it has, losses not counted."""
        writer = ParquetWriter(file, self.header)
        start = _BOOTED + (day - self.recording.days.start) * _DAY
        step = min((_DAY - 10**9) // (many + 1), _STEP)
        written = 0
        if day == self.recording.days.start:
            written += writer.write(columns(self._begin(start)))
        start += 10**9
        decide = self.recording.decide.get(day, [])
        # Spread evenly, between calm events.
        cuts = [many * (n + 1) // (len(decide) + 1) for n in range(len(decide))]
        for first, last, own in zip([0, *cuts], [*cuts, many], [*decide, None], strict=True):
            for part in self.background.take(
                offset, taken + first, last - first, start + first * step, step
            ):
                written += writer.write(part)
            if own is not None:
                written += writer.write(
                    columns(self._decided(own, start + last * step - step // 4))
                )
        writer.close()
        losses = [row for own in decide for row in own if row["type"] == Type.LOSS]
        return written - len(losses)

    def _begin(self, start: int) -> Any:  # noqa: ANN401 - an array of dtype EVENT
        """All VMs and vCPUs are seen."""
        vms, vcpus = range(1, self.victim), range(self.fleet.vcpus)
        first = []
        for vm in vms:
            seen = {"type": Type.LIFECYCLE, "site": Site.FIRST_SIGHT, "slot": -1, "vm": vm}
            seen["flags"] = Flag.CANDIDATE
            name = int.from_bytes(b"qemu-sim", "little")
            first.append(seen | {"vcpu": NO_VCPU, "kind": LifecycleChange.VM_SEEN, "value": name,
                                 "aux": 1000 + vm, "len": 1})  # fmt: skip
            for vcpu in vcpus:
                first.append(seen | {"vcpu": vcpu, "kind": LifecycleChange.VCPU_SEEN,
                                     "aux": 10_000 * vm + vcpu})  # fmt: skip
        times = start + np.arange(len(first), dtype="u8")
        made = scenario.rows(first, 0, 0, times)
        made["seq"] = 0
        victim = self._decided(scenario.seen(), start + len(first))
        return np.concatenate([made, victim])

    def _decided(self, own: list[scenario.Row], start: int) -> Any:  # noqa: ANN401
        """Make rows of the victim, and note the findings in them."""
        times = start + np.arange(len(own), dtype="u8")
        made = scenario.rows(own, self.victim, self._seq, times)
        self._seq += int(np.count_nonzero(made["vcpu"] != NO_VCPU))
        wall = self.header["clock"]["wall_ns"] - self.header["clock"]["monotonic_ns"]
        for rule, number in _found(own):
            at = int(times[number]) + wall
            known = next((f for f in self.findings if f["rule"] == rule), None)
            if known is None:
                self.findings.append(
                    {"rule": rule, "kernel": self.recording.kernel, "vm": self.victim, "vcpu": 0,
                     "count": 1, "first_ns": at, "last_ns": at}
                )  # fmt: skip
            else:
                known |= {"count": known["count"] + 1, "last_ns": at}
        self.lost += sum(row["addr"] for row in own if row["type"] == Type.LOSS)
        return made


def _found(own: list[scenario.Row]) -> Iterator[tuple[str, int]]:
    """What the rows of a scenario show: rule, and the row that shows it."""
    for number, row in enumerate(own):
        if row["slot"] != SLOT_TSS or row["type"] == Type.MEMSLOT:
            continue
        in_l2 = bool(row["flags"] & Flag.L2)
        if row["type"] == Type.FAULTIN and row["kind"] == FaultinResult.NOSLOT:
            yield "internal-slot-fill", number
        elif row["type"] == Type.CACHE and not in_l2:
            yield "internal-slot-armed", number
        elif row["type"] == Type.MATCH and not in_l2:
            yield "internal-slot-hit", number
