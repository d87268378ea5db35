# SPDX-License-Identifier: MIT
"""Reading what is no capture, cut, damaged, from another version, or made to do harm."""

import json
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.probes import schema
from kvmprobe.store import format as fmt
from kvmprobe.store.reader import Batch, CaptureReader
from kvmprobe.store.writer import CaptureWriter


def some_rows(count: int, seed: int) -> NDArray[Any]:
    """Events of known types, every other field random in all its bits."""
    random = np.random.default_rng(seed)
    rows = np.frombuffer(random.bytes(count * schema.EVENT.itemsize), schema.EVENT).copy()
    rows["type"] = random.integers(1, 15, count)
    return rows


class Sample:
    """A small capture: its bytes, the events and the place of each batch."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sample.kvmprobe"
        self.rows = [some_rows(count, count) for count in (7, 1, 40, 3)]
        header = fmt.new_header("live")
        header["host"]["modules"] = {"kvm": "0123456789abcdef"}
        with CaptureWriter(self.path, header) as writer:
            for rows in self.rows:
                writer.write(rows)
        self.data = self.path.read_bytes()
        with CaptureReader(self.path) as reader:
            self.infos: list[Batch] = list(reader.infos())

    def variant(self, data: bytes) -> Path:
        path = self.path.with_name("variant.kvmprobe")
        path.write_bytes(data)
        return path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(tmp_path_factory.mktemp("sample"))


def read(path: Path) -> tuple[list[NDArray[Any]], CaptureReader]:
    with CaptureReader(path) as reader:
        return [schema.rows(batch) for batch in reader.batches()], reader


def same(got: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> bool:
    return len(got) == len(expected) and all(map(np.array_equal, got, expected))


# Cuts


@given(st.data())
def test_any_cut_gives_the_whole_batches_before_it(sample: Sample, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(sample.data) - 1))
    path = sample.variant(sample.data[:size])
    whole = [i for i, info in enumerate(sample.infos) if info.offset + info.size <= size]
    if size < sample.infos[0].offset:
        with pytest.raises(CaptureError, match=r"is empty|is cut inside its header|not a kvmprobe"):
            CaptureReader(path)
        return
    batches, reader = read(path)
    assert same(batches, [sample.rows[i] for i in whole])
    assert reader.truncated is not None
    assert reader.damaged == []
    with CaptureReader(path) as counter:
        assert counter.count() == sum(len(sample.rows[i]) for i in whole)
        assert counter.truncated == reader.truncated


# Damage


def check_never_other_data(sample: Sample, data: bytes) -> None:
    """Whatever the bytes: the right events, or a part of them and the rest named, or an error."""
    try:
        batches, reader = read(sample.variant(data))
    except CaptureError:
        return
    left = iter(sample.rows)
    for batch in batches:
        assert any(np.array_equal(batch, rows) for rows in left), "events that were never written"
    if not same(batches, sample.rows):
        assert reader.damaged or reader.truncated


@given(st.data())
def test_any_flipped_bit_is_harmless_or_named(sample: Sample, data: st.DataObject) -> None:
    flipped = bytearray(sample.data)
    bit = data.draw(st.integers(0, len(flipped) * 8 - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    check_never_other_data(sample, bytes(flipped))


def test_every_flipped_byte_of_a_message_is_harmless_or_named(sample: Sample) -> None:
    second = sample.infos[1]
    for at in range(second.offset, second.offset + second.size):
        flipped = bytearray(sample.data)
        flipped[at] ^= 0xFF
        check_never_other_data(sample, bytes(flipped))


_NUMBERS = st.sampled_from([0, 1, 8, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])


@given(st.data())
def test_lies_and_rubbish_never_do_harm(sample: Sample, data: st.DataObject) -> None:
    changed = bytearray(sample.data)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        if data.draw(st.booleans()):
            # Mostly in the metadata, where sizes and offsets are.
            info = data.draw(st.sampled_from(sample.infos))
            at = info.offset + at % (info._body - info.offset)
        new = data.draw(st.binary(max_size=40) | _NUMBERS.map(lambda n: struct.pack("<Q", n)))
        changed[at : at + len(new) * data.draw(st.integers(0, 1))] = new
    check_never_other_data(sample, bytes(changed))


def test_damaged_batch_is_named_and_the_rest_goes_on(sample: Sample) -> None:
    third = sample.infos[2]
    offset, length = third._buffers[list(schema.EVENT.names or ()).index("gen")]
    data = bytearray(sample.data)
    data[third._body + offset + length - 20] ^= 1
    path = sample.variant(bytes(data))
    batches, reader = read(path)
    assert same(batches, [sample.rows[i] for i in (0, 1, 3)])
    (damage,) = reader.damaged
    assert (damage.batch_index, damage.events, damage.offset) == (2, 40, third.offset)
    assert damage.reason in ("column gen fails its checksum", "column gen can't be decompressed")
    assert reader.truncated is None
    # Who does not read that column does not miss the batch.
    with CaptureReader(path) as other:
        assert [len(batch["ts"]) for batch in other.batches(["ts"])] == [7, 1, 40, 3]
        assert other.damaged == []


@pytest.mark.parametrize("lie", [0, 16, 1 << 31, 0xFFFFFFF8])
def test_rest_goes_on_after_a_broken_frame(sample: Sample, lie: int) -> None:
    second = sample.infos[1]
    data = bytearray(sample.data)
    data[second.offset + 4 : second.offset + 8] = struct.pack("<I", lie)
    batches, reader = read(sample.variant(bytes(data)))
    assert same(batches, [sample.rows[i] for i in (0, 2, 3)])
    (damage,) = reader.damaged
    assert (damage.batch_index, damage.events, damage.offset) == (1, 1, second.offset)
    assert reader.truncated is None


def test_missing_batches_are_named(sample: Sample) -> None:
    second, fourth = sample.infos[1], sample.infos[3]
    data = sample.data[: second.offset] + sample.data[fourth.offset :]
    batches, reader = read(sample.variant(data))
    assert same(batches, [sample.rows[0], sample.rows[3]])
    (damage,) = reader.damaged
    assert (damage.batch_index, damage.events) == (1, 41)
    assert damage.reason == "batches are missing before this place"


def test_repeated_batches_are_refused(sample: Sample) -> None:
    second, third = sample.infos[1], sample.infos[2]
    again = sample.data[second.offset : third.offset]
    data = sample.data[: third.offset] + again + sample.data[third.offset :]
    batches, reader = read(sample.variant(data))
    assert same(batches, sample.rows)
    (damage,) = reader.damaged
    assert (damage.batch_index, damage.reason) == (1, "a batch out of its order")


def test_another_captures_batches_are_refused(sample: Sample, tmp_path: Path) -> None:
    header = fmt.new_header("converted")
    with CaptureWriter(tmp_path / "other", header) as writer:
        for rows in [*sample.rows, *sample.rows]:
            writer.write(rows)
    data = sample.data + (tmp_path / "other").read_bytes()
    batches, reader = read(sample.variant(data))
    assert same(batches, sample.rows)
    assert reader.damaged[0].reason == "an end mark before the end"


# Harm


def test_huge_claims_allocate_nothing(sample: Sample) -> None:
    """Each column of a batch claims to unpack to 2**60 bytes."""
    data = bytearray(sample.data)
    for info in sample.infos:
        for offset, _ in info._buffers:
            data[info._body + offset : info._body + offset + 8] = struct.pack("<q", 1 << 60)
    tracemalloc.start()
    before = pa.default_memory_pool().max_memory() or 0
    batches, reader = read(sample.variant(bytes(data)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batches == []
    assert [damage.reason for damage in reader.damaged] == [
        "column type has an impossible size"
    ] * 4
    assert peak < 1 << 20
    assert (pa.default_memory_pool().max_memory() or 0) == before


def test_mass_of_damage_ends_the_reading(sample: Sample) -> None:
    start = sample.infos[0].offset
    second = sample.infos[1]
    bad = bytearray(sample.data[second.offset : second.offset + second.size])
    bad[second._body - second.offset + 8] ^= 0xFF
    data = sample.data[:start] + bytes(bad) * 3000 + b"\xff\xff\xff\xff\0\0\0\0"
    batches, reader = read(sample.variant(data))
    assert batches == []
    assert len(reader.damaged) == 1000
    assert reader.truncated == "too much of it is damaged: the rest was not read"


def test_sea_of_false_beginnings_is_left_soon(sample: Sample) -> None:
    false = (b"\xff\xff\xff\xff" + struct.pack("<I", fmt.MAX_METADATA)) * (1 << 20)
    batches, reader = read(sample.variant(sample.data[: sample.infos[1].offset] + false))
    assert same(batches, sample.rows[:1])
    assert reader.truncated is not None


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b"9" * 10_000,
        b"{}",
        b"null",
        b"\xff\xfe",
        b'{"schema": [1, 0]}',
        b'{"schema": {"major": 1e99, "minor": 0}}',
        b'{"schema": {"major": 1, "minor": 0}, "tool": "\\ud800"}',
        b'{"schema": {"major": 1, "minor": NaN}}',
        b'{"schema": {"major": 0, "minor": 9}}',
    ],
)
def test_hostile_headers(tmp_path: Path, text: bytes) -> None:
    craft(tmp_path / "c", text, fmt.CODES, [])
    with pytest.raises(CaptureError, match=r"c: the header") as error:
        CaptureReader(tmp_path / "c")
    assert str(error.value).isascii()


# Other files


def _arrow_stream(path: Path) -> None:
    with pa.ipc.new_stream(path, pa.schema([("x", pa.int64())])) as stream:
        stream.write(pa.record_batch({"x": [1, 2, 3]}))


def _arrow_strings(path: Path) -> None:
    with pa.ipc.new_stream(path, pa.schema([("x", pa.string())])):
        pass


def _arrow_file(path: Path) -> None:
    with pa.ipc.new_file(path, pa.schema([("x", pa.int64())])):
        pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.write_bytes(b"#!/bin/sh\necho\n"), "is not a kvmprobe capture"),
        (lambda path: path.write_bytes(b"\xff" * 5), "is cut inside its header"),
        (lambda path: path.write_bytes(b"\xff" * 4000), "is not a kvmprobe capture"),
        (lambda path: path.write_bytes(b"\xff\xff\xff\xff\0\0\0\0"), "is not a kvmprobe capture"),
        (_arrow_stream, "is not a kvmprobe capture"),
        (_arrow_strings, "is not a kvmprobe capture"),
        (_arrow_file, "is not a kvmprobe capture"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_capture(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(CaptureError, match=f"file {says}"):
        CaptureReader(path)


def test_other_peoples_file(sample: Sample) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    pid = os.fork()
    if pid == 0:
        os.setegid(65534)
        os.seteuid(65534)
        try:
            CaptureReader(sample.path)
        except CaptureError as error:
            os._exit(0 if "can't be read by you" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# Other versions


def craft(
    path: Path,
    header: bytes,
    codes: dict[str, str],
    batches: list[dict[str, NDArray[Any]]],
    lie: dict[str, object] | None = None,
) -> None:
    """Write a capture of any columns, as format.py describes it but for `lie`."""
    seed = fmt.header_crc(header, codes.items())
    types = [(name, pa.from_numpy_dtype(np.dtype("<" + code))) for name, code in codes.items()]
    arrow = pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in types],
        metadata={fmt.KEY: header, fmt.KEY_CRC: b"%08x" % seed},
    )
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(path, arrow, options=options) as stream:
        first = 0
        for index, columns in enumerate(batches):
            arrays = [columns[name].astype("<" + code) for name, code in codes.items()]
            text = json.dumps(
                {
                    "index": index,
                    "first": first,
                    "events": len(arrays[0]),
                    "crc32": [zlib.crc32(array.tobytes()) for array in arrays],
                    "losses": [],
                    **(lie or {}),
                }
            ).encode()
            crc = b"%08x" % zlib.crc32(text, seed)
            stream.write_batch(
                pa.record_batch([pa.array(array) for array in arrays], schema=arrow),
                custom_metadata={fmt.KEY: text, fmt.KEY_CRC: crc},
            )
            first += len(arrays[0])


def header_of(major: int, minor: int, **more: object) -> bytes:
    header = fmt.new_header("live")
    header["schema"] = {"major": major, "minor": minor}
    return json.dumps({**header, **more}).encode()


def test_newer_major_version_is_refused(tmp_path: Path) -> None:
    craft(tmp_path / "c", header_of(2, 3), {"other": "u4"}, [])
    with pytest.raises(
        CaptureError, match=r"written by a newer kvmprobe \(schema 2\.3\); this one reads 1\.x"
    ):
        CaptureReader(tmp_path / "c")


def test_newer_minor_version_is_readable(tmp_path: Path) -> None:
    rows = some_rows(50, 1)
    rows["type"][[3, 5, 7]] = 200, 201, 200
    columns = {**schema.columns(rows), "extra": np.arange(50)}
    codes = {"extra": "i8", **fmt.CODES}
    header = header_of(1, schema.SCHEMA_MINOR + 1, mood="fine")
    craft(tmp_path / "c", header, codes, [columns, columns])
    batches, reader = read(tmp_path / "c")
    known = np.delete(rows, [3, 5, 7])
    assert same(batches, [known, known])
    assert reader.unknown_events == {200: 4, 201: 2}
    assert (reader.damaged, reader.truncated) == ([], None)
    with CaptureReader(tmp_path / "c") as some:
        assert [len(batch["ts"]) for batch in some.batches(["ts"])] == [47, 47]
        assert some.unknown_events == {200: 4, 201: 2}


def test_older_minor_version_lacks_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows(50, 1)
    codes = {name: code for name, code in fmt.CODES.items() if name != "aux"}
    minor = schema.SCHEMA_MINOR
    craft(tmp_path / "c", header_of(1, minor), codes, [schema.columns(rows)])
    with pytest.raises(CaptureError, match="column aux is missing"):
        CaptureReader(tmp_path / "c")
    monkeypatch.setattr(schema, "SCHEMA_MINOR", minor + 1)
    batches, _ = read(tmp_path / "c")
    rows["aux"] = 0
    assert same(batches, [rows])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extra": "u8"}, "a column 'extra' that its schema version doesn't have"),
        ({"vm": "u8"}, "column vm holds u8, not u4"),
    ],
)
def test_columns_that_are_not_the_schemas(
    tmp_path: Path, change: dict[str, str], says: str
) -> None:
    craft(tmp_path / "c", header_of(1, schema.SCHEMA_MINOR), {**fmt.CODES, **change}, [])
    with pytest.raises(CaptureError, match=says):
        CaptureReader(tmp_path / "c")


@pytest.mark.parametrize(
    "lie",
    [
        {"index": -1},
        {"index": 1 << 70},
        {"index": True},
        {"first": None},
        {"events": 4},
        {"events": 0},
        {"crc32": [0] * 13},
        {"crc32": 7},
        {"losses": 7},
        {"losses": [7]},
        {"losses": {"cpu": 1}},
        {"losses": [{"observation": 1, "cpu": 0, "cause": "RING", "records": 1}]},
        {"losses": [{"observation": "FILL", "cpu": 0, "cause": "RING", "records": -1}]},
    ],
)
def test_lying_description_with_a_right_checksum(tmp_path: Path, lie: dict[str, object]) -> None:
    rows = some_rows(5, 1)
    craft(tmp_path / "c", header_of(1, 0), fmt.CODES, [schema.columns(rows)], lie)
    batches, reader = read(tmp_path / "c")
    assert batches == []
    assert len(reader.damaged) == 1


def test_names_of_losses_can_be_printed(tmp_path: Path) -> None:
    loss = {"observation": "\x1b[2J" + "x" * 99, "cpu": 0, "cause": "a\nb", "records": 1}
    rows = some_rows(5, 1)
    craft(tmp_path / "c", header_of(1, 0), fmt.CODES, [schema.columns(rows)], {"losses": [loss]})
    with CaptureReader(tmp_path / "c") as reader:
        (info,) = reader.infos()
    assert info.losses[0].observation == "?[2J" + "x" * 56
    assert info.losses[0].cause == "a?b"
