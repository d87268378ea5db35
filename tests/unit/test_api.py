# SPDX-License-Identifier: MIT
"""The Python API: captures as DataFrames, every value exact."""

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import kvmprobe
from kvmprobe import api
from kvmprobe.errors import CaptureError
from kvmprobe.frames import COLUMN_BYTES, EVENT_COLUMNS, events_frame
from kvmprobe.probes import schema
from kvmprobe.probes.schema import Flag, MemslotChange, Site, Type
from kvmprobe.store import format as fmt
from kvmprobe.store.writer import CaptureWriter

ROOT = Path(__file__).parents[2]
START = 5_000_000_000
# Sunday, 22 November 2026, 15:00:00.000000007 UTC
WALL = 1_795_359_600_000_000_007
BIG = [(1 << 53) + 1, (1 << 63) + 1, (1 << 64) - 1, 1 << 63, 7]


def row(**fields: int) -> NDArray[Any]:
    rows = np.zeros(1, schema.EVENT)
    rows["vcpu"] = schema.NO_VCPU
    for name, value in fields.items():
        rows[name] = value
    return rows


def write(path: Path, *batches: NDArray[Any]) -> Path:
    header = fmt.new_header("live")
    header["clock"] = {"monotonic_ns": START, "wall_ns": WALL}
    header["started"] = "2026-11-22T15:00:00Z"
    with CaptureWriter(path, header) as writer:
        for rows in batches:
            writer.write(rows)
    return path


def fill(at: int, value: int, **fields: int) -> NDArray[Any]:
    known = {"type": Type.FILL, "site": Site.NOSLOT, "vm": 1, "vcpu": 0, "kind": 6, "slot": -1}
    return row(**{**known, "ts": START + at, "addr": value, "value": value, "gen": value, **fields})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    first = [fill(i * 10, value, seq=i, vcpu=i % 2) for i, value in enumerate(BIG)]
    second = [
        fill(100, 0xFEE00000, vm=2, type=Type.CACHE, slot=32764, flags=Flag.SLOT_KNOWN | Flag.L2),
        row(
            **{"ts": START + 110, "type": Type.MEMSLOT, "site": Site.COMMIT_MEMSLOT, "vm": 1},
            **{"addr": 1 << 63, "value": (1 << 53) + 1, "gen": (1 << 63) + 3, "aux": 2},
            **{"slot": 9, "kind": MemslotChange.MOVED_TO, "len": 1},
        ),
    ]
    return write(tmp_path / "c.kvmprobe", np.concatenate(first), np.concatenate(second))


def test_events_are_exact(path: Path) -> None:
    with kvmprobe.open(path) as capture:
        events = capture.events()
        rows = np.concatenate([schema.rows(batch) for batch in capture.batches()])
    assert tuple(events.columns) == EVENT_COLUMNS
    for name in ("ts", "vm", "seq", "flags", "addr", "value", "gen", "aux", "slot", "kind", "len"):
        assert events[name].dtype == schema.EVENT[name]
        np.testing.assert_array_equal(events[name].to_numpy(), rows[name])
    assert events["gen"].tolist()[:5] == BIG
    assert events["type"].tolist() == ["FILL"] * 5 + ["CACHE", "MEMSLOT"]
    assert events["site"].tolist() == ["NOSLOT"] * 6 + ["COMMIT_MEMSLOT"]
    assert isinstance(events["type"].dtype, pd.CategoricalDtype)
    assert events["vcpu"].dtype == "Int32"
    assert events["vcpu"].tolist()[:6] == [0, 1, 0, 1, 0, 0]
    assert events["vcpu"].isna().tolist() == [False] * 6 + [True]


def test_time_is_exact(path: Path) -> None:
    with kvmprobe.open(path) as capture:
        time = capture.events(columns=["time"])["time"]
    assert time.dtype == "datetime64[ns, UTC]"
    assert time[0] == pd.Timestamp("2026-11-22T15:00:00.000000007Z")
    assert time.astype("int64").tolist() == [WALL + at for at in (0, 10, 20, 30, 40, 100, 110)]


@pytest.mark.parametrize(
    ("flags", "level", "space"),
    [
        (0, "unknown", None),
        (Flag.L2 | Flag.SMM, "unknown", None),
        (Flag.LEVEL_KNOWN, "L1", None),
        (Flag.LEVEL_KNOWN | Flag.L2 | Flag.AS_KNOWN, "L2", 0),
        (Flag.AS_KNOWN | Flag.SMM, "unknown", 1),
    ],
)
def test_level_and_address_space(flags: int, level: str, space: int | None) -> None:
    frame = events_frame(schema.columns(row(flags=flags)), fmt.new_header("live"))
    assert frame["level"][0] == level
    assert frame["level"].cat.categories.tolist() == ["L1", "L2", "unknown"]
    assert frame["address_space"].dtype == "Int8"
    assert frame["address_space"].isna()[0] == (space is None)
    assert space is None or frame["address_space"][0] == space


def test_unknown_site_and_clock() -> None:
    frame = events_frame(schema.columns(row(type=1, site=200)), fmt.new_header("live"))
    assert frame["site"].isna().all()
    assert frame["time"].isna().all()
    assert frame["time"].dtype == "datetime64[ns, UTC]"


@given(st.lists(st.tuples(*[st.integers(0, (1 << 64) - 1)] * 4), min_size=1, max_size=20))
def test_no_64_bit_value_changes(values: list[tuple[int, ...]]) -> None:
    rows = np.zeros(len(values), schema.EVENT)
    for name, column in zip(("ts", "addr", "value", "gen"), zip(*values, strict=True), strict=True):
        rows[name] = column
    frame = events_frame(schema.columns(rows), fmt.new_header("live"))
    assert list(zip(*(frame[n].tolist() for n in ("ts", "addr", "value", "gen")), strict=True)) == (
        values
    )


def test_row_size_is_told_right() -> None:
    rows = np.zeros(10_000, schema.EVENT)
    frame = events_frame(schema.columns(rows), fmt.new_header("live"))
    usage = frame.memory_usage(index=False)
    categories = 4000
    for name in EVENT_COLUMNS:
        assert 0 <= usage[name] - COLUMN_BYTES[name] * len(rows) < categories


def test_fills(path: Path) -> None:
    with kvmprobe.open(path) as capture:
        fills = capture.fills()
        assert capture.fills(vm=2)["gpa"].tolist() == [0xFEE00000]
    assert fills["observation"].tolist() == ["FILL"] * 5 + ["CACHE"]
    assert fills["mmio_gen"].tolist()[:5] == BIG
    assert fills["gpa"].tolist()[:5] == fills["gva"].tolist()[:5] == BIG
    assert fills["slot"].dtype == np.int16
    assert fills["slot"].tolist() == [-1] * 5 + [32764]
    assert fills["slot_known"].tolist() == [False] * 5 + [True]
    assert fills["access"].tolist() == [6] * 6


def test_memslots(path: Path) -> None:
    with kvmprobe.open(path) as capture:
        slots = capture.memslots()
        assert len(capture.memslots(vcpu=0)) == 0
    (slot,) = slots.to_dict("records")
    assert slot["change"] == "MOVED_TO"
    assert (slot["base_gpa"], slot["npages"]) == (1 << 63, (1 << 53) + 1)
    assert (slot["generation"], slot["id"], slot["address_space"]) == ((1 << 63) + 3, 9, 1)
    assert slot["slot_flags"] == 2


@pytest.mark.parametrize(
    ("filters", "ats"),
    [
        ({}, [0, 10, 20, 30, 40, 100, 110]),
        ({"vm": 2}, [100]),
        ({"vm": 77}, []),
        ({"vm": -1}, []),
        ({"vcpu": 1}, [10, 30]),
        ({"vm": 1, "vcpu": 0}, [0, 20, 40]),
        ({"since": 20, "until": 100}, [20, 30, 40]),
        ({"since": -(10**30)}, [0, 10, 20, 30, 40, 100, 110]),
        ({"until": 10**30, "limit": 6}, [0, 10, 20, 30, 40, 100]),
        ({"since": "2026-11-22T15:00:00.000000107Z"}, [100, 110]),
        ({"since": "2026-11-22T16:00:00.000000107+01:00"}, [100, 110]),
        ({"since": "2026-11-22 15:00:00.000000117"}, [110]),
        ({"since": datetime(2026, 11, 22, 15, tzinfo=UTC), "limit": 1}, [0]),
        ({"until": pd.Timestamp("2026-11-22T15:00:00.000000027Z")}, [0, 10]),
        ({"limit": 0}, []),
        ({"vcpu": 0, "limit": 2}, [0, 20]),
    ],
)
def test_filters(path: Path, filters: dict[str, Any], ats: list[int]) -> None:
    with kvmprobe.open(path) as capture:
        events = capture.events(**filters)
        assert (events["ts"] - START).tolist() == ats
        some = capture.events(columns=["level", "seq"], **filters)
        assert (list(some.columns), len(some)) == (["level", "seq"], len(ats))


@pytest.mark.parametrize("when", ["soon", "NaT", "9999-12-31", ""])
def test_times_that_are_none(path: Path, when: str) -> None:
    with kvmprobe.open(path) as capture, pytest.raises(CaptureError, match="is no time"):
        capture.events(since=when)


def test_times_need_a_clock(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path / "c", fmt.new_header("converted")) as writer:
        writer.write(row(ts=5, type=Type.FILL))
    with kvmprobe.open(tmp_path / "c") as capture:
        assert len(capture.events(since=5)) == 1
        assert len(capture.events(since=6)) == 0
        with pytest.raises(CaptureError, match="has no clock"):
            capture.events(since="2026-11-22")


def test_column_that_does_not_exist(path: Path) -> None:
    with kvmprobe.open(path) as capture, pytest.raises(CaptureError, match="no column 'gpa'"):
        capture.events(columns=["gpa"])


def test_too_many_events_for_a_frame(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_FRAME_EVENTS", 5)
    with kvmprobe.open(path) as capture:
        with pytest.raises(CaptureError, match=r": 7 events would take .* GB .* batches\(\)"):
            capture.events()
        with pytest.raises(CaptureError, match=r"at least 6 events"):
            capture.events(vm=1)
        assert len(capture.events(vm=2)) == 1
        assert len(capture.events(limit=6)) == 6


@pytest.mark.parametrize(
    ("read", "rows"),
    [
        (kvmprobe.Capture.events, 5),
        (kvmprobe.Capture.fills, 5),
        (kvmprobe.Capture.memslots, 0),
        (kvmprobe.Capture.findings, 0),
    ],
)
def test_what_is_missing_is_warned_of(
    path: Path, read: Callable[[kvmprobe.Capture], pd.DataFrame], rows: int
) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    with kvmprobe.open(path) as capture:
        with pytest.warns(RuntimeWarning, match="no end mark") as warned:
            assert len(read(capture)) == rows
        assert warned[0].filename == __file__
        assert capture.truncated is not None
        assert capture.damaged == []


def test_capture_speaks_for_itself(path: Path) -> None:
    with kvmprobe.open(str(path)) as capture:
        assert repr(capture) == f"<kvmprobe capture '{path}', started 2026-11-22T15:00:00Z>"
        assert capture.count() == 7
        assert [list(batch) for batch in capture.batches(["gen"])] == [["gen"], ["gen"]]
        assert capture.header["source"]["kind"] == "live"


def test_importing_kvmprobe_is_cheap() -> None:
    code = (
        "import sys, kvmprobe\n"
        "print([m for m in ('numpy', 'pandas', 'pyarrow', 'numba') if m in sys.modules])\n"
        "from kvmprobe.store.reader import CaptureReader\n"
        "kvmprobe.open\n"
        "print([m for m in ('pandas', 'pyarrow', 'numba') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n[]\n", done.stderr


def test_nothing_else_hides_in_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvmprobe.nothing


def test_findings(tmp_path: Path) -> None:
    known = Flag.L2 | Flag.LEVEL_KNOWN | Flag.SLOT_KNOWN | Flag.AS_KNOWN
    rows = [
        fill(at, 0xFFFBD000, vcpu=vcpu, seq=1, slot=schema.SLOT_TSS, flags=known)
        for at, vcpu in ((1000, 0), (2000, 1))
    ]
    write(tmp_path / "c", np.concatenate(rows))
    with kvmprobe.open(tmp_path / "c") as capture:
        found = capture.findings()
        assert found["rule"].tolist() == ["internal-slot-fill"] * 2
        assert found["gpa"].tolist() == [0xFFFBD000] * 2
        assert found["gpa"].dtype == np.uint64
        assert found["first_ns"].tolist() == [1000, 2000]
        assert capture.analysis().verdicts["internal-slot"].verdict == "vulnerable"
        for filters, vcpus in (
            ({"vcpu": 1}, [1]),
            ({"vm": 1}, [0, 1]),
            ({"vm": 2}, []),
            ({"since": 1001}, [1]),
            ({"until": 2000}, [0]),
            ({"since": 1000, "until": 1001}, [0]),
        ):
            chosen = capture.findings(**filters)
            assert chosen["vcpu"].tolist() == vcpus, filters
            assert chosen.index.tolist() == list(range(len(vcpus)))
