# SPDX-License-Identifier: MIT
"""Events on their way to the file: in order, in bounded memory, and what is too much is counted."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvmprobe.capture import backlog as backlog_module
from kvmprobe.capture.backlog import Backlog
from kvmprobe.errors import CaptureError
from kvmprobe.probes.schema import EVENT, NO_VCPU, Flag, LossCause, Type
from kvmprobe.store import format as fmt
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter


def events(n: int, first: int = 0, *, decisive: bool = False) -> NDArray[Any]:
    rows = np.zeros(n, EVENT)
    rows["ts"] = rows["seq"] = np.arange(first, first + n)
    rows["vm"] = 1 + np.arange(n) % 2
    rows["type"] = Type.MMIO
    rows["slot"] = -1
    if decisive:
        rows["flags"] = Flag.CANDIDATE
    return rows


def stored(path: Path) -> NDArray[Any]:
    with CaptureReader(path) as reader:
        batches = list(reader.batches())
    out = np.zeros(sum(len(batch["ts"]) for batch in batches), EVENT)
    for name in EVENT.names or ():
        out[name] = np.concatenate([batch[name] for batch in batches])
    return out


class Stalled(CaptureWriter):
    """A capture whose disk stands still until it is told to go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, fmt.new_header("live"))
        self.go_on = threading.Event()
        self.arrived = threading.Event()

    def write(self, rows: NDArray[Any]) -> None:
        self.arrived.set()
        assert self.go_on.wait(60)
        super().write(rows)


def test_all_of_it_in_order(tmp_path: Path) -> None:
    path = tmp_path / "capture"
    sizes = [1, 5, 70_000, 0, 65_536, 3]
    with CaptureWriter(path, fmt.new_header("live")) as writer, Backlog(writer) as backlog:
        first = 0
        for size in sizes:
            rows = events(size, first)
            assert backlog.put(rows) is rows
            first += size
    np.testing.assert_array_equal(stored(path)["seq"], np.arange(sum(sizes)))


def test_a_stalled_disk_blocks_nobody_and_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "MAX_BYTES", 1000 * EVENT.itemsize)
    path = tmp_path / "capture"
    with Stalled(path) as writer, Backlog(writer) as backlog:
        backlog.put(events(400))
        assert writer.arrived.wait(60)
        assert len(backlog.put(events(600, 400))) == 600
        kept = backlog.put(events(100, 1000))  # no room left
        decisive = backlog.put(events(50, 1100, decisive=True))
        writer.go_on.set()
    assert (kept["type"] == Type.LOSS).all()
    assert (kept["len"] == LossCause.WRITER).all()
    assert (kept["vcpu"] == NO_VCPU).all()
    assert kept[["vm", "kind", "addr"]].tolist() == [(1, Type.MMIO, 50), (2, Type.MMIO, 50)]
    assert len(decisive) == 50
    rows = stored(path)
    assert rows["seq"][rows["type"] != Type.LOSS].tolist() == [*range(1000), *range(1100, 1150)]
    np.testing.assert_array_equal(rows[rows["type"] == Type.LOSS], kept)


def test_losses_are_told_even_where_candidates_have_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "MAX_BYTES", 0)
    monkeypatch.setattr(backlog_module, "_MAX_DECISIVE_BYTES", 0)
    rows = events(10, decisive=True)
    rows["type"][3], rows["addr"][3] = Type.LOSS, 7
    path = tmp_path / "capture"
    with CaptureWriter(path, fmt.new_header("live")) as writer, Backlog(writer) as backlog:
        kept = backlog.put(rows)
    assert (kept["type"] == Type.LOSS).all()
    assert int(kept["addr"].sum()) == 7 + 9
    assert len(stored(path)) == len(kept)


def test_a_failed_write_is_said_by_the_next_call(tmp_path: Path) -> None:
    path = tmp_path / "capture"
    writer = CaptureWriter(path, fmt.new_header("live"))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._fd)
    os.close(full)
    backlog = Backlog(writer)
    backlog.put(events(10))
    with pytest.raises(CaptureError):
        backlog.close()
    with pytest.raises(CaptureError):
        backlog.put(events(10))
