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

from kvmprobe.analysis.jit import available
from kvmprobe.errors import KvmprobeError
from kvmprobe.formats.importer import import_traces
from tests.bench import bigtraces
from tests.bench.result import Result, millions

TURNS = 3
TEXT = 200 << 20
COPIES = 2000


def _processor(command: list[str]) -> float:
    """Run a command, its output thrown away; the seconds of CPU it took."""
    before = os.times()
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise KvmprobeError(f"{command[0]} does not run: {error}") from error
    after = os.times()
    return after[2] + after[3] - before[2] - before[3]


def _inside(trace: Path, capture: Path) -> float:
    """Import in this process, where all is loaded: the seconds of CPU it took."""
    before = time.process_time()
    import_traces([trace], capture, force=True)
    return time.process_time() - before


def run() -> Result:
    """Measure; KvmprobeError without numba, trace-cmd or perf."""
    if not available():
        raise KvmprobeError("numba is missing: install kvmprobe[fast]")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        names = ("text", "trace.dat", "perf.data")
        paths = {name: folder / name for name in names}
        events = {
            "text": bigtraces.text(paths["text"], TEXT),
            "trace.dat": bigtraces.trace_dat(paths["trace.dat"], COPIES),
            "perf.data": bigtraces.perf_data(paths["perf.data"], COPIES),
        }
        peers = {
            "trace.dat": ["trace-cmd", "report", str(paths["trace.dat"])],
            "perf.data": ["perf", "script", "-i", str(paths["perf.data"])],
        }
        capture = folder / "capture"
        whole = [sys.executable, "-m", "kvmprobe", "import", "-f", "-o", str(capture)]
        taken: dict[tuple[str, str], list[float]] = {}
        for name in names:
            _inside(paths[name], capture)  # compiles
        for _ in range(TURNS):
            for name, path in paths.items():
                ways = {
                    "kvmprobe import, the whole command": _processor([*whole, str(path)]),
                    "kvmprobe import, once loaded": _inside(path, capture),
                }
                if name in peers:
                    ways[" ".join(peers[name][:2])] = _processor(peers[name])
                for way, seconds in ways.items():
                    taken.setdefault((name, way), []).append(seconds)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    medians = {key: statistics.median(seconds) for key, seconds in taken.items()}
    loaded = {name: medians[name, "kvmprobe import, once loaded"] for name in names}
    ratios = {name: medians[name, " ".join(peers[name][:2])] / loaded[name] for name in peers}
    return Result(
        "Importers",
        f"A real trace of kvm and kvmmmu, repeated: {sizes['text'] / 1e6:.0f} MB of ftrace text, "
        f"{sizes['trace.dat'] / 1e6:.0f} MB of trace.dat, {sizes['perf.data'] / 1e6:.0f} MB of "
        f"perf.data; {TURNS} turns. Seconds of CPU, for all run on one core: from the trace to the "
        "finished capture, or to the text printed to /dev/null. Loading Python, numba and the "
        "compiled loops is part of the whole command.",
        ("trace", "way", "s of CPU, turn by turn", "median events/s", "MB/s"),
        [
            (
                name,
                way,
                ", ".join(f"{seconds:.2f}" for seconds in taken[name, way]),
                millions(events[name] / median),
                f"{sizes[name] / median / 1e6:.0f}",
            )
            for (name, way), median in medians.items()
        ],
        f"text {sizes['text'] / loaded['text'] / 1e6:.0f} MB/s once loaded (wanted: 300), "
        f"{sizes['text'] / medians['text', 'kvmprobe import, the whole command'] / 1e6:.0f} as a "
        f"command (wanted: 100); once loaded {ratios['trace.dat']:.1f} times trace-cmd report and "
        f"{ratios['perf.data']:.1f} times perf script (wanted: 10)",
    )
