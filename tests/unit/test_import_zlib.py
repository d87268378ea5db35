# SPDX-License-Identifier: MIT
"""A trace.dat compressed with zlib: a real one, of zstd, packed anew.

Debian's trace-cmd is built without zlib, so none can be recorded where the tests run.
"""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from kvmprobe.errors import CaptureError
from kvmprobe.formats.detect import detect
from kvmprobe.formats.tracedat_header import chunks, read_header, uncompressed
from tests.traces import SLOTS, events_of, path_of, translated

_DONE, _BUFFER, _HEADER_INFO, _EVENT_FORMATS, _CMDLINES = 0, 3, 16, 18, 21
_ALGORITHM = 18  # after the magic, the version, the byte order, sizes of long and page


def _body(data: bytes, at: int) -> tuple[int, bytes]:
    """A section's number and what it holds."""
    number, flags, _, size = struct.unpack_from("<HHIQ", data, at)
    if not flags & 1:
        return number, data[at + 16 : at + 16 + size]
    packed, whole = struct.unpack_from("<II", data, at + 16)
    return number, uncompressed(b"zstd", data[at + 24 : at + 24 + packed], whole, at)


def _chunk(body: bytes) -> bytes:
    packed = zlib.compress(body)
    return struct.pack("<II", len(packed), len(body)) + packed


def _with_zlib(data: bytes) -> bytes:
    """A trace.dat of version 7 as trace-cmd writes it with --compression zlib."""
    _, version, rest = data[_ALGORITHM:].split(b"\0", 2)
    assert data[_ALGORITHM:].startswith(b"zstd\0")
    (place,) = struct.unpack_from("<Q", rest)
    header = read_header(io.BytesIO(data))
    out = bytearray(data[:_ALGORITHM] + b"zlib\0" + version + b"\0" + bytes(8))
    start = len(out)

    def section(number: int, body: bytes) -> int:
        at = len(out)
        packed = _chunk(body)
        out.extend(struct.pack("<HHIQ", number, 1, 0, len(packed)) + packed)
        return at

    options = bytearray()
    while place:
        _, told = _body(data, place)
        at = place = 0
        while at < len(told):
            option, size = struct.unpack_from("<HI", told, at)
            value, at = told[at + 6 : at + 6 + size], at + 6 + size
            if option == _DONE:
                (place,) = struct.unpack("<Q", value)
                break
            if option in (_HEADER_INFO, _EVENT_FORMATS, _CMDLINES):
                value = struct.pack("<Q", section(*_body(data, *struct.unpack("<Q", value))))
            elif option == _BUFFER:
                names = value[8:-4].split(b"\0", 2)
                head = b"\0".join(names[:2]) + b"\0" + struct.pack("<I", header.cpus[0].page)
                begin = len(out)
                out.extend(struct.pack("<HHIQ", option, 1, 0, 0))
                value = struct.pack("<Q", begin) + head + struct.pack("<I", len(header.cpus))
                for cpu in header.cpus:
                    packed = [_chunk(c) for _, c in chunks(io.BytesIO(data), header, cpu, 1 << 20)]
                    body = struct.pack("<I", len(packed)) + b"".join(packed)
                    value += struct.pack("<IQQ", cpu.cpu, len(out), len(body))
                    out.extend(body)
            options += struct.pack("<HI", option, len(value)) + value
    options += struct.pack("<HIQ", _DONE, 8, 0)
    out[start - 8 : start] = struct.pack("<Q", section(0, bytes(options)))
    return bytes(out)


def test_the_same_events() -> None:
    data = _with_zlib(lzma.decompress(path_of("intel-6.1", "trace.dat").read_bytes()))
    source = detect(Path("trace"), io.BufferedReader(io.BytesIO(data)))
    with source.file:
        events, tally = translated(source, SLOTS)
    assert not tally.unknown
    np.testing.assert_array_equal(events, events_of("intel-6.1", "trace.dat"))


def test_damage_is_named() -> None:
    data = bytearray(_with_zlib(lzma.decompress(path_of("intel-6.1", "trace.dat").read_bytes())))
    at = data.index(b"\x78\x9c") + 40  # inside the first packed section
    data[at : at + 8] = bytes(8)
    with pytest.raises(CaptureError, match="compressed data at byte"):
        read_header(io.BytesIO(data))
