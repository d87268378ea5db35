# SPDX-License-Identifier: MIT
"""Runs inside the lab's VM: every selftest once, its result, and the kernel's own event counts.

    selftests_inside.py FOLDER RESULT.json SECONDS [NAME…]

The counts are those of ftrace's histograms on the same events kvmprobe records: kept by the kernel,
without BPF.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRACEFS = Path("/sys/kernel/tracing")
#: Tracepoint, and the field by which its hits are counted apart.
HISTOGRAMS = {
    "kvm/kvm_emulate_insn": "failed",
    "kvm/kvm_mmio": "type",
    "kvmmmu/check_mmio_spte": "common_type",
    "kvmmmu/mark_mmio_spte": "common_type",
    "kvm/vcpu_match_mmio": "write",
    "lab/fault": "common_type",
}


def _add_kprobe(line: str) -> None:
    """Add a line to kprobe_events, which can't be sought in as Python's append mode does."""
    fd = os.open(TRACEFS / "kprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


def start_counting() -> dict[str, str]:
    """Start a histogram on each tracepoint; returns the triggers that were set."""
    _add_kprobe("p:lab/fault kvm_mmu_page_fault")
    triggers = {}
    for event, key in HISTOGRAMS.items():
        triggers[event] = f"hist:keys={key}"
        (TRACEFS / "events" / event / "trigger").write_text(triggers[event])
    return triggers


def stop_counting(triggers: dict[str, str]) -> dict[str, dict[str, int]]:
    """Return hits by the key's value, of each tracepoint; the histograms go."""
    counts = {}
    for event, trigger in triggers.items():
        folder = TRACEFS / "events" / event
        text = (folder / "hist").read_text()
        found = re.findall(r"^\{ \w+: *([\w ]+?) *\} hitcount: +(\d+)", text, re.M)
        counts[event] = {key: int(hits) for key, hits in found}
        (folder / "trigger").write_text("!" + trigger)
    _add_kprobe("-:lab/fault")
    return counts


def run(program: Path, seconds: float) -> tuple[str, str, float]:
    """Return how one selftest ended, its last line, and how long it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # A selftest that leaves a child behind must not end the run: hence the session of its own.
        command = ["timeout", "--signal=KILL", str(seconds), str(program)]
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    lines = done.stdout.decode(errors="replace").split("\n")
    last = ([line for line in lines if line.strip()] or [""])[-1][:160]
    known = {0: "pass", 4: "skip", 137: "limit", -9: "limit"}
    return known.get(done.returncode, f"fail {done.returncode}"), last, time.monotonic() - started


def main() -> int:
    folder, result, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    names = sys.argv[4:] or sorted(path.name for path in folder.iterdir())
    triggers = start_counting()
    tests = {}
    for name in names:
        tests[name] = run(folder / name, seconds)
        print(f"{name}: {tests[name][0]} {tests[name][2]:.1f} s", flush=True)
    result.write_text(json.dumps({"tests": tests, "counts": stop_counting(triggers)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
