# SPDX-License-Identifier: MIT
"""Writing a capture: the capture writer beside plain rows without any format."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kvmprobe.probes.schema import SCHEMA_MAJOR, SCHEMA_MINOR
from kvmprobe.store.writer import CaptureWriter
from tests.bench.events import stream
from tests.bench.result import Result, millions

TURNS = 5
BATCHES = 64
ROWS = 65536

_HEADER: dict[str, Any] = {
    "schema": {"major": SCHEMA_MAJOR, "minor": SCHEMA_MINOR},
    "tool": {"name": "kvmprobe", "version": "bench"},
    "started": None,
    "clock": {"monotonic_ns": None, "wall_ns": None},
    "source": {"kind": "converted", "note": "made up by a benchmark"},
    "host": dict.fromkeys(("boot_id", "machine", "kernel", "vendor"))
    | {"modules": {}, "parameters": {}},
    "layout": {},
    "plan": [],
    "filters": dict.fromkeys(("pid", "vm", "vcpu")),
    "command": [],
}


def _capture(path: Path, batches: list[NDArray[Any]]) -> float:
    with CaptureWriter(path, _HEADER) as writer:
        start = time.perf_counter()
        for batch in batches:
            writer.write(batch)
        return time.perf_counter() - start


def _plain(path: Path, batches: list[NDArray[Any]]) -> float:
    with path.open("wb", buffering=0) as file:
        start = time.perf_counter()
        for batch in batches:
            file.write(batch.data)
        return time.perf_counter() - start


def run() -> Result:
    """Measure, in the directory for temporary files."""
    rows = stream(BATCHES * ROWS)
    batches = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    ways: dict[str, Callable[[Path, list[NDArray[Any]]], float]] = {
        "capture writer (columns, lz4, checksums)": _capture,
        "plain rows, nothing else": _plain,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    sizes: dict[str, int] = {}
    for _ in range(TURNS):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "events"
                rates[name].append(len(rows) / way(path, batches))
                sizes[name] = path.stat().st_size
    medians = {name: statistics.median(reached) for name, reached in rates.items()}
    (capture, plain) = medians.values()
    return Result(
        "Capture writer",
        f"{len(rows) / 1e6:.1f} M made-up events of a busy host in batches of {ROWS} rows, {TURNS} "
        "turns. Not counted: opening, closing and what the disk does later.",
        ("way", "median events/s", "bytes an event"),
        [(name, millions(medians[name]), f"{sizes[name] / len(rows):.1f}") for name in ways],
        f"{millions(capture)} events/s, {capture / plain:.2f} of what plain rows reach",
    )
