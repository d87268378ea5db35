# SPDX-License-Identifier: MIT
"""The header of a trace.dat: tracepoint formats, task names, and where each CPU's pages are."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from kvmprobe.errors import CaptureError
from kvmprobe.formats.raw import (
    Cursor,
    Formats,
    read_formats,
    read_ftrace_formats,
    read_page_header,
)

MAGIC = b"\x17\x08\x44tracing"
#: More than any file has; what a damaged size may ask for at most.
_MAX_SECTION = 64 << 20
#: What is read at first of a header that doesn't say its size: the pages follow it.
_PIECE = 1 << 20
_MAX_CHUNK = 16 << 20
_MAX_CPUS = 8192
_MAX_OPTIONS = 1 << 16
_COMPRESSED = 1
# Options, by number
_DONE, _CPUSTAT, _BUFFER, _UNAME = 0, 2, 3, 5
_HEADER_INFO, _EVENT_FORMATS, _CMDLINES, _TGIDS = 16, 18, 21, 23


@dataclass
class CpuData:
    """Where the pages of one CPU are; `compressed`: in chunks."""

    cpu: int
    offset: int
    size: int
    page: int
    compressed: bool


@dataclass
class Header:
    """What is needed to read the pages."""

    algorithm: bytes = b"none"
    formats: Formats = field(default_factory=Formats)
    cpus: list[CpuData] = field(default_factory=list)
    comms: dict[int, bytes] = field(default_factory=dict)
    tgids: dict[int, int] = field(default_factory=dict)
    overruns: dict[int, int] = field(default_factory=dict)  # by CPU
    kernel: str | None = None


class _File:
    """A seekable file of known size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = file.seek(0, 2)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; raises CaptureError when they aren't there."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CaptureError(
                f"the file ends at byte {self.size}, but names {size} bytes at {offset}"
            )
        self._file.seek(offset)
        return self._file.read(size)

    def cursor(self, offset: int) -> Cursor:
        """Read on from `offset`, as far as a header can go."""
        end = min(self.size, offset + _MAX_SECTION)

        def more(at: int, size: int) -> bytes:
            return self.read(at, max(0, min(size, end - at)))

        return Cursor(more(offset, _PIECE), offset, more)


def uncompressed(algorithm: bytes, data: bytes, size: int, offset: int) -> bytes:
    """Decompress exactly `size` bytes; raises CaptureError that names `offset`."""
    if size > _MAX_SECTION:
        raise CaptureError(f"a size of {size} at byte {offset}: damaged")
    try:
        if algorithm == b"zstd":
            import pyarrow as pa

            out: bytes = pa.Codec("zstd").decompress(data, size, asbytes=True)
        elif algorithm == b"zlib":
            out = zlib.decompressobj().decompress(data, size)
        else:
            raise CaptureError(f"compressed with {algorithm!r}, which is neither zstd nor zlib")
    except (OSError, ValueError, zlib.error):
        raise CaptureError(f"compressed data at byte {offset} is damaged") from None
    if len(out) != size:
        raise CaptureError(f"compressed data at byte {offset} is shorter than it says")
    return out


def read_header(stream: BinaryIO) -> Header:
    """Read the header of a trace.dat; raises CaptureError that names the offset."""
    file = _File(stream)
    cursor = file.cursor(0)
    cursor.expect(MAGIC)
    version = cursor.string(16)
    if version not in (b"6", b"7"):
        raise CaptureError(f"a trace.dat of version {version!r}; 6 and 7 are read")
    if cursor.number(1) != 0:
        raise CaptureError("a trace.dat of a big-endian machine, which has no KVM/x86")
    if cursor.number(1) != 8:
        raise CaptureError("a trace.dat of a 32-bit machine")
    page = _page_size(cursor)
    header = Header()
    if version == b"6":
        _read_6(file, cursor, page, header)
    else:
        _read_7(file, cursor, header)
    header.cpus = [data for data in header.cpus if data.size]
    return header


def _page_size(cursor: Cursor) -> int:
    offset = cursor.offset
    page = cursor.number(4)
    if not 256 <= page <= 1 << 20 or page & (page - 1):
        raise CaptureError(f"a page size of {page} at byte {offset}: damaged")
    return page


def _count(cursor: Cursor, most: int) -> int:
    offset = cursor.offset
    count = cursor.number(4)
    if count > most:
        raise CaptureError(f"a count of {count} at byte {offset}: damaged")
    return count


def _read_6(file: _File, cursor: Cursor, page: int, header: Header) -> None:
    read_page_header(cursor)
    read_ftrace_formats(cursor)
    header.formats = read_formats(cursor)
    cursor.sized(4, _MAX_SECTION)  # kallsyms
    cursor.sized(4, _MAX_SECTION)  # printk formats
    _comms(header, cursor.sized(8, _MAX_SECTION))
    cpus = _count(cursor, _MAX_CPUS)
    kind = cursor.take(10)
    instances = []
    if kind == b"options  \0":
        while option := cursor.number(2):
            data = Cursor(cursor.sized(4, _MAX_SECTION), cursor.offset)
            if option == _BUFFER:
                instances.append(data.number(8))
            else:
                _option(header, option, data)
        kind = cursor.take(10)
    _flyrecord_6(cursor, kind, cpus, page, header)
    for offset in instances:
        more = file.cursor(offset)
        _flyrecord_6(more, more.take(10), cpus, page, header)


def _flyrecord_6(cursor: Cursor, kind: bytes, cpus: int, page: int, header: Header) -> None:
    if kind != b"flyrecord\0":
        raise CaptureError(
            f"no flyrecord data at byte {cursor.offset - 10} but {kind!r}: damaged, or a trace of "
            "a latency tracer, which holds text; convert it with trace-cmd report"
        )
    for cpu in range(cpus):
        header.cpus.append(CpuData(cpu, cursor.number(8), cursor.number(8), page, False))


def _read_7(file: _File, cursor: Cursor, header: Header) -> None:
    header.algorithm = cursor.string(64)
    cursor.string(64)
    offset = cursor.number(8)
    seen: set[int] = set()
    sections: dict[int, int] = {}
    while offset:
        if offset in seen or len(seen) > _MAX_OPTIONS:
            raise CaptureError(f"the options at byte {offset} lead back to themselves: damaged")
        seen.add(offset)
        options = _section(file, header, offset, 0)
        offset = 0
        for option, data in _options_7(options):
            if option == _DONE:
                offset = data.number(8)
            elif option == _BUFFER:
                _buffer_7(file, data, header)
            elif option in (_HEADER_INFO, _EVENT_FORMATS, _CMDLINES):
                sections[option] = data.number(8)
            else:
                _option(header, option, data)
    for option in (_HEADER_INFO, _EVENT_FORMATS):
        if option not in sections:
            raise CaptureError("the file's options name no tracepoint formats: damaged")
    read_page_header(_section(file, header, sections[_HEADER_INFO], _HEADER_INFO))
    header.formats = read_formats(_section(file, header, sections[_EVENT_FORMATS], _EVENT_FORMATS))
    if _CMDLINES in sections:
        section = _section(file, header, sections[_CMDLINES], _CMDLINES)
        _comms(header, section.sized(8, _MAX_SECTION))


def _options_7(cursor: Cursor) -> Iterator[tuple[int, Cursor]]:
    option = -1
    while option != _DONE:
        option = cursor.number(2)
        data = cursor.sized(4, _MAX_SECTION)
        yield option, Cursor(data, cursor.offset - len(data))


def _section_head(file: _File, offset: int, wanted: int | None) -> tuple[int, int]:
    """Read a section's head: its flags and its size."""
    head = Cursor(file.read(offset, 16), offset)
    number, flags = head.number(2), head.number(2)
    head.number(4)
    if wanted is not None and number != wanted:
        raise CaptureError(f"section {number} at byte {offset}, where {wanted} should be")
    return flags, head.number(8)


def _section(file: _File, header: Header, offset: int, wanted: int) -> Cursor:
    flags, size = _section_head(file, offset, wanted)
    if size > _MAX_SECTION:
        raise CaptureError(f"a section of {size} bytes at byte {offset}: damaged")
    data = file.read(offset + 16, size)
    if flags & _COMPRESSED:
        packed = Cursor(data, offset + 16)
        compressed, whole = packed.number(4), packed.number(4)
        data = uncompressed(header.algorithm, packed.take(compressed), whole, offset)
    return Cursor(data, offset + 16)


def _buffer_7(file: _File, option: Cursor, header: Header) -> None:
    offset = option.number(8)
    option.string()
    option.string()
    page = _page_size(option)
    flags, _ = _section_head(file, offset, None)
    for _ in range(_count(option, _MAX_CPUS)):
        cpu, at, size = option.number(4), option.number(8), option.number(8)
        header.cpus.append(CpuData(cpu & 0xFFFF, at, size, page, bool(flags & _COMPRESSED)))
    if len(header.cpus) > _MAX_CPUS:
        raise CaptureError(f"more than {_MAX_CPUS} CPUs: damaged")


def _option(header: Header, option: int, cursor: Cursor) -> None:
    data = cursor.take(cursor.left)
    if option == _CPUSTAT:
        cpu = re.search(rb"CPU:\s*(\d{1,5})", data)
        lost = re.findall(rb"^(?:overrun|dropped events):\s*(\d{1,18})", data, re.M)
        if cpu is not None:
            header.overruns[int(cpu[1])] = sum(map(int, lost))
    elif option == _UNAME:
        words = data.rstrip(b"\0").decode("latin-1").split()
        header.kernel = words[2] if len(words) > 2 else None
    elif option == _TGIDS:
        for line in data.split(b"\n"):
            if m := re.match(rb"(\d{1,8}) (\d{1,8})", line):
                header.tgids[int(m[1])] = int(m[2])


def _comms(header: Header, text: bytes) -> None:
    for line in text.split(b"\n"):
        tid, _, comm = line.partition(b" ")
        if tid.isdigit() and len(tid) < 9:
            header.comms[int(tid)] = comm.strip()[:16]


def chunks(
    stream: BinaryIO, header: Header, data: CpuData, want: int
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset in the file, whole pages) of one CPU, about `want` bytes at a time.

    Raises CaptureError when the file ends before, or a chunk is damaged.
    """
    file = _File(stream)
    if not data.compressed:
        step = max(1, want // data.page) * data.page
        for at in range(data.offset, data.offset + data.size, step):
            size = min(step, data.offset + data.size - at)
            whole = min(size, max(0, file.size - at)) // data.page * data.page
            if whole:
                yield at, file.read(at, whole)
            if whole < size:
                # Sizes are rounded to pages; a tail that is no page holds none.
                if at + whole >= file.size:
                    raise CaptureError(f"the file ends at byte {file.size}, inside CPU {data.cpu}")
                return
        return
    at = data.offset
    count = Cursor(file.read(at, 4), at).number(4)
    at += 4
    for _ in range(count):
        head = Cursor(file.read(at, 8), at)
        compressed, size = head.number(4), head.number(4)
        if size > _MAX_CHUNK or size % data.page:
            raise CaptureError(f"a chunk of {size} bytes at byte {at}: damaged")
        packed = file.read(at + 8, compressed)
        yield at, uncompressed(header.algorithm, packed, size, at)
        at += 8 + compressed
