# SPDX-License-Identifier: MIT
"""Reading other tools' traces: `kvmprobe import` beside the tools themselves, which only print."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from kvmprobe.analysis.jit import available
from kvmprobe.errors import KvmprobeError
from kvmprobe.formats.importer import import_traces
from tests.bench import bigtraces
from tests.bench.result import Result, millions

TURNS = 2
TEXT = 200 << 20
#: So many that what a command takes before it reads hides no rate: 450 MB and 1.6 GB.
COPIES = {"trace.dat": 12000, "perf.data": 20000}
_COMMAND, _LOADED = "kvmprobe import, the whole command", "kvmprobe import, once loaded"


class Taken(NamedTuple):
    """What one run took, in seconds."""

    wall: float
    processor: float


def _command(command: list[str]) -> Taken:
    """Run a command, its output thrown away."""
    before, began = os.times(), time.monotonic()
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise KvmprobeError(f"{command[0]} does not run: {error}") from error
    wall, after = time.monotonic() - began, os.times()
    return Taken(wall, after[2] + after[3] - before[2] - before[3])


def _inside(trace: Path, capture: Path) -> Taken:
    """Import in this process, where all is loaded."""
    before, began = time.process_time(), time.monotonic()
    import_traces([trace], capture, force=True)
    return Taken(time.monotonic() - began, time.process_time() - before)


def run() -> Result:
    """Measure; KvmprobeError without numba, trace-cmd or perf."""
    if not available():
        raise KvmprobeError("numba is missing: install kvmprobe[fast]")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        paths = {name: folder / name for name in ("text", "trace.dat", "perf.data")}
        events = {
            "text": bigtraces.text(paths["text"], TEXT),
            "trace.dat": bigtraces.trace_dat(paths["trace.dat"], COPIES["trace.dat"]),
            "perf.data": bigtraces.perf_data(paths["perf.data"], COPIES["perf.data"]),
        }
        peers = {
            "trace.dat": ["trace-cmd", "report", str(paths["trace.dat"])],
            "perf.data": ["perf", "script", "-i", str(paths["perf.data"])],
        }
        capture = folder / "capture"
        whole = [sys.executable, "-m", "kvmprobe", "import", "-f", "-o", str(capture)]
        taken: dict[tuple[str, str], list[Taken]] = {}
        for path in paths.values():
            _inside(path, capture)  # compiles
        for _ in range(TURNS):
            for name, path in paths.items():
                ways = {_COMMAND: _command([*whole, str(path)]), _LOADED: _inside(path, capture)}
                if name in peers:
                    ways[" ".join(peers[name][:2])] = _command(peers[name])
                for way, seconds in ways.items():
                    taken.setdefault((name, way), []).append(seconds)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    wall = {key: statistics.median(run.wall for run in runs) for key, runs in taken.items()}
    spent = {key: statistics.median(run.processor for run in runs) for key, runs in taken.items()}
    ratios = {
        (name, way): spent[name, " ".join(peers[name][:2])] / spent[name, way]
        for name in peers
        for way in (_COMMAND, _LOADED)
    }
    fixed = statistics.median(spent[name, _COMMAND] - spent[name, _LOADED] for name in paths)
    megabytes = sizes["text"] / 1e6
    return Result(
        "Importers",
        f"A real trace of kvm and kvmmmu, repeated: {sizes['text'] / 1e6:.0f} MB of ftrace text, "
        f"{sizes['trace.dat'] / 1e6:.0f} MB of trace.dat, {sizes['perf.data'] / 1e6:.0f} MB of "
        f"perf.data; {TURNS} turns. From the trace to the finished capture, or to the text "
        "printed to /dev/null; all run on one core. Loading Python, numba and the compiled loops "
        f"is part of the whole command: {fixed:.2f} s of CPU here, whatever the size. Ratios are "
        "of CPU.",
        ("trace", "way", "s, turn by turn", "s of CPU", "events/s", "MB/s", "times its peer"),
        [
            (
                name,
                way,
                ", ".join(f"{run.wall:.2f}" for run in taken[name, way]),
                ", ".join(f"{run.processor:.2f}" for run in taken[name, way]),
                millions(events[name] / median),
                f"{sizes[name] / median / 1e6:.0f}",
                f"{ratios[name, way]:.1f}" if (name, way) in ratios else "",
            )
            for (name, way), median in wall.items()
        ],
        f"text {megabytes / wall['text', _COMMAND]:.0f} MB/s from the start of the command to "
        f"its end (wanted: 100), {megabytes / wall['text', _LOADED]:.0f} once loaded (wanted: "
        f"300); the whole command {ratios['trace.dat', _COMMAND]:.1f} times trace-cmd report and "
        f"{ratios['perf.data', _COMMAND]:.1f} times perf script (wanted: 10), once loaded "
        f"{ratios['trace.dat', _LOADED]:.1f} and {ratios['perf.data', _LOADED]:.1f}",
    )
