# SPDX-License-Identifier: MIT
"""`kvmprobe compact` beside what else turns an Arrow stream into Parquet."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.bench import captures, peers
from tests.bench.cost import KVMPROBE, Command, Cost, cost, median
from tests.bench.result import Result, millions

EVENTS = 10**7
TURNS = 3
_PYARROW = """
import sys, pyarrow.ipc as ipc, pyarrow.parquet as pq
with ipc.open_stream(sys.argv[1]) as stream:
    with pq.ParquetWriter(sys.argv[2], stream.schema, compression=sys.argv[3]) as file:
        for batch in stream:
            file.write_batch(batch)
"""
_POLARS = """
import sys, polars as pl
pl.read_ipc_stream(sys.argv[1]).write_parquet(sys.argv[2])
"""


def run() -> Result:
    """Measure, in the directory for temporary files."""
    taken: dict[str, list[Cost]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, peers.installed() as environment:
        recording, made = Path(name) / "c.kvmprobe", Path(name) / "c.parquet"
        captures.make(recording, EVENTS)
        python = [sys.executable, "-c"]
        ways: dict[str, Command] = {
            "kvmprobe compact": [*KVMPROBE, "compact", recording, "-o", made],
            "pyarrow, its defaults": [*python, _PYARROW, recording, made, "snappy"],
            "pyarrow, zstd": [*python, _PYARROW, recording, made, "zstd"],
            "polars, its defaults": [*python, _POLARS, recording, made],
        }
        before = recording.stat().st_size
        for _ in range(TURNS):
            for way, command in ways.items():
                taken.setdefault(way, []).append(cost(command, 120, environment))
                sizes[way] = made.stat().st_size
                made.unlink()
    medians = {way: median(costs) for way, costs in taken.items()}
    ours = medians["kvmprobe compact"]
    return Result(
        "Compact",
        f"A recording of {EVENTS / 1e6:.0f} M made-up events, {before / EVENTS:.1f} bytes each, "
        f"into a Parquet file on disk: whole commands, {TURNS} turns. kvmprobe checks every column "
        "of every batch on the way, in threads beside the one that writes; the others trust it.",
        ("way", "seconds, turn by turn", "s of CPU", "events/s", "bytes an event", "MB of memory"),
        [
            (
                way,
                ", ".join(f"{c.seconds:.1f}" for c in taken[way]),
                f"{m.cpu:.1f}",
                millions(EVENTS / m.seconds),
                f"{sizes[way] / EVENTS:.1f}",
                f"{m.memory / 1e6:.0f}",
            )
            for way, m in medians.items()
        ],
        f"{millions(EVENTS / ours.seconds)} events/s (wanted: 4 M), {millions(EVENTS / ours.cpu)} "
        f"a second of CPU, {sizes['kvmprobe compact'] / EVENTS:.1f} bytes an event (wanted: 14); "
        f"{medians['pyarrow, its defaults'].seconds / ours.seconds:.1f} times pyarrow's defaults, "
        f"{medians['polars, its defaults'].seconds / ours.seconds:.1f} times polars",
    )
