# SPDX-License-Identifier: MIT
"""Writing captures and reading them back, also after a full disk and a kill."""

import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.probes import schema
from kvmprobe.store import format as fmt
from kvmprobe.store.reader import CaptureReader, Loss
from kvmprobe.store.writer import CaptureWriter

ROOT = Path(__file__).parents[2]


def some_rows(count: int, seed: int = 1) -> NDArray[Any]:
    """Events of known types, every other field random in all its bits."""
    random = np.random.default_rng(seed)
    rows = np.frombuffer(random.bytes(count * schema.EVENT.itemsize), schema.EVENT).copy()
    rows["type"] = random.integers(1, 15, count)
    return rows


def record(path: Path, *batches: NDArray[Any]) -> None:
    with CaptureWriter(path, fmt.new_header("live")) as writer:
        for rows in batches:
            writer.write(rows)


def read(path: Path) -> tuple[list[NDArray[Any]], CaptureReader]:
    with CaptureReader(path) as reader:
        return [schema.rows(batch) for batch in reader.batches()], reader


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT
    )


@settings(max_examples=40)
@given(st.lists(st.integers(0, 300), max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, counts: list[int]) -> None:
    path = tmp_path_factory.mktemp("capture") / "c.kvmprobe"
    written = [some_rows(count, seed) for seed, count in enumerate(counts)]
    record(path, *written)
    batches, reader = read(path)
    expected = [rows for rows in written if len(rows)]
    assert len(batches) == len(expected)
    for got, rows in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(got, rows)
    assert (reader.damaged, reader.truncated, reader.unknown_events) == ([], None, {})


def test_header_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"
    header = fmt.new_header("live")
    header["command"] = ["kvmprobe", "record", "-o", "für uns\n"]
    header["layout"] = {"kvm_vcpu.arch": 320}
    header["started"] = "2026-11-22T15:00:00Z"
    with CaptureWriter(path, header) as writer:
        writer.write(some_rows(10))
        writer.write(some_rows(7))
        assert writer.events == 17
        assert writer.bytes_written == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with CaptureReader(path) as reader:
        assert reader.header == header
        assert reader.count() == 17
        infos = list(reader.infos())
        assert [(i.index, i.first, i.events) for i in infos] == [(0, 0, 10), (1, 10, 7)]
        assert infos[0].offset + infos[0].size == infos[1].offset


def test_header_is_there_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"
    with CaptureWriter(path, fmt.new_header("live")) as writer:
        assert writer.bytes_written == path.stat().st_size > 0
        batches, reader = read(path)
        assert batches == []
        assert reader.header == fmt.new_header("live")
        assert reader.truncated is not None
    assert read(path)[1].truncated is None


def test_file_name_that_is_not_utf8_does_not_spoil_the_header(tmp_path: Path) -> None:
    header = fmt.new_header("live")
    header["command"] = [os.fsdecode(b"\xff")]
    path = tmp_path / "c.kvmprobe"
    CaptureWriter(path, header).close()
    with CaptureReader(path) as reader:
        assert reader.header["command"] == ["?"]


def test_any_arrow_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"
    rows = some_rows(1000)
    record(path, rows, rows)
    with pa.ipc.open_stream(path) as stream:
        assert stream.schema.equals(schema.arrow_schema())
        assert json.loads(stream.schema.metadata[b"kvmprobe"]) == fmt.new_header("live")
        table = stream.read_all()
    for name in schema.EVENT.names or ():
        np.testing.assert_array_equal(table[name].to_numpy(), np.tile(rows[name], 2))


def test_only_columns_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"
    rows = some_rows(100)
    record(path, rows)
    with CaptureReader(path) as reader:
        (batch,) = reader.batches(["slot", "gen"])
        assert list(batch) == ["slot", "gen"]
        np.testing.assert_array_equal(batch["gen"], rows["gen"])
        assert batch["gen"].dtype == np.dtype("<u8")
        with pytest.raises(CaptureError, match="no column 'gpa'; there are ts, vm"):
            reader.batches(["gpa"])


def test_large_drain_is_split(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"
    rows = some_rows(fmt.MAX_ROWS + 5)
    record(path, rows)
    batches, _ = read(path)
    assert [len(batch) for batch in batches] == [fmt.MAX_ROWS, 5]
    np.testing.assert_array_equal(np.concatenate(batches), rows)


def test_losses_of_the_period(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"
    rows = some_rows(4)
    rows["type"][2:] = schema.Type.LOSS
    rows["kind"][2:] = schema.Type.FILL, 99
    rows["aux"][2:] = 3, 255
    rows["len"][2:] = schema.LossCause.RING, 77
    rows["addr"][2:] = 1 << 40, 2
    record(path, some_rows(3), rows)
    with CaptureReader(path) as reader:
        losses = [info.losses for info in reader.infos()]
    assert losses == [(), (Loss("FILL", 3, "RING", 1 << 40), Loss("99", 255, "77", 2))]


def test_nothing_but_losses_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"
    rows = some_rows(50_000)
    rows["type"] = schema.Type.LOSS
    record(path, rows)
    batches, reader = read(path)
    np.testing.assert_array_equal(np.concatenate(batches), rows)
    assert reader.damaged == []


def test_writing_imports_neither_pandas_nor_numba(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from kvmprobe.probes import schema\n"
        "from kvmprobe.store import format as fmt\n"
        "from kvmprobe.store.reader import CaptureReader\n"
        "from kvmprobe.store.writer import CaptureWriter\n"
        "with CaptureWriter(sys.argv[1], fmt.new_header('live')) as w:\n"
        "    before = set(sys.modules)\n"
        "    w.write(np.ones(1000, schema.EVENT))\n"
        "    print(sorted(set(sys.modules) - before))\n"
        "print(sum(len(b['ts']) for b in CaptureReader(sys.argv[1]).batches()))\n"
        "print([m for m in ('pandas', 'numba') if m in sys.modules])\n"
    )
    done = run_python(code, str(tmp_path / "c.kvmprobe"))
    assert done.stdout == "[]\n1000\n[]\n", done.stderr


def test_killed_recording_keeps_every_written_batch(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, numpy as np\n"
        "from kvmprobe.probes import schema\n"
        "from kvmprobe.store import format as fmt\n"
        "from kvmprobe.store.writer import CaptureWriter\n"
        "w = CaptureWriter(sys.argv[1], fmt.new_header('live'))\n"
        "for i in range(5): w.write(np.full(100, i + 1, schema.EVENT))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "c.kvmprobe"
    assert run_python(code, str(path)).returncode == -signal.SIGKILL
    batches, reader = read(path)
    assert [len(batch) for batch in batches] == [100] * 5
    assert reader.damaged == []
    assert reader.truncated is not None
    assert "no end mark" in reader.truncated


def test_forced_capture_replaces_the_old_one_when_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"
    record(path, some_rows(10))
    with pytest.raises(CaptureError, match="exists; pass --force"):
        CaptureWriter(path, fmt.new_header("live"))
    with CaptureWriter(path, fmt.new_header("live"), force=True) as writer:
        writer.write(some_rows(3))
        batches, reader = read(path)
        assert [len(batch) for batch in batches] == [3]
        assert reader.truncated is not None
    assert read(path)[1].truncated is None


def test_full_disk_leaves_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"
    rows = some_rows(1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CaptureWriter(path, fmt.new_header("live"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (160_000, before[1]))
        writer.write(rows)
        writer.write(rows)
        with pytest.raises(CaptureError, match=r"can't write .*size limit") as first:
            writer.write(some_rows(5000, seed=2))
        with pytest.raises(CaptureError, match=re.escape(str(first.value))):
            writer.write(rows)
        writer.close()
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(first.value)
    assert path.stat().st_size == writer.bytes_written
    assert writer.events == 2000
    batches, reader = read(path)
    assert len(batches) == 2
    for batch in batches:
        np.testing.assert_array_equal(batch, rows)
    assert reader.damaged == []
    assert reader.truncated is not None


def test_disk_too_full_to_begin_leaves_no_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(CaptureError, match="size limit"):
            CaptureWriter(tmp_path / "c.kvmprobe", fmt.new_header("live"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_in_the_middle_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.kvmprobe"
    rows = some_rows(1000)
    write = os.pwrite

    def interrupted(fd: int, data: memoryview, offset: int) -> int:
        write(fd, data[: len(data) // 2], offset)
        raise KeyboardInterrupt

    with CaptureWriter(path, fmt.new_header("live")) as writer:
        writer.write(rows)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.write(rows)
        writer.sync()
        assert path.stat().st_size == writer.bytes_written
    batches, reader = read(path)
    assert [len(batch) for batch in batches] == [1000]
    assert (reader.damaged, reader.truncated) == ([], None)


def test_failed_recording_still_ends_the_stream(tmp_path: Path) -> None:
    path = tmp_path / "c.kvmprobe"

    def fail() -> None:
        with CaptureWriter(path, fmt.new_header("live")) as writer:
            writer.write(some_rows(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    batches, reader = read(path)
    assert [len(batch) for batch in batches] == [5]
    assert reader.truncated is None


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("clock", None, "header's clock is no object"),
        ("clock", {"monotonic_ns": 1.5, "wall_ns": 1}, "clock.monotonic_ns has a wrong type"),
        ("clock", {"monotonic_ns": 1 << 63, "wall_ns": 1}, "clock.monotonic_ns is out of range"),
        ("clock", {"monotonic_ns": True, "wall_ns": 1}, "clock.monotonic_ns has a wrong type"),
        ("clock", {"wall_ns": 1}, "lacks clock.monotonic_ns"),
        ("started", "yesterday", "RFC 3339"),
        ("started", "2026-11-22T15:00:00", "RFC 3339"),
        ("source", {"kind": "dreamt", "note": None}, "neither live nor converted"),
        ("plan", [{"observation": "FILL"}], r"lacks plan\[0\].site"),
        ("plan", {}, "plan is no list"),
        ("layout", {"x": "1"}, "layout.x has a wrong type"),
        ("command", "kvmprobe record", "command is no list"),
        ("command", [None], r"command\[0\] has a wrong type"),
        ("command", ["x" * fmt.MAX_METADATA], "too large"),
    ],
)
def test_wrong_header_is_refused_before_recording(
    tmp_path: Path, key: str, value: object, says: str
) -> None:
    header = fmt.new_header("live")
    header[key] = value
    with pytest.raises(CaptureError, match=says):
        CaptureWriter(tmp_path / "c.kvmprobe", header)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", list(fmt.new_header("live")))
def test_every_key_must_be_there(key: str) -> None:
    header = fmt.new_header("converted")
    fmt.check_header(header)
    del header[key]
    with pytest.raises(CaptureError, match=f"lacks {key}"):
        fmt.check_header(header)
