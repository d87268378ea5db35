# SPDX-License-Identifier: MIT
"""Traces of this host's KVM by ftrace, trace-cmd and perf, beside kvmprobe's own recording."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvmprobe.capture.session import Filters, Session
from kvmprobe.formats.importer import Imported, import_traces
from kvmprobe.probes import schema
from kvmprobe.probes.schema import Type
from kvmprobe.store.reader import CaptureReader
from tests.processes import LOAD, Gated

TRACING = Path("/sys/kernel/tracing")
INSTANCE = TRACING / "instances/kvmprobe-test"
SYSTEMS = ("kvm", "kvmmmu")
FORMS = ("ftrace.txt", "trace.dat", "perf.data", "perf.txt")
PERF_SCRIPT = ("--ns", "--show-lost-events", "-F", "comm,pid,tid,cpu,time,event,trace")


@dataclass(frozen=True)
class Traced:
    folder: Path
    counts: dict[str, int]  # by the VMM
    events: NDArray[Any]  # kvmprobe's own recording


@contextmanager
def ftrace(pid: int) -> Iterator[None]:
    """Trace a process and all it starts in a buffer of its own (docs/formats/trace-cmd.md)."""
    INSTANCE.mkdir()
    try:
        for name, value in {
            "set_event_pid": str(pid),
            "options/event-fork": "1",
            "options/record-tgid": "1",
            "trace_clock": "mono",
            "buffer_size_kb": "16384",
            **{f"events/{system}/enable": "1" for system in SYSTEMS},
        }.items():
            (INSTANCE / name).write_text(value)
        yield
    finally:
        if INSTANCE.exists():  # trace-cmd extract removes it
            INSTANCE.rmdir()


@contextmanager
def perf_record(pid: int, output: Path) -> Iterator[None]:
    """Trace a process with perf (docs/formats/perf.md); the file is whole after the context."""
    events = [word for system in SYSTEMS for word in ("-e", f"{system}:*")]
    command = ["perf", "record", "-q", "-k", "mono", *events, "-p", str(pid), "-o", str(output)]
    control = output.with_suffix(".control")
    subprocess.run(["mkfifo", control, f"{control}.ack"], check=True)
    with subprocess.Popen(
        [*command, "-D", "-1", f"--control=fifo:{control},{control}.ack"]
    ) as perf:
        with control.open("w") as ask, Path(f"{control}.ack").open() as answer:
            ask.write("enable\n")
            ask.flush()
            assert "ack" in answer.readline()
        yield
        perf.send_signal(signal.SIGINT)
        perf.wait()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    if missing := [tool for tool in ("trace-cmd", "perf") if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed")
    if not (TRACING / "events/kvmmmu").is_dir():
        pytest.skip("tracefs shows no tracepoints of KVM")
    folder = tmp_path_factory.mktemp("traces")
    guest = Gated(*LOAD, "--seconds", "1", "--rate", "2000")
    rows = []
    pid = guest.process.pid
    with ftrace(pid), Session(Filters(pid=pid)) as session:
        session.prepare()
        session.attach()
        session.start()
        with perf_record(pid, folder / "perf.data"):
            guest.go()
            while guest.process.poll() is None:
                rows.append(session.drain())
                time.sleep(session.tick)
        rows.append(session.stop())
        (INSTANCE / "tracing_on").write_text("0")
        (folder / "ftrace.txt").write_bytes((INSTANCE / "trace").read_bytes())
        for system in SYSTEMS:
            (INSTANCE / f"events/{system}/enable").write_text("0")
        extract = ["trace-cmd", "extract", "-B", INSTANCE.name, "-o", str(folder / "trace.dat")]
        done = subprocess.run(extract, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    script = subprocess.run(
        ["perf", "script", *PERF_SCRIPT, "-i", folder / "perf.data"],
        check=True,
        capture_output=True,
    )
    (folder / "perf.txt").write_bytes(script.stdout)
    return Traced(folder, guest.counts(), np.concatenate(rows))


def imported(path: Path) -> tuple[Imported, NDArray[Any]]:
    capture = path.with_suffix(path.suffix + ".kvmprobe")
    done = import_traces([path], capture, strict=True, force=True)
    with CaptureReader(capture) as reader:
        return done, np.concatenate([schema.rows(batch) for batch in reader.batches()])


def of(events: NDArray[Any], kind: Type) -> NDArray[Any]:
    found: NDArray[Any] = events[events["type"] == kind]
    return found


def test_each_form_holds_what_the_vmm_counted(traced: Traced) -> None:
    text = (traced.folder / "ftrace.txt").read_text()
    # The answer to a read is told again.
    counted = 2 * traced.counts["mmio_reads"] + traced.counts["mmio_writes"]
    assert len(re.findall(": kvm_mmio: ", text)) == counted > 100
    events = len(re.findall(r"^ .*\[\d+\] ", text, re.M))
    for form in FORMS:
        done, _ = imported(traced.folder / form)
        assert (form, done.tally.read, done.tally.lost) == (form, events, 0)


def test_the_events_are_those_of_our_own_recording(traced: Traced) -> None:
    text = (traced.folder / "ftrace.txt").read_text()
    first = re.search(r"^ *\S+-\d+ .*\d: kvm_emulate_insn: ", text, re.M)
    assert first is not None
    # The KVM of some hosts never says which vCPU a thread runs: here a line does.
    named = traced.folder / "named.txt"
    named.write_text(first[0].replace("kvm_emulate_insn: ", "kvm_entry: vcpu 0, rip 0x0\n") + text)
    done, events = imported(named)
    assert not done.doubts
    for kind, columns in ((Type.MMIO, ("addr", "kind", "len")), (Type.EMULATE, ("addr",))):
        ours, theirs = of(traced.events, kind), of(events, kind)
        assert len(ours) > 100
        for column in columns:
            np.testing.assert_array_equal(theirs[column], ours[column], err_msg=column)
        # Both clocks are CLOCK_MONOTONIC; who is asked first, and how ftrace rounds, says nothing.
        apart = theirs["ts"].astype(np.int64) - ours["ts"].astype(np.int64)
        assert abs(np.median(apart)) < 1_000_000
