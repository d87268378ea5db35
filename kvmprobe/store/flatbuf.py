# SPDX-License-Identifier: MIT
"""Reads Arrow's message metadata from untrusted bytes.

Captures come from other people.  Arrow's own reader trusts the sizes a file claims, so a capture's
messages are read here: every access is checked against the bytes that are there, and nothing is
allocated by a claimed size.  Only what a capture holds is understood: a schema of integer columns
without nulls, and record batches of lz4 buffers.

The tables and their slots are those of Arrow's format/Message.fbs and format/Schema.fbs.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass

from kvmprobe.store.format import KEY, KEY_CRC

_U8 = struct.Struct("<B")
_I16 = struct.Struct("<h")
_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_PAIR = struct.Struct("<qq")

_VERSION_5 = 4
_SCHEMA, _RECORD_BATCH = 1, 3
_TYPE_INT = 2
_LZ4_FRAME = 0

# Many offsets may point at one string: these keep the work on a message in proportion to its size.
_MAX_TABLES = 256
_MAX_NAME = 64
_KEYS = (KEY, KEY_CRC)


class MalformedError(ValueError):
    """The bytes are not what they should be."""


@dataclass(frozen=True)
class SchemaMessage:
    """A stream's schema: (name, numpy type code) of each column, and the metadata."""

    columns: tuple[tuple[str, str], ...]
    metadata: dict[bytes, bytes]


@dataclass(frozen=True)
class BatchMessage:
    """A record batch: rows, (offset, length) of each column's buffer in the body, metadata."""

    rows: int
    buffers: tuple[tuple[int, int], ...]
    body_length: int
    metadata: dict[bytes, bytes]


def read_schema(data: bytes) -> SchemaMessage:
    """Read the metadata of a schema message; raises MalformedError."""
    message = _message(data, _SCHEMA)
    if message.scalar(3, _I64) != 0:
        raise MalformedError("the schema has a body")
    schema = message.table(2)
    if schema.scalar(0, _I16) != 0:
        raise MalformedError("the columns are big-endian")
    columns = tuple(_column(field) for field in schema.tables(1))
    return SchemaMessage(columns, _metadata(schema, 2))


def read_batch(data: bytes) -> BatchMessage:
    """Read the metadata of a record batch and check it in itself; raises MalformedError."""
    message = _message(data, _RECORD_BATCH)
    batch = message.table(2)
    rows = batch.scalar(0, _I64)
    for length, nulls in batch.pairs(1):
        if length != rows or nulls:
            raise MalformedError("a column has nulls or another length than its batch")
    if batch.table(3).scalar(0, _U8) != _LZ4_FRAME:
        raise MalformedError("the batch is not compressed by lz4")
    body_length = message.scalar(3, _I64)
    end = 0
    for offset, length in batch.pairs(2):
        if offset < 0 or length < 0:
            raise MalformedError("a buffer has a negative size")
        end = max(end, offset + length)
    if body_length != -(-end // 8) * 8:
        raise MalformedError("the buffers don't fill the body")
    # Two buffers a column: the bitmap of nulls, which is empty, and the values.
    return BatchMessage(rows, batch.pairs(2)[1::2], body_length, _metadata(message, 4))


def _message(data: bytes, kind: int) -> _Table:
    table = _Table(data, _take(_U32, data, 0))
    if table.scalar(0, _I16) != _VERSION_5:
        raise MalformedError("no message of Arrow's format version 5")
    if table.scalar(1, _U8) != kind:
        raise MalformedError("a message of another kind")
    return table


def _column(field: _Table) -> tuple[str, str]:
    name = field.string(0, _MAX_NAME)
    if not name.isascii() or field.scalar(1, _U8) or field.has(4):
        raise MalformedError("a column may be null, or is dictionary-encoded")
    integer = field.table(3)
    bits = integer.scalar(0, _I32)
    if field.scalar(2, _U8) != _TYPE_INT or bits not in (8, 16, 32, 64):
        raise MalformedError("a column does not hold integers")
    return name.decode(), f"{'i' if integer.scalar(1, _U8) else 'u'}{bits // 8}"


def _metadata(table: _Table, slot: int) -> dict[bytes, bytes]:
    pairs = ((pair.string(0, _MAX_NAME), pair) for pair in table.tables(slot))
    return {key: pair.string(1) for key, pair in pairs if key in _KEYS}


def _take(what: struct.Struct, data: bytes, at: int) -> int:
    if not 0 <= at <= len(data) - what.size:
        raise MalformedError("an offset points outside")
    return int(what.unpack_from(data, at)[0])


class _Table:
    """A flatbuffers table: its vtable says where, if at all, each slot is."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._vtable = at - _take(_I32, data, at)
        self._vtable_size = _take(_U16, data, self._vtable)

    def _slot(self, slot: int) -> int | None:
        entry = 4 + 2 * slot
        if entry + 2 > self._vtable_size:
            return None
        offset = _take(_U16, self._data, self._vtable + entry)
        return self._at + offset if offset else None

    def has(self, slot: int) -> bool:
        return self._slot(slot) is not None

    def scalar(self, slot: int, what: struct.Struct) -> int:
        at = self._slot(slot)
        return 0 if at is None else _take(what, self._data, at)

    def _follow(self, slot: int) -> int:
        at = self._slot(slot)
        if at is None:
            raise MalformedError("a part is missing")
        return at + _take(_U32, self._data, at)

    def table(self, slot: int) -> _Table:
        return _Table(self._data, self._follow(slot))

    def _vector(self, slot: int, size: int) -> tuple[int, int]:
        """Start and end of a vector whose elements have `size` bytes; empty when not there."""
        if not self.has(slot):
            return 0, 0
        at = self._follow(slot)
        start, end = at + 4, at + 4 + _take(_U32, self._data, at) * size
        if end > len(self._data):
            raise MalformedError("a vector is longer than its message")
        return start, end

    def string(self, slot: int, longest: int = sys.maxsize) -> bytes:
        start, end = self._vector(slot, 1)
        if end - start > longest:
            raise MalformedError("a name is too long")
        return self._data[start:end]

    def pairs(self, slot: int) -> tuple[tuple[int, int], ...]:
        start, end = self._vector(slot, _PAIR.size)
        return tuple(_PAIR.iter_unpack(self._data[start:end]))

    def tables(self, slot: int) -> list[_Table]:
        start, end = self._vector(slot, 4)
        if end - start > 4 * _MAX_TABLES:
            raise MalformedError("too many columns or entries of metadata")
        return [_Table(self._data, at + _take(_U32, self._data, at)) for at in range(start, end, 4)]
