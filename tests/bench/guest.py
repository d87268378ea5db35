# SPDX-License-Identifier: MIT
"""What recording costs a guest: its MMIO loop alone, and beside kvmprobe and other tools.

`python tests/bench/guest.py TOOL FILE` is one of what `run` measures, until its stdin ends.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from kvmprobe.capture.header import live_header  # noqa: E402
from kvmprobe.capture.program import compiler_headers  # noqa: E402
from kvmprobe.capture.recorder import Limits, Recorder  # noqa: E402
from kvmprobe.capture.session import Filters, Session  # noqa: E402
from kvmprobe.errors import HostError  # noqa: E402
from kvmprobe.host.bccload import load_bcc  # noqa: E402
from kvmprobe.store.writer import CaptureWriter  # noqa: E402
from tests.bench.result import Result  # noqa: E402

#: At most so many turns, and no new one after so many seconds, but three in any case.
TURNS, ENOUGH, BUDGET = 15, 3, 330.0
SECONDS = 1.0
#: Seconds until a tool must be ready, and until it must have ended.
PATIENCE, END = 60.0, 20.0
STATISTICS = Path("/proc/sys/kernel/bpf_stats_enabled")
GUEST = [sys.executable, "-m", "kvmprobe.guests.load", "--mmio", "1", "--pio", "0", "--ram", "0"]
#: The fields of an emulated instruction and of an access, as kvmprobe's record of them.
BPFTRACE = r"""
tracepoint:kvm:kvm_emulate_insn { printf("%llu %d %llx\n", nsecs, tid, args->rip); }
tracepoint:kvm:kvm_mmio { printf("%llu %d %d %llx\n", nsecs, tid, args->type, args->gpa); }
tracepoint:kvm:kvm_userspace_exit { printf("%llu %d %d\n", nsecs, tid, args->reason); }
"""
READY = "ready"


# The tools, each in a process of its own.


def _ready() -> None:
    print(READY, flush=True)


def _stopped() -> str | None:
    return "end" if select.select([sys.stdin], [], [], 0)[0] else None


def _session(watch: bool, flight: bool, file: Path) -> None:
    with Session(Filters(), watch=watch, flight=flight) as session:
        session.prepare()
        session.attach()
        with CaptureWriter(file, live_header(session, [])) as writer:
            recorder = Recorder(session, writer, Limits())
            recorder.start()
            _ready()
            recorder.run(_stopped)
        print(session.sent())


def _empty() -> None:
    """Empty programs on the tracepoints that kvmprobe attaches here."""
    with Session(Filters()) as session:
        session.prepare()
        names = [a.target for a in session.plan.active() if a.method == "raw_tracepoint"]
    text = "".join(f"RAW_TRACEPOINT_PROBE({name}) {{ return 0; }}\n" for name in names)
    with compiler_headers(None):
        bpf: Any = load_bcc().module.BPF(text=text.encode())
    _ready()
    select.select([sys.stdin], [], [])
    bpf.cleanup()


TOOLS: dict[str, Callable[[Path], None]] = {
    "empty": lambda _file: _empty(),
    "record": lambda file: _session(watch=False, flight=False, file=file),
    "watch": lambda file: _session(watch=True, flight=False, file=file),
    "flight": lambda file: _session(watch=True, flight=True, file=file),
}


# Measuring them.


@dataclass
class Way:
    """A way to run the guest, and exits a second turn by turn."""

    name: str
    tool: str
    reached: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)


@contextmanager
def _running(tool: str, folder: Path) -> Iterator[None]:
    """Run a tool on CPU 1; it is attached when this yields."""
    if not tool:
        yield
        return
    if tool == "bpftrace":
        command = ["bpftrace", "-o", "/dev/null", "-e", 'BEGIN { printf("ready\\n"); }' + BPFTRACE]
    elif tool == "perf":
        command = ["perf", "record", "-q", "-a", "-e", "kvm:*,kvmmmu:*", "-o", str(folder / "perf")]
    else:
        command = [sys.executable, __file__, tool, str(folder / "capture")]
    with subprocess.Popen(
        ["taskset", "-c", "1", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if tool in TOOLS:
                found, _, _ = select.select([process.stdout], [], [], PATIENCE)
                if not found or process.stdout.readline().strip() != READY:
                    raise HostError(f"{tool} did not start")
            else:  # they don't tell when they have attached: their first events do
                _exits(0.5)
                _exits(1.5)
            yield
        finally:
            process.stdin.close()
            if tool not in TOOLS:
                process.terminate()
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:
                process.kill()


def _exits(seconds: float) -> float:
    """Exits a second that the guest makes on CPU 0."""
    command = ["taskset", "-c", "0", *GUEST, "--seconds", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"^exits_per_second (\d+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise HostError(f"the load guest failed: {done.stderr.strip()}")
    return float(found[1])


def _statistics() -> list[tuple[str, ...]]:
    """Time of each program of a full recording and of watch mode: ns a run, and runs an exit."""
    before = STATISTICS.read_text(encoding="ascii")
    rows: list[tuple[str, ...]] = []
    try:
        STATISTICS.write_text("1", encoding="ascii")
        for name, watch in (("record", False), ("watch", True)):
            with Session(Filters(), watch=watch) as session:
                session.prepare()
                session.attach()
                session.start()
                start = session.run_times()
                sent = session.sent()
                command = ["taskset", "-c", "0", *GUEST, "--seconds", str(SECONDS)]
                with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as load:
                    while load.poll() is None:
                        session.drain()
                    assert load.stdout is not None
                    counts = dict(line.split() for line in load.stdout)
                exits = int(counts["mmio_reads"]) + int(counts["mmio_writes"])
                for program, (ns, runs) in session.run_times().items():
                    ns, runs = ns - start[program][0], runs - start[program][1]
                    if runs > exits / 100:
                        rows.append((name, program, f"{ns / runs:.0f}", f"{runs / exits:.2f}"))
                rows.append((name, "events shipped", "", f"{(session.sent() - sent) / exits:.2f}"))
    finally:
        STATISTICS.write_text(before, encoding="ascii")
    return rows


def run() -> Result:
    """Measure; HostError where this machine can't (one CPU, no KVM, not root, a tool missing)."""
    if not os.sched_getaffinity(0) >= {0, 1}:
        raise HostError("guest and tool need CPU 0 and CPU 1")
    ways = [
        Way("empty programs on the same tracepoints", "empty"),
        Way("kvmprobe, full recording to a file", "record"),
        Way("kvmprobe, watch mode", "watch"),
        Way("kvmprobe, watch mode and flight recorder", "flight"),
        Way("bpftrace, printing three tracepoints", "bpftrace"),
        Way("perf record -e 'kvm:*,kvmmmu:*'", "perf"),
    ]
    missing = [way.name for way in ways if way.tool not in TOOLS and not shutil.which(way.tool)]
    ways = [way for way in ways if way.name not in missing]
    bare: list[float] = []
    end = time.monotonic() + BUDGET
    with tempfile.TemporaryDirectory() as directory:
        for turn in range(TURNS):
            if turn >= ENOUGH and time.monotonic() > end:
                break
            for way in ways:
                folder = Path(directory) / f"{turn}-{way.tool}"
                folder.mkdir()
                alone = _exits(SECONDS)
                with _running(way.tool, folder):
                    reached = _exits(SECONDS)
                bare.append(alone)
                way.reached.append(reached)
                way.lost.append(1 - reached / alone)
                shutil.rmtree(folder)
        programs = _statistics()

    def upper(values: list[float]) -> float:
        return statistics.quantiles(values, n=4)[2]

    base = upper(bare)
    cost = {way.tool: 1 - upper(way.reached) / base for way in ways}
    table = [("the guest alone", f"{base:,.0f}", "")]
    table += [
        (
            way.name,
            f"{upper(way.reached):,.0f}",
            f"{-100 * cost[way.tool]:+.1f} % ({-100 * statistics.median(way.lost):+.1f} %)",
        )
        for way in ways
    ]
    table += [(name, "not installed", "") for name in missing]
    table += [("", "", "")]
    table += [
        (f"{mode}: {program}", f"{ns} ns a run" if ns else "", f"{runs} an MMIO exit")
        for mode, program, ns, runs in programs
    ]
    return Result(
        "Cost to the guest",
        "A guest that does nothing but MMIO, on CPU 0; the tool on CPU 1; "
        f"{len(ways[0].lost)} turns, in each of which every tool runs for {SECONDS:g} s after the "
        "guest ran alone. Exits a second are upper quartiles; in brackets the median of each run "
        "against the one before it. Below: the kernel's own run-time statistics of kvmprobe's "
        "programs, which make each run some 30 ns "
        "longer, in a turn of their own.",
        ("beside the guest", "exits/s", "change"),
        table,
        f"full recording {-100 * cost['record']:+.1f} % (wanted: -10 % or less), watch mode "
        f"{100 * (cost['empty'] - cost['watch']):+.1f} points against empty programs (wanted: "
        "within 2)",
    )


if __name__ == "__main__":
    TOOLS[sys.argv[1]](Path(sys.argv[2]))
