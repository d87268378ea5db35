# SPDX-License-Identifier: MIT
"""`kvmprobe analyze` of captures of growing size, beside what else reads Parquet."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from kvmprobe.errors import KvmprobeError
from tests.bench import captures, peers
from tests.bench.cost import KVMPROBE, Command, Cost, cost, median
from tests.bench.result import Result, millions

SIZES = {6: 10**6, 7: 10**7, 8: 10**8}
#: Turns by size, of kvmprobe and of its peers.
TURNS = {6: (3, 3), 7: (3, 2), 8: (3, 1)}
#: Seconds a peer gets.
PATIENCE = 150.0
#: pandas holds all there is in memory, several times.
PANDAS_MOST = 10**7
#: What of an analysis the main thread does: all but reading.
_SHARES = """
import json, sys, time
from kvmprobe.analysis.run import analyze
from kvmprobe.store.reader import CaptureReader
with CaptureReader(sys.argv[1]) as reader:
    analyze([reader])
    before = time.thread_time(), time.process_time()
    analyze([reader])
judging, all = (now - then for now, then in zip((time.thread_time(), time.process_time()), before))
print(json.dumps([judging, all - judging]))
"""


def row(size: str, way: str, events: int, costs: list[Cost]) -> tuple[str, ...]:
    """A line of the table."""
    middle = median(costs)
    return (
        size,
        way,
        ", ".join(f"{c.seconds:.1f}" for c in costs),
        f"{middle.cpu:.1f}",
        millions(events / middle.seconds),
        f"{middle.memory / 1e6:.0f}",
    )


COLUMNS = ("events", "way", "seconds, turn by turn", "s of CPU", "events/s", "MB of memory")


def shares(path: Path, events: int, limit: float) -> str:
    """What limits an analysis: ns of CPU an event, of judging and of reading."""
    judging, reading = json.loads(cost([sys.executable, "-c", _SHARES, path], limit).printed)
    return (
        f"once loaded, {judging / events * 1e9:.0f} ns of CPU an event to judge (one thread) and "
        f"{reading / events * 1e9:.0f} ns to read and decompress (other threads)"
    )


def run() -> Result:
    """Measure; KvmprobeError without room on the disk."""
    rows: list[tuple[str, ...]] = []
    fastest: dict[tuple[int, str], float] = {}
    with tempfile.TemporaryDirectory() as name, peers.installed() as environment:
        folder = Path(name)
        captures.check_disk(folder, max(SIZES.values()))
        for power, events in SIZES.items():
            recording, parquet = folder / f"{power}.kvmprobe", folder / f"{power}.parquet"
            captures.make(recording, events)
            cost([*KVMPROBE, "compact", recording, "-o", parquet], 120)
            taken: dict[str, list[Cost]] = {}
            refused: dict[str, str] = {}
            own, others = TURNS[power]
            for turn in range(own):
                for way, path in {"a recording": recording, "Parquet": parquet}.items():
                    measured = cost([*KVMPROBE, "analyze", path], 120)
                    taken.setdefault(f"kvmprobe analyze, {way}", []).append(measured)
                for peer in peers.PEERS if turn < others else ():
                    if peer == "pandas" and events > PANDAS_MOST:
                        refused[peer] = "not tried: it holds all of it in memory, several times"
                    elif peer not in refused:
                        command: Command = [
                            sys.executable,
                            "-m",
                            "tests.bench.peers",
                            peer,
                            parquet,
                        ]
                        try:
                            measured = cost(command, PATIENCE, environment)
                        except KvmprobeError as error:
                            refused[peer] = str(error).partition(" failed ")[2] or (
                                f"not done within {PATIENCE:.0f} s"
                            )
                        else:
                            taken.setdefault(peer, []).append(measured)
            size = f"10^{power}"
            rows += [row(size, way, events, costs) for way, costs in taken.items()]
            rows += [(size, way, why, "", "", "") for way, why in refused.items()]
            fastest |= {(power, way): median(costs).seconds for way, costs in taken.items()}
            recording.unlink()
            if power < max(SIZES):
                parquet.unlink()
        limits = shares(parquet, events, 240)
    ours = "kvmprobe analyze, Parquet"
    largest = max(SIZES)
    ratios = [
        f"{peer} takes {fastest[largest, peer] / fastest[largest, ours]:.1f} times as long"
        for peer in peers.PEERS
        if (largest, peer) in fastest
    ]
    slope = (fastest[largest, ours] - fastest[6, ours]) / (SIZES[largest] - SIZES[6])
    return Result(
        "Analysis",
        "Whole commands from their start to their end, on made-up events of 4 VMs with 4 vCPUs "
        "each without a fault, the files in the page cache as far as it holds them. `kvmprobe "
        "analyze` runs all rules and looks for gaps; polars, DuckDB and pandas answer one question "
        "of the same Parquet file: which accesses hit what their vCPU had cached last.",
        COLUMNS,
        rows,
        f"10^{largest} events of Parquet in {fastest[largest, ours]:.1f} s"
        + (f", {', '.join(ratios)}" if ratios else "")
        + f"; each further 10^9 events take {slope * 1e9:.0f} s (wanted: 40); {limits}",
    )
