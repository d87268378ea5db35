# SPDX-License-Identifier: MIT
"""Live batches as DataFrames, memslots that change under a load, and programs for other kernels."""

from __future__ import annotations

import json
import lzma
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import kvmprobe
from kvmprobe.capture.layout import read_layout
from kvmprobe.capture.plan import Method, make_plan
from kvmprobe.capture.points import FUNCTIONS
from kvmprobe.capture.program import Program
from kvmprobe.capture.source import Options, program_text
from kvmprobe.host.bccload import load_bcc
from kvmprobe.host.btf import KernelBtf
from kvmprobe.host.symbols import Symbols
from kvmprobe.probes.schema import Flag, Type
from kvmprobe.store.reader import CaptureReader
from tests.processes import KVMPROBE, LOAD, ROOT, running

BTF = ROOT / "tests/data/btf"


@pytest.fixture
def guest() -> Iterator[subprocess.Popen[bytes]]:
    with running(*LOAD, "--seconds", "60", "--rate", "2000") as process:
        yield process


def test_stream_yields_frames_with_events(guest: subprocess.Popen[bytes]) -> None:
    frames = list(kvmprobe.stream(duration=1, pid=guest.pid))
    assert len(frames) > 3
    events = pd.concat(frames)
    assert list(frames[0].columns) == list(frames[-1].columns)
    observations = set(events["type"].astype(str))
    assert {"EMULATE", "MMIO", "LIFECYCLE"} <= observations
    assert events["vm"].nunique() == 1


def test_a_stream_that_is_left_early_leaves_nothing_attached(
    guest: subprocess.Popen[bytes],
) -> None:
    def programs() -> int:
        found = 0
        for info in Path("/proc/self/fdinfo").iterdir():
            try:
                found += "prog_id" in info.read_text()
            except OSError:
                continue
        return found

    stream = kvmprobe.stream(pid=guest.pid)
    assert len(next(stream)) > 0
    assert programs() > 0
    stream.close()  # type: ignore[attr-defined]
    assert programs() == 0


def test_memslots_that_change_convict_nobody(tmp_path: Path) -> None:
    path = tmp_path / "flips"
    # The load's own page of MMIO becomes memory and MMIO again, on another thread.
    command = [*LOAD, "--seconds", "5", "--rate", "5000", "--flips", "200", "--vcpus", "2"]
    run = subprocess.run(
        [*KVMPROBE, "record", "-o", str(path), "--", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    counts = dict(line.split() for line in run.stdout.splitlines())
    with CaptureReader(path) as reader:
        batches = list(reader.batches())
    events = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    (vm,) = set(
        events["vm"][
            (events["type"] == Type.LIFECYCLE)
            & (events["vcpu"] == 0xFFFF)
            & (events["aux"] == int(counts["pid"]))
        ].tolist()
    )
    own = events["vm"] == vm
    moved = own & (events["type"] == Type.GENERATION)
    assert np.count_nonzero(moved) > 20
    # A generation that says it is being changed is never taken for one to compare with.
    assert (events["gen"][moved] != events["value"][moved]).all()
    mmio = own & (events["type"] == Type.MMIO)
    assert np.count_nonzero(mmio) > 100
    # At the page that comes and goes: no slot, or one that is going, or the lookup says unstable.
    unsure = Flag.UNSTABLE | Flag.SLOT_INVALID
    sure = mmio & ((events["flags"] & unsure) == 0)
    assert np.count_nonzero(sure) > 0
    assert set(events["slot"][sure].tolist()) == {-1}
    analysis = subprocess.run(
        [*KVMPROBE, "analyze", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    findings = json.loads(analysis.stdout)["findings"]
    assert [f for f in findings if f["vm"]["id"] == vm] == []


@pytest.mark.parametrize("version", ["6.1", "6.12", "7.2"])
def test_programs_compile_for_other_kernels(tmp_path: Path, version: str) -> None:
    """With all of the C in it; they are not loaded, this kernel's verifier is not theirs."""
    for packed in (BTF / version).glob("*.xz"):
        (tmp_path / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    btf = KernelBtf.live(tmp_path)
    names = [name for point in FUNCTIONS for name in point.functions if btf.function(name)]
    symbols = Symbols(f"0 t {name} [kvm]" for name in names)
    methods: dict[str, dict[Method, str | None]] = {
        "6.1": {"kprobe": None, "fentry": "not needed"},
        "6.12": {"kprobe": "not here", "fentry": None},
        "7.2": {"kprobe": "not here", "fentry": "not here"},
    }
    plan = make_plan(btf, symbols, methods[version])
    watch, flight = version != "6.1", version == "7.2"
    options = Options(1 << 16, 1 << 16, watch, flight)
    text = program_text(read_layout(btf), plan, options, "kvm__")
    program = Program(load_bcc().module, text, None)
    try:
        assert program.ring_fd("events") > 0
    finally:
        program.close()
