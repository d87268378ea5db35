# SPDX-License-Identifier: MIT
"""What counting in the kernel costs a guest that does nothing but MMIO."""

from __future__ import annotations

import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from kvmprobe.capture.layout import read_layout
from kvmprobe.guests.load import Load, Mix, prepare
from kvmprobe.guests.vmm import Machine
from kvmprobe.host.bccload import load_bcc
from kvmprobe.host.btf import KernelBtf
from kvmprobe.stat.live import (
    TRACEPOINTS,
    StatProgram,
    exit_reason_layout,
    missing_tracepoints,
    program_text,
)
from tests.bench.result import Result

#: Short turns, many of them: most fall between two moments of other work.
TURNS = 60
PERF_TURNS = 20
ROUNDS = 10
MIX = Mix(mmio=128, pio=0, ram=0)


#: Attaches something for the time of a context.
_Way = Callable[[], AbstractContextManager[None]]


def _nanoseconds(load: Load) -> float:
    """CPU time of the guest's thread for an exit, ns; other work on the machine is not in it."""
    exits = load.counts.exits
    start = time.thread_time_ns()
    for _ in range(ROUNDS):
        load.round()
    return (time.thread_time_ns() - start) / (load.counts.exits - exits)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _attached(program: StatProgram) -> _Way:
    @contextmanager
    def way() -> Iterator[None]:
        program.attach_tracepoints()
        try:
            yield
        finally:
            program.detach()

    return way


@contextmanager
def _perf() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "perf.data"
        command = ["perf", "kvm", "stat", "record", "-a", "-o", str(data)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            # perf makes its file when its events are open.
            while process.poll() is None and not (data.exists() and data.stat().st_size):
                time.sleep(0.05)
            try:
                yield
            finally:
                process.send_signal(signal.SIGINT)


def run() -> Result:
    """Measure on this host's live KVM; HostError where programs can't be attached."""
    btf, bcc = KernelBtf.live(), load_bcc().module
    names = [name for name in TRACEPOINTS if name not in missing_tracepoints(btf)]
    stat = StatProgram(bcc, program_text(read_layout(btf), exit_reason_layout(btf)))
    empties = (f"int tp_{n}(struct bpf_raw_tracepoint_args *ctx) {{ return 0; }}" for n in names)
    empty = StatProgram(bcc, "\n".join(empties))
    for program in (stat, empty):
        program.load_tracepoints(names)
    stat.configure(on=1)
    stat.give_numbers("vm_numbers", 1, 1)
    ways: dict[str, _Way] = {
        "nothing attached": _nothing,
        "empty programs on the same tracepoints": _attached(empty),
        "kvmprobe stat": _attached(stat),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with Machine() as machine:
        (load,) = prepare(machine, MIX)
        _nanoseconds(load)
        for _ in range(TURNS):
            for name, way in ways.items():
                with way():
                    times[name].append(_nanoseconds(load))
        if shutil.which("perf"):
            name = "perf kvm stat record"
            times[name] = []
            with _perf():
                times[name] += [_nanoseconds(load) for _ in range(PERF_TURNS)]
    for program in (stat, empty):
        program.close()
    lower = {name: statistics.quantiles(found, n=4)[0] for name, found in times.items()}
    base = lower["nothing attached"]
    points = 100 * (lower["kvmprobe stat"] - lower["empty programs on the same tracepoints"])
    return Result(
        "Counting",
        f"The load guest writes and reads a hole {ROUNDS * MIX.mmio:,} times a turn, without any "
        f"pause; CPU time of its thread for an exit, the lower quartile of {TURNS} turns "
        f"in turn (perf: {PERF_TURNS}, behind them).",
        ("with", "ns an exit", "against nothing attached"),
        [
            (name, f"{time_of:,.0f}", f"{100 * (time_of / base - 1):+.1f} %")
            for name, time_of in lower.items()
        ],
        f"kvmprobe stat costs {points / base:.1f} points more than empty programs on the same "
        "tracepoints (wanted: at most 3)",
    )
