# SPDX-License-Identifier: MIT
"""How soon a recording sees its first event, and what memory a watch keeps."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from kvmprobe.errors import HostError
from kvmprobe.store.reader import CaptureReader
from tests.bench.result import Result
from tests.watched import Watch

TURNS, WATCHES = 5, 3
ROOT = Path(__file__).parents[2]
KVMPROBE = [
    *(sys.executable, "-c"),
    "import sys; from kvmprobe.cli.main import main; sys.exit(main())",
]


def _first_event(path: Path) -> float:
    """Seconds from the start of the process to the time stamp of the first stored event."""
    # The events' clock is CLOCK_MONOTONIC, which is the clock of time.monotonic_ns().
    start = time.monotonic_ns()
    command = [*KVMPROBE, "record", "-d", "2", "-o", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise HostError(f"kvmprobe record failed and said: {said[-1]}")
    with CaptureReader(path) as reader:
        first = min((int(batch["ts"].min()) for batch in reader.batches(["ts"])), default=None)
    if first is None:
        raise HostError("kvmprobe record stored no event although a guest was running")
    return (first - start) / 1e9


def _help(_path: Path) -> float:
    start = time.monotonic()
    subprocess.run([*KVMPROBE, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - start


def _resident() -> float:
    """MiB of a watch that has attached everything and given the compiler's memory back."""
    with tempfile.TemporaryDirectory() as directory, Watch(Path(directory)) as watch:
        watch.watching()
        status = Path(f"/proc/{watch.process.pid}/status").read_text(encoding="ascii")
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kib) / 1024


def run() -> Result:
    """Measure on this host's live KVM; HostError where recording fails."""
    ways = {"record, to its first stored event": _first_event, "--help, to its end": _help}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    load = [sys.executable, "-m", "kvmprobe.guests.load", "--seconds", "3600", "--rate", "2000"]
    with subprocess.Popen(load, cwd=ROOT, stdout=subprocess.DEVNULL) as guest:
        try:
            for _ in range(TURNS):
                for name, way in ways.items():
                    with tempfile.TemporaryDirectory() as directory:
                        seconds[name].append(way(Path(directory) / "capture"))
            resident = [_resident() for _ in range(WATCHES)]
        finally:
            guest.terminate()
    record, usage = (median(times) for times in seconds.values())
    return Result(
        "Start",
        "From the start of the process, with the load guest running at 2,000 accesses a second all "
        f"the time, {TURNS} turns.",
        ("what", "turn by turn", "median"),
        [
            *(
                (f"{name}, s", ", ".join(f"{s:.2f}" for s in times), f"{median(times):.2f}")
                for name, times in seconds.items()
            ),
            (
                "watch, resident once attached, MiB",
                ", ".join(f"{mib:.0f}" for mib in resident),
                f"{median(resident):.0f}",
            ),
        ],
        f"record sees its first event after {record:.2f} s (wanted: 1), --help takes {usage:.2f} s "
        f"(wanted: 0.2), watch keeps {median(resident):.0f} MiB (wanted: under 100 MB)",
    )
