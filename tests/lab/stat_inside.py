# SPDX-License-Identifier: MIT
"""Runs in the lab's VM: one guest, counted by `kvmprobe stat`, perf and KVM itself at a time.

stat_inside.py compare PERF OUT     the load guest, with perf kvm stat record beside
stat_inside.py nested SCRIPT OUT STEP...  the nested guest
stat_inside.py guest ROUNDS         (what compare runs) the load guest, and KVM's own counters
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from kvmprobe.guests.load import Mix, prepare
from kvmprobe.guests.vmm import Machine
from kvmprobe.stat.live import LiveStat
from kvmprobe.stat.reasons import ReasonNames
from kvmprobe.stat.render import document, text
from kvmprobe.stat.tables import tables

ROUNDS = 400
MIX = Mix(mmio=2, pio=2, ram=1, outs_ram=4)
#: What kvm_stat shows, of a VM's directory in debugfs.
COUNTERS = (
    *("exits", "io_exits", "mmio_exits", "halt_exits", "insn_emulation"),
    *("pf_taken", "pf_fixed", "pf_emulate", "pf_mmio_spte_created"),
)
_DEBUGFS = Path("/sys/kernel/debug/kvm")


def guest(rounds: int) -> None:
    """Run the load after a line on stdin; print what it and KVM's counters counted, as JSON."""
    with Machine() as machine:
        (load,) = prepare(machine, MIX)
        sys.stdin.readline()
        for _ in range(rounds):
            load.round()
        counters = {}
        for directory in _DEBUGFS.glob(f"{os.getpid()}-*"):
            for name in COUNTERS:
                path = directory / name
                counters[name] = int(path.read_text()) if path.exists() else None
        print(json.dumps({"load": asdict(load.counts), "kvm": counters}))


def compare(perf: Path, out: Path) -> None:
    """Count one run of the guest by all; leave what each said in `out`."""
    subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=False)
    environment = os.environ | {"LD_LIBRARY_PATH": str(perf / "lib")}
    command = [str(perf / "perf"), "kvm"]
    data = Path("/tmp/perf.data.guest")
    worker = subprocess.Popen(
        [sys.executable, __file__, "guest", str(ROUNDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    # perf's own clock is not one clock where the TSC is unstable, as it is in the emulator.
    options = ["-k", "CLOCK_MONOTONIC", "-m", "2048", "-a", "-o", str(data)]
    recorder = subprocess.Popen([*command, "stat", "record", *options], env=environment)
    # perf says nothing when it has begun, but makes its file when its events are open.
    while recorder.poll() is None and not (data.exists() and data.stat().st_size):
        time.sleep(0.2)
    time.sleep(2)
    # Programs of a tracepoint run in the order they came.  If kvmprobe's were first, their own work
    # at an entry would lie within what perf takes for the exit.
    with LiveStat(worker.pid) as live:
        live.start()
        said, _ = worker.communicate("go\n")
        live.stop()
        counted = live.counted()
    recorder.send_signal(signal.SIGINT)
    recorder.wait()
    made = tables(counted, ("level",), "count", ReasonNames.live())
    (out / "stat.json").write_text(json.dumps(document(counted, made, ("level",)), indent=1))
    (out / "stat.txt").write_text(text(counted, made, ("level",), 0, 0))
    (out / "guest.json").write_text(said)
    for event in ("vmexit", "mmio"):
        report = subprocess.run(
            [*command, "-i", str(data), "stat", "report", f"--event={event}"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        (out / f"perf-{event}.txt").write_text(report.stdout + report.stderr)


def nested(script: Path, steps: list[str], out: Path) -> None:
    """Count a nested guest that does these steps; leave the tables in `out`."""
    with LiveStat(None) as live:
        live.start()
        subprocess.run([sys.executable, str(script), *steps], check=True)
        live.stop()
        counted = live.counted()
    made = tables(counted, ("level",), "count", ReasonNames.live())
    (out / "nested.json").write_text(json.dumps(document(counted, made, ("level",)), indent=1))
    (out / "nested.txt").write_text(text(counted, made, ("level",), 0, 0))


if __name__ == "__main__":
    if sys.argv[1] == "guest":
        guest(int(sys.argv[2]))
    elif sys.argv[1] == "compare":
        compare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        nested(Path(sys.argv[2]), sys.argv[4:], Path(sys.argv[3]))
