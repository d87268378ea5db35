# SPDX-License-Identifier: MIT
"""Reads trace.dat files of trace-cmd, versions 6 and 7 (man 5 trace-cmd.dat).

The kernel's ring-buffer pages are in it as they were: a page has a time, a length and events, each
with the time since the one before.  Many pages are decoded in step, the first event of each, then
the second.  Each CPU has its own pages; records are merged by time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.formats import raw, swar
from kvmprobe.formats.compiled import Loops, PagesLoop
from kvmprobe.formats.merge import merge
from kvmprobe.formats.records import RECORD, SHOWN, Block, Point, Tally
from kvmprobe.formats.tracedat_header import CpuData, chunks, read_header

#: Bytes of pages decoded at a time, over all CPUs.
_WINDOW = 2 << 20
_HEAD = 16
_LENGTH = np.uint64((1 << 27) - 1)
_MISSED = np.uint64(1 << 31)
_MISSED_STORED = np.uint64(1 << 30)
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_TOP = np.uint64(0xF8 << 56)
_27 = np.uint64(27)
_27_BITS = np.uint64((1 << 27) - 1)
_PAD = 64


class _Decoded(NamedTuple):
    """The events of some pages in order: where their data begin, their sizes and times."""

    at: NDArray[np.int64]
    size: NDArray[np.int64]
    ts: NDArray[np.uint64]


def decode(words: swar.U64, pages: int, page: int) -> tuple[_Decoded, NDArray[np.int64]]:
    """Decode ring-buffer pages (kernel/trace/ring_buffer.c, rb_update_event()).

    Args:
        words: the pages as `swar.words`.
        pages: how many.
        page: bytes of each.

    Returns:
        The events, and where damaged pages end early (the offsets of what isn't understood).

    """
    base = np.arange(pages, dtype=np.int64) * page
    ts = words[base].copy()
    commit = (words[base + 8] & _LENGTH).astype(np.int64)
    bad = [base[commit > page - _HEAD] + 8]
    pos = base + _HEAD
    end = np.where(commit > page - _HEAD, pos, pos + commit)
    found: list[_Decoded] = []
    while True:
        live = pos + 4 <= end
        if not live.all():
            pos, end, ts = pos[live], end[live], ts[live]
        if not len(pos):
            break
        word = words[pos]
        kind = (word & np.uint64(31)).astype(np.int64)
        delta = (word >> np.uint64(5)) & _27_BITS
        array = word >> np.uint64(32)
        short = kind < _PADDING
        size = np.where(kind == 0, array.astype(np.int64) - 4, kind * 4)
        data = np.where(kind == 0, pos + 8, pos + 4)
        after = data + size
        long = delta + (array << _27)
        stamp = long | (ts & _TOP)
        ts = np.where(short, ts + delta, np.where(kind == _TIME_EXTEND, ts + long, ts))
        ts = np.where(kind == _TIME_STAMP, stamp, ts)
        after = np.where(kind >= _TIME_EXTEND, pos + 8, after)
        padded = np.where(delta == 0, end, pos + 4 + array.astype(np.int64))
        after = np.where(kind == _PADDING, padded, after)
        wrong = (after > end) | (short & (size < 8))
        if wrong.any():
            bad.append(pos[wrong])
            after = np.where(wrong, end, after)
            short &= ~wrong
        found.append(_Decoded(data[short], size[short], ts[short]))
        pos = after
    at, size, ts = (
        np.concatenate([np.empty(0, dtype), *(part[i] for part in found)])
        for i, dtype in enumerate((np.int64, np.int64, np.uint64))
    )
    order = np.argsort(at, kind="stable")
    return _Decoded(at[order], size[order], ts[order]), np.concatenate(bad)


class TraceDatReader:
    """Reads a trace.dat from a seekable file."""

    def __init__(
        self, file: BinaryIO, tally: Tally, *, salvage: bool = False, loops: Loops | None = None
    ) -> None:
        """Read the header; raises CaptureError that names the offset of what is wrong.

        With `salvage` damaged pages are counted as not understood and a file that ends early gives
        what is there; without it both are errors.  With `loops` pages are read by them.
        """
        self._file = file
        self._tally = tally
        self._salvage = salvage
        self._header = read_header(file)
        tally.kernel = self._header.kernel
        self._loop = loops and PagesLoop(loops, self._header.formats, self._header.tgids)
        self._buffer = np.zeros(0, np.uint8)
        self._stored: dict[int, int] = {}
        #: Why the file ends early, if it does.
        self.ended: CaptureError | None = None

    def __iter__(self) -> Iterator[Block]:
        """Yield the records of all CPUs in order of time; raises CaptureError."""
        header = self._header
        comms = header.comms
        want = max(16 << 10, _WINDOW // max(1, len(header.cpus)))
        for records in merge([self._cpu(data, want) for data in header.cpus]):
            self._tally.took(records)
            yield Block(records, comms)
            comms = {}
        rest = self._overruns()
        if len(rest):
            self._tally.took(rest)
            yield Block(rest, comms)

    def _cpu(self, data: CpuData, want: int) -> Iterator[NDArray[Any]]:
        try:
            for offset, pages in chunks(self._file, self._header, data, want):
                yield self._records(offset, pages, data)
        except CaptureError as error:
            if not self._salvage:
                raise
            self.ended = self.ended or error

    def _records(self, offset: int, pages: bytes, data: CpuData) -> NDArray[Any]:
        if len(self._buffer) < len(pages) + _PAD:
            self._buffer = np.zeros(len(pages) + _PAD, np.uint8)
        padded = self._buffer[: len(pages) + _PAD]
        padded[: len(pages)] = np.frombuffer(pages, np.uint8)
        padded[len(pages) :] = 0
        words = swar.words(padded)
        count = len(pages) // data.page
        read = self._loop or self._by_columns
        records, at, bad, events, short = read(
            padded, count, data.page, data.cpu & 0xFFFF, self._tally.systems
        )
        if len(bad):
            place = f"chunk at {offset}" if data.compressed else f"byte {offset + int(bad.min())}"
            what = f"CPU {data.cpu}: a ring-buffer page is damaged ({place})"
            if not self._salvage:
                raise CaptureError(what)
            self._tally.not_understood(len(bad), [what.encode()], ours=True)
        self._tally.read += events
        self._tally.not_understood(
            short,
            [f"CPU {data.cpu}: a record too short for its format".encode()] * min(short, SHOWN),
            ours=True,
        )
        return self._with_losses(records, at, words, count, data)

    def _by_columns(
        self, padded: NDArray[np.uint8], pages: int, page: int, cpu: int, systems: set[str]
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64], int, int]:
        """Read pages: the records, where their data begin, damaged places, events, those too short.

        `systems` gets those recorded whole.
        """
        words = swar.words(padded)
        events, bad = decode(words, pages, page)
        tid = (words[events.at] >> np.uint64(32)).astype(np.uint32)
        samples = raw.Samples(
            words, events.at, events.size, events.ts, tid, self._tgids(tid),
            np.full(len(tid), cpu, np.uint16),
        )  # fmt: skip
        records, index, short = raw.columns(samples, self._header.formats, systems)
        return records, events.at[index], bad, len(tid), len(short)

    def _tgids(self, tid: NDArray[np.uint32]) -> NDArray[np.uint32]:
        if not self._header.tgids:
            return np.zeros(len(tid), np.uint32)
        unique, which = np.unique(tid, return_inverse=True)
        known = [self._header.tgids.get(t, 0) for t in unique.tolist()]
        return np.array(known, np.uint32)[which]

    def _with_losses(
        self,
        records: NDArray[Any],
        at: NDArray[np.int64],
        words: swar.U64,
        pages: int,
        data: CpuData,
    ) -> NDArray[Any]:
        """Put a loss mark before the first record of each page that says some are missing."""
        base = np.arange(pages, dtype=np.int64) * data.page
        commit = words[base + 8]
        missed = base[(commit & _MISSED) != 0]
        if not len(missed):
            return records
        length = (words[missed + 8] & _LENGTH).astype(np.int64)
        stored = (words[missed + 8] & _MISSED_STORED) != 0
        stored &= length <= data.page - _HEAD - 8
        lost = np.zeros(len(missed), RECORD)
        lost["point"], lost["cpu"] = Point.LOST, data.cpu & 0xFFFF
        lost["ts"] = words[missed]
        lost["a"] = np.where(stored, words[missed + _HEAD + np.where(stored, length, 0)], 1)
        # A count that no buffer could lose is damage.
        lost["a"] = np.minimum(lost["a"], np.uint64(1 << 40))
        self._stored[data.cpu] = self._stored.get(data.cpu, 0) + int(lost["a"].sum())
        merged: NDArray[Any] = np.insert(records, np.searchsorted(at, missed), lost)
        return merged

    def _overruns(self) -> NDArray[Any]:
        """Losses that only the statistics at the end know: the pages that held them are gone."""
        lost = [
            (cpu, total - self._stored.get(cpu, 0))
            for cpu, total in sorted(self._header.overruns.items())
            if total > self._stored.get(cpu, 0)
        ]
        records = np.zeros(len(lost), RECORD)
        records["point"] = Point.LOST
        for record, (cpu, count) in zip(records, lost, strict=True):
            record["cpu"], record["a"] = cpu & 0xFFFF, count
        return records
