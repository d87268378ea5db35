# SPDX-License-Identifier: MIT
"""Large captures for the benches; `python -m tests.bench.captures FILE EVENTS` makes one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

from kvmprobe.errors import KvmprobeError
from kvmprobe.probes.schema import NO_VCPU
from kvmprobe.store.format import new_header
from kvmprobe.store.writer import CaptureWriter
from tests.bench.cost import cost
from tests.bench.events import stream

_BLOCK = 1 << 22
_BATCH = 1 << 16
#: On disk, of a recording and of Parquet together, with something to spare.
_BYTES = 42


def write(path: Path, events: int) -> None:
    """Write a recording of so many made-up events, as of a busy host that is healthy.

    A few million of them come again and again, with times and sequences that go on.
    """
    block = stream(min(events, _BLOCK))
    span = block["ts"][-1] - block["ts"][0] + np.uint64(1000)
    key = block["vm"].astype(np.int64) << 16 | block["vcpu"]
    _, at, counts = np.unique(key, return_inverse=True, return_counts=True)
    steps = np.where(block["vcpu"] == NO_VCPU, 0, counts[at]).astype("u4")
    with CaptureWriter(path, new_header("live")) as writer:
        for start in range(0, events, len(block)):
            rows = block[: events - start]
            for begin in range(0, len(rows), _BATCH):
                writer.write(rows[begin : begin + _BATCH])
            block["ts"] += span
            block["seq"] += steps


def make(path: Path, events: int) -> None:
    """Do so in a process of its own, for what measures must be small; KvmprobeError if it can't."""
    cost([sys.executable, "-m", "tests.bench.captures", path, str(events)], 60 + events / 500_000)


def check_disk(folder: Path, events: int) -> None:
    """Refuse, with a KvmprobeError, a folder without room for both forms of a capture."""
    free, needed = shutil.disk_usage(folder).free, events * _BYTES
    if free < needed:
        raise KvmprobeError(
            f"{events:,} events take {needed / 1e9:.0f} GB in {folder} and {free / 1e9:.0f} GB are "
            "free: name another place by TMPDIR"
        )


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
