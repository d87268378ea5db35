# SPDX-License-Identifier: MIT
"""Reads text: ftrace's `trace` and `trace_pipe`, and what `trace-cmd report` prints.

Losses stand in it in three ways: "CPU:1 [LOST 17 EVENTS]" where they happened, "[17 EVENTS
DROPPED]" in trace-cmd's words, and the header's entries-in-buffer/entries-written, whose
difference was overwritten before the text begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from mmap import mmap
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.formats import lines
from kvmprobe.formats.records import RECORD, SHOWN, Block, Point, Tally

BLOCK = 2 << 20
_PIECE = 256 << 10
#: Longer lines are no trace; they are skipped, so that none can fill the memory.
LONGEST_LINE = 64 << 10
#: A lost record's CPU where the text doesn't say.
ANY_CPU = 0xFFFF

_LOST = re.compile(rb"\s*CPU:\s*(\d{1,5}) \[(?:LOST )?(?:(\d{1,18}) )?EVENTS(?: DROPPED)?\]")
_ENTRIES = re.compile(rb"# entries-in-buffer/entries-written: (\d{1,18})/(\d{1,18})")
_PERF_LOST = re.compile(rb".*\[(\d{3,5})\] .*PERF_RECORD_LOST(?:_SAMPLES)?:? lost (\d{1,18})")


#: `lines.parse`, or the same compiled.
Parse = Callable[[lines.Text, NDArray[np.bool_], set[str]], lines.Parsed]


class Readable(Protocol):
    """Anything with a `read` that may give fewer bytes than asked for, and b"" at the end."""

    def read(self, size: int, /) -> bytes:
        """The next bytes."""


_QUIET = re.compile(rb"\s*$|#|CPU \d+ is empty|cpus=\d+|version = \d+|\S+:$")


class TextReader:
    """Reads a text trace from a stream, in blocks of bounded size."""

    def __init__(self, stream: Readable, tally: Tally, parse: Parse = lines.parse) -> None:
        """Read from `stream`; what is met is counted in `tally`."""
        self._stream = stream
        self._tally = tally
        self._parse = parse
        # Of the kernel, which gives memory as it is touched: malloc might fill it with zeros.
        self._known = np.frombuffer(mmap(-1, lines.TIDS), np.bool_)
        self._last_ts = 0
        self._buffer = bytearray(BLOCK + 2 * lines.PAD)
        self._buffer[: lines.PAD] = b"\n" * lines.PAD
        self._skipping = False  # a line that is too long
        self._failure: CaptureError | None = None

    def __iter__(self) -> Iterator[Block]:
        """Yield the records; raises CaptureError when the stream can't be read on."""
        rest = b""  # the beginning of a line whose end was not read yet
        while (end := self._fill(rest)) > lines.PAD + len(rest):
            cut = self._buffer.rfind(b"\n", lines.PAD, end) + 1 or lines.PAD
            rest = bytes(self._buffer[cut:end])
            if len(rest) > LONGEST_LINE:
                self._tally.not_understood(1, [rest[:160]])
                rest, self._skipping = b"", True
            if cut > lines.PAD:
                yield self._block(cut)
        if self._failure is not None:
            raise self._failure
        if rest:
            # What it lacks may be digits of a number.
            self._tally.not_understood(1, [rest[:160]])

    def _fill(self, rest: bytes) -> int:
        """Put `rest` and what follows it into the buffer; returns where it ends."""
        end = lines.PAD + len(rest)
        self._buffer[lines.PAD : end] = rest
        while end < lines.PAD + BLOCK and self._failure is None:
            try:
                data = self._stream.read(min(_PIECE, lines.PAD + BLOCK - end))
            except CaptureError as error:
                # What was read before it is given first.
                self._failure = error
                break
            if not data:
                break
            if self._skipping:
                newline = data.find(b"\n")
                self._skipping = newline < 0
                data = b"" if newline < 0 else data[newline + 1 :]
            self._buffer[end : end + len(data)] = data
            end += len(data)
        return end

    def _block(self, end: int) -> Block:
        """Read the whole lines before `end`."""
        tally = self._tally
        self._buffer[end : end + lines.PAD] = b"\n" * lines.PAD
        text = lines.text_of(np.frombuffer(self._buffer, np.uint8, end + lines.PAD))
        parsed = self._parse(text, self._known, tally.systems)
        tally.systems |= parsed.systems
        tally.read += parsed.events
        tally.not_understood(
            len(parsed.headed),
            [text.line(n)[:160] for n in parsed.headed[:SHOWN].tolist()],
            ours=True,
        )
        block = parsed.block
        lost = self._others(text, parsed.other)
        if lost:
            marks = np.zeros(len(lost), RECORD)
            at = np.searchsorted(parsed.record_lines, [line for line, _, _ in lost])
            for mark, (_, cpu, count), place in zip(marks, lost, at.tolist(), strict=True):
                mark["point"], mark["cpu"], mark["a"] = Point.LOST, min(cpu, ANY_CPU), count
                mark["ts"] = block.records["ts"][place - 1] if place else self._last_ts
            block = Block(np.insert(block.records, at, marks), block.comms)
        if len(block.records):
            self._last_ts = int(block.records["ts"][-1])
        tally.took(block.records)
        return block

    def _others(self, text: lines.Text, numbers: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Look at lines that are no events: returns losses as (line, CPU, records)."""
        lost = []
        unknown = 0
        first: list[bytes] = []
        for number in numbers.tolist():
            line = text.line(number)
            if m := _LOST.match(line):
                lost.append((number, int(m[1]), int(m[2] or 1)))
            elif m := _ENTRIES.match(line):
                if int(m[2]) > int(m[1]):
                    lost.append((number, ANY_CPU, int(m[2]) - int(m[1])))
            elif m := _PERF_LOST.match(line):
                lost.append((number, int(m[1]), int(m[2])))
            elif not _QUIET.match(line):
                unknown += 1
                if len(first) < SHOWN:
                    first.append(line[:160])
        self._tally.not_understood(unknown, first)
        return lost
