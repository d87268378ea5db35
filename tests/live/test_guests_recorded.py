# SPDX-License-Identifier: MIT
"""What a recording of the load guest holds, against what its VMM counted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.guests import load
from kvmprobe.probes import schema
from kvmprobe.probes.schema import Flag, LifecycleChange, MmioType, Type
from kvmprobe.store.reader import CaptureReader
from tests.processes import KVMPROBE, ROOT


@dataclass(frozen=True)
class Recording:
    path: Path
    vm: int
    events: NDArray[Any]
    counts: dict[str, int]

    def mmio(self, kind: MmioType) -> NDArray[Any]:
        """The MMIO events of one kind."""
        return select(self.events, Type.MMIO, kind)


def select(events: NDArray[Any], observation: Type, kind: int) -> NDArray[Any]:
    chosen: NDArray[Any] = events[(events["type"] == observation) & (events["kind"] == kind)]
    return chosen


def record(path: Path, options: Sequence[str]) -> Recording:
    guest = [sys.executable, "-m", "kvmprobe.guests.load", "--seconds", "1", *options]
    command = [*KVMPROBE, "record", "-o", str(path), "--", *guest]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = (line.split() for line in run.stdout.splitlines())
    counts = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}
    with CaptureReader(path) as reader:
        events = np.concatenate([schema.rows(batch) for batch in reader.batches()])
    assert not (events["type"] == Type.LOSS).any()
    # Other VMs of this machine may run.
    seen = select(events, Type.LIFECYCLE, LifecycleChange.VM_SEEN)
    (vm,) = seen["vm"][seen["aux"] == counts["pid"]]
    return Recording(path, int(vm), events[events["vm"] == vm], counts)


def findings(recording: Recording) -> list[dict[str, Any]]:
    command = [*KVMPROBE, "analyze", str(recording.path), "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)["findings"]
    return [finding for finding in found if finding["vm"]["id"] == recording.vm]


def test_every_mmio_access_is_recorded_once(tmp_path: Path) -> None:
    recording = record(tmp_path / "load", ["--rate", "5000"])
    reads, writes = recording.mmio(MmioType.UNSATISFIED_READ), recording.mmio(MmioType.WRITE)
    assert len(reads) == recording.counts["mmio_reads"] > 0
    assert len(writes) == recording.counts["mmio_writes"] > 0
    for events in (reads, writes):
        assert (events["addr"] == load.HOLE).all()
        assert (events["len"] == 4).all()
        assert (events["slot"] == -1).all()
        assert (events["flags"] & Flag.SLOT_KNOWN).all()
        assert (events["vcpu"] == 0).all()
    assert findings(recording) == []


def test_string_instructions_at_the_hole(tmp_path: Path) -> None:
    mix = ["--outs-mmio", "5", "--ins-mmio", "9", "--mmio", "0", "--ram", "0", "--pio", "0"]
    recording = record(tmp_path / "load", ["--rate", "2000", *mix])
    rounds = recording.counts["rounds"]
    reads, writes = recording.mmio(MmioType.UNSATISFIED_READ), recording.mmio(MmioType.WRITE)
    # KVM stores the bytes of a REP INSB at once: one event, though they leave in pieces of 8.
    assert len(writes) == rounds
    assert (writes["len"] == 9).all()
    assert len(reads) == 5 * rounds == recording.counts["mmio_reads"]
    assert (reads["len"] == 1).all()


def test_two_vcpus_have_sequences_without_gaps(tmp_path: Path) -> None:
    recording = record(tmp_path / "load", ["--rate", "2000", "--vcpus", "2"])
    seen = select(recording.events, Type.LIFECYCLE, LifecycleChange.VCPU_SEEN)
    assert sorted(seen["vcpu"].tolist()) == [0, 1]
    for vcpu in (0, 1):
        seq = recording.events["seq"][recording.events["vcpu"] == vcpu].astype(np.int64)
        assert len(seq) > 100
        assert (np.diff(np.sort(seq)) == 1).all()


def test_a_flipped_memslot_convicts_nobody(tmp_path: Path) -> None:
    recording = record(tmp_path / "load", ["--flips", "300", "--pio", "0", "--ram", "0"])
    assert recording.counts["memslot_changes"] > 10
    reads = recording.mmio(MmioType.UNSATISFIED_READ)
    assert len(reads) == recording.counts["mmio_reads"] > 0
    assert len(recording.mmio(MmioType.WRITE)) == recording.counts["mmio_writes"] > 0
    assert findings(recording) == []
