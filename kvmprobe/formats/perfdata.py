# SPDX-License-Identifier: MIT
"""Reads perf.data files (tools/perf/Documentation/perf.data-file-format.txt).

Samples of one file have one form: the kernel's record of a tracepoint stands at a fixed place in
each, or behind a call chain.  Records are found by columns: where one sample ends and the next
begins there is nothing to step over; only records of other types are stepped over one by one.  Each
CPU's buffer was written on its own, so samples are put in order of time between the rounds that
perf marks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.formats import raw, swar
from kvmprobe.formats.compiled import Loops, PerfLoop, PerfRead
from kvmprobe.formats.records import RECORD, SHOWN, Block, Point, Tally

MAGIC = b"PERFILE2"
_CHUNK = 4 << 20
_MAX_RECORD = 1 << 16
_MAX_ATTRS = 1 << 14
_MAX_TRACING = 256 << 20
#: Records that wait to be put in order; a file that marks no rounds gets no more.
_MOST_WAITING = 1 << 20
_TRACING_DATA, _OSRELEASE, _COMPRESSED_DATA = 1, 4, 27
_TRACEPOINT = 2
_PAD = 64
# Record types
_LOST, _COMM, _SAMPLE, _LOST_SAMPLES, _ROUND = 2, 3, 9, 13, 68
_COMPRESSED, _COMPRESSED_2, _AUXTRACE = 81, 83, 71
# Bits of a sample's form, in the order of what they add
_IP, _TID, _TIME, _ADDR, _READ, _CHAIN, _ID = 1, 2, 4, 8, 16, 32, 64
_CPU, _PERIOD, _STREAM, _RAW, _IDENTIFIER = 128, 256, 512, 1024, 1 << 16


class UnsupportedError(CaptureError):
    """A form of perf.data that only perf itself reads."""


class Form(NamedTuple):
    """Where a sample's parts stand, in bytes from its beginning; -1: not there."""

    identifier: int
    tid: int
    time: int
    cpu: int
    rest: int
    chain: bool


def _form(kind: int) -> Form:
    """Work out the form of samples of one sample_type."""
    if not kind & _RAW or not kind & _TIME or not kind & _TID:
        raise CaptureError(
            "the samples lack time, thread or tracepoint data; record with perf record -e kvm:*"
        )
    if kind & _READ:
        raise UnsupportedError("samples with counter values")
    at = 8
    places = {}
    for bit in (_IDENTIFIER, _IP, _TID, _TIME, _ADDR, _ID, _STREAM, _CPU, _PERIOD):
        places[bit] = at if kind & bit else -1
        at += 8 if kind & bit else 0
    return Form(
        places[_IDENTIFIER], places[_TID], places[_TIME], places[_CPU], at, bool(kind & _CHAIN)
    )


class PerfDataReader:
    """Reads a perf.data from a seekable file."""

    def __init__(
        self, file: BinaryIO, tally: Tally, *, salvage: bool = False, loops: Loops | None = None
    ) -> None:
        """Read the header.

        With `salvage` a file that ends early, or is damaged from some place on, gives what stands
        before.  With `loops` samples are read by them.

        Raises:
            UnsupportedError: perf itself can read it, this can't.
            CaptureError: it is damaged; names the offset.

        """
        self._file = file
        self._tally = tally
        self._salvage = salvage
        self._size = file.seek(0, 2)
        self.form, self._ids, self._formats, self.data = self._header()
        self._loop = loops and PerfLoop(loops, self._formats, self.form, self._ids)
        self._waiting: list[NDArray[Any]] = []
        self._count = 0
        self._latest = 0
        # The newest times when the last two rounds ended: all up to the older is complete.
        self._round = 0
        self._next = 0
        #: Why the file ends early, if it does.
        self.ended: CaptureError | None = None

    def _read(self, offset: int, size: int) -> bytes:
        if offset + size > self._size:
            raise CaptureError(
                f"the file ends at byte {self._size}, but names {size} bytes at {offset}"
            )
        self._file.seek(offset)
        return self._file.read(size)

    def _header(self) -> tuple[Form, NDArray[np.uint64], raw.Formats, tuple[int, int]]:
        head = raw.Cursor(self._read(0, min(self._size, 104)))
        head.expect(MAGIC)
        size = head.number(8)
        if size == 16:
            raise UnsupportedError("perf.data written to a pipe")
        attr_size, attrs, attrs_size, data, data_size = (head.number(8) for _ in range(5))
        head.take(16)
        features = head.number(8)
        if not 64 <= attr_size <= 4096 or attrs_size // attr_size > _MAX_ATTRS:
            raise CaptureError("attributes of impossible size at byte 16: damaged")
        if features & 1 << _COMPRESSED_DATA:
            raise UnsupportedError("compressed records")
        kinds, ids = self._attrs(attrs, attrs_size, attr_size)
        if len(kinds) != 1:
            raise UnsupportedError("samples of several forms")
        form = _form(kinds.pop())
        # Data of a recording that was killed has no size yet.
        end = data + data_size if data_size else self._size
        if not features & 1 << _TRACING_DATA:
            raise CaptureError("no tracepoint formats in it: a recording of tracepoints has them")
        formats = self._features(end, features)
        if not data_size or end > self._size:
            end = self._size
        return form, np.array(sorted(ids), np.uint64), formats, (data, end)

    def _attrs(self, offset: int, size: int, each: int) -> tuple[set[int], set[int]]:
        """Read the attributes: the forms of samples, and their identifiers."""
        form = np.dtype(
            {
                "names": ["type", "sample_type", "ids", "ids_size"],
                "formats": ["<u4", "<u8", "<u8", "<u8"],
                "offsets": [0, 24, each - 16, each - 8],
                "itemsize": each,
            }
        )
        kinds, ids = set(), set()
        table = np.frombuffer(self._read(offset, size // each * each), form)
        # Other events beside the tracepoints: dummies for the map of memory.
        ours = (table["type"] == _TRACEPOINT) | (table["sample_type"] & np.uint64(_RAW) != 0)
        for number in np.flatnonzero(ours).tolist():
            _, kind, ids_at, ids_size = table[number].tolist()
            kinds.add(kind)
            if ids_size > 8 << 16:
                at = offset + (number + 1) * each - 8
                raise CaptureError(f"identifiers of impossible size at byte {at}")
            ids |= set(np.frombuffer(self._read(ids_at, ids_size // 8 * 8), "<u8").tolist())
        return kinds, ids

    def _features(self, offset: int, features: int) -> raw.Formats:
        """Read what matters after the data: tracepoint formats, the kernel's release."""
        table = raw.Cursor(self._read(offset, 16 * features.bit_count()), offset)
        formats = raw.Formats()
        for bit in range(features.bit_length()):
            if not features >> bit & 1:
                continue
            at, size = table.number(8), table.number(8)
            if bit == _OSRELEASE and 4 < size <= 4096:
                text = self._read(at, size)[4:].split(b"\0")[0]
                self._tally.kernel = text.decode("latin-1") or None
            if bit != _TRACING_DATA:
                continue
            if size > _MAX_TRACING:
                raise CaptureError(f"tracepoint formats of {size} bytes at byte {at}: damaged")
            cursor = raw.Cursor(self._read(at, size), at)
            cursor.expect(b"\x17\x08\x44tracing")
            cursor.string(16)
            cursor.take(1 + 1 + 4)
            raw.read_page_header(cursor)
            raw.read_ftrace_formats(cursor)
            formats = raw.read_formats(cursor)
        # perf keeps the formats of the tracepoints that it recorded, and of no others.
        self._tally.enabled = {layout.tracepoint.point for layout in formats.layouts.values()}
        return formats

    def __iter__(self) -> Iterator[Block]:
        """Yield the records in order of time; raises CaptureError that names the offset."""
        comms: dict[int, bytes] = {}
        try:
            for chunk in self._chunks():
                comms |= self._chunk(*chunk)
                if len(block := self._sorted(self._round)):
                    yield Block(block, comms)
                    comms = {}
        except UnsupportedError:
            raise
        except CaptureError as error:
            if not self._salvage:
                raise
            self.ended = error
        if len(block := self._sorted(None)):
            yield Block(block, comms)

    def _chunks(self) -> Iterator[tuple[NDArray[np.uint8], int, int]]:
        """Yield whole records in pieces, in one buffer: it, their bytes, their place in the file.

        The buffer goes on for _PAD zeros.
        """
        offset, end = self.data
        buffer = np.zeros(min(_CHUNK, max(0, end - offset)) + _PAD, np.uint8)
        self._used = 0
        while offset < end:
            self._file.seek(offset)
            size = raw.read_into(self._file, buffer[: min(len(buffer) - _PAD, end - offset)])
            buffer[size : size + _PAD] = 0
            yield buffer, size, offset
            if not self._used:
                raise CaptureError(f"the file ends inside a record, at byte {offset}")
            offset += self._used

    def _chunk(self, padded: NDArray[np.uint8], size: int, offset: int) -> dict[int, bytes]:
        """Take in the whole records in the first `size` bytes; sets `_used` to theirs."""
        slots = size // 8
        padded[slots * 8 : size] = 0
        words = padded[: slots * 8 + _PAD].view("<u8")
        read = self._loop or self._by_columns
        found = read(words, slots, self._tally.systems)
        self._used = found.end * 8
        self._tally.read += found.samples
        self._tally.not_understood(
            found.short, [b"a sample too short for its format"] * min(found.short, SHOWN), ours=True
        )
        comms: dict[int, bytes] = {}
        done = 0
        for at, before, newest in found.others:
            self._wait(found.records[done:before])
            done = before
            self._latest = max(self._latest, newest)
            head = int(words[at])
            body = padded[at * 8 : at * 8 + (head >> 48)]
            self._other(head & 0xFFFFFFFF, body, offset + at * 8, comms)
        self._wait(found.records[done:])
        self._latest = max(self._latest, found.newest)
        if found.end < slots:
            length = int(words[found.end]) >> 48
            if length < 8 or length % 8:
                raise CaptureError(
                    f"a record of {length} bytes at byte {offset + self._used}: damaged"
                )
        return comms

    def _other(
        self, kind: int, body: NDArray[np.uint8], offset: int, comms: dict[int, bytes]
    ) -> None:
        """Take in a record that is no sample of ours."""
        if kind in (_COMPRESSED, _COMPRESSED_2, _AUXTRACE):
            raise UnsupportedError("compressed or AUX records")
        if kind == _COMM and len(body) >= 24:
            tid = int.from_bytes(body[12:16].tobytes(), "little")
            comms[tid] = body[16:32].tobytes().split(b"\0")[0]
        elif kind in (_LOST, _LOST_SAMPLES):
            self._wait(self._lost(body.tobytes(), kind))
        elif kind == _ROUND:
            self._round, self._next = self._next, self._latest
        elif kind == _SAMPLE:
            self._tally.not_understood(1, [f"a sample at byte {offset}".encode()], ours=True)

    def _by_columns(self, words: NDArray[np.uint64], slots: int, systems: set[str]) -> PerfRead:
        """Read records; `systems` gets those recorded whole."""
        sample, size = self.candidates(words, slots)
        # A run of samples ends where the next candidate isn't the next record.
        breaks = np.flatnonzero(sample[1:] != sample[:-1] + size[:-1])
        runs: list[tuple[int, int]] = []
        others: list[tuple[int, int]] = []  # word, runs before it
        at = 0
        while at < slots:
            i = int(np.searchsorted(sample, at))
            if i < len(sample) and sample[i] == at:
                b = int(np.searchsorted(breaks, i))
                last = int(breaks[b]) if b < len(breaks) else len(sample) - 1
                runs.append((i, last + 1))
                at = int(sample[last] + size[last])
                continue
            length = int(words[at]) >> 48
            if length < 8 or length % 8 or at + length // 8 > slots:
                break
            others.append((at, len(runs)))
            at += length // 8
        marks = np.concatenate([np.arange(a, b) for a, b in runs] or [np.empty(0, np.int64)])
        ends = np.cumsum([0, *(b - a for a, b in runs)])
        samples, good = self._samples(words, sample[marks] * 8, size[marks] * 8)
        records, index, short = raw.columns(samples, self._formats, systems)
        index = np.flatnonzero(good)[index]
        newest = np.maximum.accumulate(words[sample[marks] + self.form.time // 8])
        upto = [int(ends[before]) for _, before in others]
        return PerfRead(
            records,
            [
                (at, int(row), int(newest[marks_before - 1]) if marks_before else 0)
                for (at, _), row, marks_before in zip(
                    others, np.searchsorted(index, upto), upto, strict=True
                )
            ],
            len(marks), len(marks) - int(good.sum()) + len(short),
            int(newest[-1]) if len(newest) else 0, at,
        )  # fmt: skip

    def candidates(
        self, words: NDArray[np.uint64], slots: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where samples may begin, in words, and their lengths in words; whole ones only."""
        at = np.flatnonzero((words[:slots] & np.uint64(0xFFFFFFFF)) == _SAMPLE)
        size = (words[at] >> np.uint64(48)).astype(np.int64)
        good = (size % 8 == 0) & (size >= self.form.rest + 8) & (at + size // 8 <= slots)
        if self.form.identifier >= 0:
            # The buffer goes on for some words after the last slot.
            good &= np.isin(words[at + self.form.identifier // 8], self._ids)
        return at[good], size[good] // 8

    def _lost(self, body: bytes, kind: int) -> NDArray[Any]:
        record = np.zeros(1, RECORD)
        record["point"], record["ts"] = Point.LOST, self._latest
        place = 16 if kind == _LOST else 8
        record["a"] = min(int.from_bytes(body[place : place + 8], "little"), 1 << 40)
        trailer = sum(8 for at in self.form[:4] if at >= 0)
        if len(body) >= place + 8 + trailer and self.form.cpu >= 0:
            tail = body[-16:] if self.form.identifier >= 0 else body[-8:]
            record["cpu"] = int.from_bytes(tail[:2], "little")
        return record

    def _samples(
        self, words: NDArray[np.uint64], at: NDArray[np.int64], size: NDArray[np.int64]
    ) -> tuple[raw.Samples, NDArray[np.bool_]]:
        """Take samples apart; those whose data go beyond them are left out and not good."""
        form = self.form
        data = at + form.rest
        if form.chain:
            frames = np.minimum(words[data // 8], np.uint64(_MAX_RECORD)).astype(np.int64)
            data = data + 8 + 8 * frames
        good = data + 8 <= at + size
        data = np.where(good, data, at)
        length = (words[data // 8] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        good &= (data + 4 + length <= at + size) & (length >= 8)
        at, data, length = at[good], data[good], length[good]
        who = words[(at + form.tid) // 8]
        tid, tgid = who >> np.uint64(32), who & np.uint64(0xFFFFFFFF)
        cpu = words[(at + form.cpu) // 8] if form.cpu >= 0 else np.zeros(len(at), np.uint64)
        bytes_of = swar.words(words.view(np.uint8))
        samples = raw.Samples(
            bytes_of, data + 4, length, words[(at + form.time) // 8],
            tid.astype(np.uint32), tgid.astype(np.uint32),
            (cpu & np.uint64(0xFFFF)).astype(np.uint16),
        )  # fmt: skip
        return samples, good

    def _wait(self, records: NDArray[Any]) -> None:
        if len(records):
            self._waiting.append(records)
            self._count += len(records)

    def _sorted(self, upto: int | None) -> NDArray[Any]:
        """Take the waiting records with times up to `upto` (None: all), in order of time."""
        if upto is not None and self._count <= _MOST_WAITING and not self._round:
            return np.empty(0, RECORD)
        # As words: numpy takes long to agree on a common type of many arrays of records.
        parts = [np.empty(0, np.uint64), *(part.view(np.uint64) for part in self._waiting)]
        waiting = np.concatenate(parts).view(RECORD)
        times = waiting["ts"].copy()
        if (times[1:] < times[:-1]).any():
            waiting = waiting[np.argsort(times, kind="stable")]
        cut = len(waiting)
        if upto is not None:
            cut = int(np.searchsorted(waiting["ts"], np.uint64(upto), side="right"))
            cut = max(cut, len(waiting) - _MOST_WAITING)
        taken, rest = waiting[:cut], waiting[cut:]
        self._waiting, self._count = [rest], len(rest)
        self._tally.took(taken)
        return taken
