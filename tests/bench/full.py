# SPDX-License-Identifier: MIT
"""10^9 events: made, compacted, analysed, drawn.  Room on the disk is checked first."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.bench import captures
from tests.bench.analysis import COLUMNS, row, shares
from tests.bench.cost import KVMPROBE, Command, Cost, cost, median
from tests.bench.result import Result

EVENTS = 10**9
TURNS = 3
LIMIT = 900.0


def run(events: int = EVENTS) -> Result:
    """Measure, in the directory for temporary files; KvmprobeError without room there."""
    taken: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        captures.check_disk(folder, events)
        recording, parquet = folder / "c.kvmprobe", folder / "c.parquet"
        captures.make(recording, events)
        sizes = [recording.stat().st_size]
        taken["kvmprobe analyze, a recording"] = [cost([*KVMPROBE, "analyze", recording], LIMIT)]
        compact: Command = [*KVMPROBE, "compact", recording, "-o", parquet]
        taken["kvmprobe compact"] = [cost(compact, LIMIT)]
        sizes.append(parquet.stat().st_size)
        # What is left of the page cache is the other file's.
        recording.unlink()
        ours = "kvmprobe analyze, Parquet"
        taken[ours] = [cost([*KVMPROBE, "analyze", parquet], LIMIT) for _ in range(TURNS)]
        page: Command = [*KVMPROBE, "report", parquet, "-o", folder / "c.html"]
        taken["kvmprobe report, Parquet"] = [cost(page, LIMIT)]
        limits = shares(parquet, events, LIMIT)
    best = median(taken[ours])
    return Result(
        "A billion events",
        f"As above, {events:,} events: a recording of {sizes[0] / 1e9:.1f} GB, which is more than "
        f"the page cache holds, and the same as Parquet, {sizes[1] / 1e9:.1f} GB.",
        COLUMNS,
        [row(f"10^{len(str(events)) - 1}", way, events, costs) for way, costs in taken.items()],
        f"all rules over {events:,} events of Parquet in {best.seconds:.1f} s and "
        f"{best.memory / 1e6:.0f} MB (wanted: 40 s, 1000 MB); {limits}",
    )
