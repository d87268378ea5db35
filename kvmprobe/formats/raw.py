# SPDX-License-Identifier: MIT
"""Binary records of tracepoints, as trace.dat and perf.data hold them.

Both carry the kernel's own description of each tracepoint (events/SYSTEM/NAME/format), so no layout
is known beforehand: fields are found by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from io import BufferedReader
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.formats import swar
from kvmprobe.formats.points import BY_NAME, WITNESSES, Tracepoint
from kvmprobe.formats.records import NO_VCPU, RECORD, Point

#: No format of a tracepoint, and no list of them, is longer.
MAX_FORMAT = 1 << 20
_NAME = re.compile(rb"^name: (\S+)\s*\nID: (\d{1,5})\s*\n")


@cache
def _field(name: str) -> re.Pattern[bytes]:
    """The line of a format that describes a field."""
    return re.compile(rb"[ *]%s(?:\[\d*\])?;\toffset:(\d{1,5});\tsize:(\d{1,5});" % name.encode())


class Field(NamedTuple):
    """Where a field stands in a record, in bytes."""

    offset: int
    size: int


class Layout(NamedTuple):
    """A tracepoint's record: which of ours it is, and the fields that are read, by name."""

    tracepoint: Tracepoint
    fields: dict[str, Field]


class Formats:
    """The tracepoints of a file, by the number that its records begin with."""

    def __init__(self) -> None:
        """Start with none."""
        self.layouts: dict[int, Layout] = {}
        #: The system that is recorded whole if a record of this number occurs.
        self.witnesses: dict[int, str] = {}

    def add(self, text: bytes) -> None:
        """Take in the description of one tracepoint; of others than KVM's nothing is kept."""
        if told := described(text):
            number, system, layout = told
            if system is not None:
                self.witnesses[number] = system
            if layout is not None:
                self.layouts[number] = layout


def described(text: bytes) -> tuple[int, str | None, Layout | None] | None:
    """Read a tracepoint's description: its number, the system it is a witness of, its layout."""
    m = _NAME.match(text)
    if m is None:
        return None
    name, number = m[1].decode("latin-1"), int(m[2])
    system = next((system for system, names in WITNESSES.items() if name in names), None)
    tracepoint = BY_NAME.get(name)
    if tracepoint is None:
        return number, system, None
    head = text.partition(b"\nprint fmt:")[0]
    fields = {}
    for field in (*(field for _, field in tracepoint.fields), "len"):
        if m := _field(field).search(head):
            fields[field] = Field(int(m[1]), int(m[2]))
    return number, system, Layout(tracepoint, fields)


class Samples(NamedTuple):
    """Binary records in a buffer that goes on for 64 bytes after the last of them."""

    words: swar.U64
    at: NDArray[np.int64]  # where each begins
    size: NDArray[np.int64]
    ts: NDArray[np.uint64]
    tid: NDArray[Any]
    tgid: NDArray[Any]
    cpu: NDArray[Any]


def columns(
    samples: Samples, formats: Formats, systems: set[str]
) -> tuple[NDArray[Any], NDArray[np.int64], list[int]]:
    """Turn binary records of KVM's tracepoints into RECORDs; `systems` gets those recorded whole.

    Returns:
        The records, the index of the sample that each is of, and the indices of samples that are
        too short for their own format or lack a field.

    """
    ids = (samples.words[samples.at] & np.uint64(0xFFFF)).astype(np.int64)
    present = np.flatnonzero(np.bincount(ids, minlength=1))
    parts: list[NDArray[Any]] = []
    indices: list[NDArray[np.int64]] = []
    bad: list[int] = []
    for number in present.tolist():
        if number in formats.witnesses:
            systems.add(formats.witnesses[number])
        layout = formats.layouts.get(number)
        if layout is None:
            continue
        rows = np.flatnonzero(ids == number)
        part, good = _read(samples, rows, layout)
        parts.append(part[good])
        indices.append(rows[good])
        bad += rows[~good].tolist()
    if not parts:
        return np.empty(0, RECORD), np.empty(0, np.int64), bad
    index = np.concatenate(indices)
    order = np.argsort(index, kind="stable")
    return np.concatenate(parts)[order], index[order], bad


def _read(
    samples: Samples, rows: NDArray[np.int64], layout: Layout
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    records = np.zeros(len(rows), RECORD)
    for name in ("ts", "tid", "tgid", "cpu"):
        records[name] = getattr(samples, name)[rows]
    records["vcpu"] = NO_VCPU
    records["point"] = layout.tracepoint.point
    good = np.ones(len(rows), np.bool_)
    at, size = samples.at[rows], samples.size[rows]
    for into, name in layout.tracepoint.fields:
        field = layout.fields.get(name)
        if field is None:
            if into != "vcpu":
                good[:] = False
            continue
        whole = field.offset + field.size <= size
        good &= whole
        value = _value(samples.words, np.where(whole, at + field.offset, at), field.size)
        if into == "vcpu":
            records["vcpu"] = np.minimum(value, np.uint64(NO_VCPU))
        elif name == "errno":
            records["note"] |= (value >> np.uint64(31)) != 0
        elif name == "insn":
            records["b"] = _first_bytes(value, samples, at, size, layout.fields.get("len"))
        elif into.startswith("note"):
            shift = np.uint64(into.partition("<")[2] or 0)
            records["note"] |= ((value & np.uint64(3)) << shift).astype(np.uint8)
        else:
            records[into] = value
    if layout.tracepoint.point in (Point.SPTE_CHANGED, Point.SMM):
        records["note"] &= 1
    return records, good


def _value(words: swar.U64, at: NDArray[np.int64], size: int) -> swar.U64:
    """The first 1, 2, 4 or 8 bytes of a field; of longer ones 8."""
    value = words[at]
    return value if size >= 8 else value & np.uint64((1 << 8 * size) - 1)


def _first_bytes(
    value: swar.U64,
    samples: Samples,
    at: NDArray[np.int64],
    size: NDArray[np.int64],
    length: Field | None,
) -> swar.U64:
    """The opcode's first four bytes, as far as the instruction goes."""
    value = value & np.uint64(0xFFFFFFFF)
    if length is None:
        return value
    n = _value(samples.words, np.where(length.offset < size, at + length.offset, at), length.size)
    mask = (np.uint64(1) << (np.minimum(n, np.uint64(4)) << np.uint64(3))) - np.uint64(1)
    return value & mask


def read_into(file: BinaryIO, buffer: NDArray[np.uint8]) -> int:
    """Fill a buffer from a file; returns how many bytes there were."""
    return cast(BufferedReader, file).readinto(buffer.data)


def _no_more(_at: int, _size: int) -> bytes:
    return b""


class Cursor:
    """Reads little-endian fields of a file's header one after the other, within bounds."""

    def __init__(
        self, data: bytes, offset: int = 0, more: Callable[[int, int], bytes] = _no_more
    ) -> None:
        """Read `data`, which stands at `offset` of the file.

        `more` is asked for what follows it when that is needed: bytes from a place of the file on,
        so many or as many as there are.
        """
        self._data = data
        self._base = offset
        self._more = more
        self.at = 0

    def _want(self, size: int) -> None:
        """See to it that `size` bytes are there, if the file has them."""
        missing = self.at + size - len(self._data)
        if missing > 0:
            # As much again, so that a long header is not copied many times.
            wanted = max(missing, len(self._data))
            self._data += self._more(self._base + len(self._data), wanted)

    @property
    def offset(self) -> int:
        """The place in the file."""
        return self._base + self.at

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self.at

    def take(self, size: int) -> bytes:
        """The next `size` bytes; raises CaptureError when there are fewer."""
        self._want(size)
        if size < 0 or self.at + size > len(self._data):
            raise CaptureError(f"the file ends inside its header, at byte {self.offset}")
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, size: int) -> int:
        """The next unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def string(self, longest: int = 4096) -> bytes:
        """The next bytes up to a zero byte, which is taken too."""
        self._want(longest)
        end = self._data.find(b"\0", self.at, self.at + longest)
        if end < 0:
            raise CaptureError(f"a text without an end at byte {self.offset}")
        return self.take(end + 1 - self.at)[:-1]

    def expect(self, text: bytes) -> None:
        """Take `text`; raises CaptureError when something else stands there."""
        offset = self.offset
        if self.take(len(text)) != text:
            raise CaptureError(f"no {text!r} at byte {offset}: damaged, or not of this format")

    def sized(self, bytes_of_size: int, longest: int = MAX_FORMAT) -> bytes:
        """A size and so many bytes."""
        offset = self.offset
        size = self.number(bytes_of_size)
        if size > longest:
            raise CaptureError(f"a size of {size} at byte {offset}: damaged")
        return self.take(size)


def read_page_header(cursor: Cursor) -> None:
    """Read "header_page" and "header_event"; pages must be those of a 64-bit kernel."""
    cursor.expect(b"header_page\0")
    offset = cursor.offset
    page = cursor.sized(8)
    cursor.expect(b"header_event\0")
    cursor.sized(8)
    if re.search(rb"commit;\s*offset:8;\s*size:8;", page) is None:
        raise CaptureError(f"not a trace of a 64-bit kernel (header_page at byte {offset})")


def read_ftrace_formats(cursor: Cursor) -> None:
    """Skip the formats of ftrace's own events."""
    for _ in range(cursor.number(4)):
        cursor.sized(8)


def read_formats(cursor: Cursor) -> Formats:
    """Read the tracepoints' formats, system by system."""
    formats = Formats()
    for _ in range(cursor.number(4)):
        cursor.string()
        for _ in range(cursor.number(4)):
            formats.add(cursor.sized(8))
    return formats
