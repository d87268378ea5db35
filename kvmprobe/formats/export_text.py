# SPDX-License-Identifier: MIT
"""Events as lines of text: CSV and NDJSON, made a batch at a time by numpy.

A line is laid out once with room for the longest text of each cell, numpy fills in all lines, and
the bytes that were not needed, which are null, are taken out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kvmprobe import __version__
from kvmprobe.probes.schema import (
    NO_VCPU,
    Columns,
    FaultinResult,
    FaultResult,
    Flag,
    LifecycleChange,
    MemslotChange,
    MmioType,
    Site,
    SpteChange,
    Type,
)

#: The names of what NDJSON's header line and CSV's first line announce.
SCHEMA = "kvmprobe.events/1"
COLUMNS = (
    "ns", "vm", "vcpu", "seq", "observation", "site", "level", "flags", "addr", "value", "gen",
    "aux", "slot", "kind", "kind_name", "len",
)  # fmt: skip

#: Lines made at once: their bytes should stay in the processor's cache.
_ROWS = 1 << 13
_KINDS = {
    Type.FAULT: FaultResult,
    Type.FAULTIN: FaultinResult,
    Type.MMIO: MmioType,
    Type.SPTE: SpteChange,
    Type.MEMSLOT: MemslotChange,
    Type.LIFECYCLE: LifecycleChange,
    Type.LOSS: Type,
}


@cache
def _numbers() -> NDArray[np.bytes_]:
    """The numbers of 16 bits as text."""
    return np.arange(1 << 16).astype("S5")


#: What a line is joined of: constant bytes, or one array with an element of fixed size a line.
_Part = bytes | NDArray[Any]


def _texts(texts: Sequence[str]) -> NDArray[np.bytes_]:
    """Texts to be looked up by their number."""
    return np.array([text.encode() for text in texts], "S")


def _groups(base: int, width: int, code: str) -> NDArray[np.uint32]:
    """Four digits each: with zeros in front, and `base` later without (the digits not first)."""
    full = [format(n, f"0{width}{code}") for n in range(base)]
    first = [text.lstrip("0").rjust(width, "\0") for text in full]
    return np.array([text.encode() for text in (*full, *first)], f"S{width}").view("<u4")


_DECIMAL = _groups(10**4, 4, "d")
_HEXADECIMAL = _groups(1 << 16, 4, "x")
_ZERO = np.frombuffer(b"\0\0\x000", "<u4")[0]


def _decimal(values: NDArray[Any], groups: int) -> list[_Part]:
    """Numbers that are not negative and have at most 4 * `groups` digits."""
    rest = values.astype(np.uint64)
    base = np.uint64(10**4)
    found = []
    for _ in range(groups - 1):
        quotient = rest // base
        found.append(rest - quotient * base)
        rest = quotient
    return _digits([rest, *reversed(found)], _DECIMAL)


def _hexadecimal(values: NDArray[np.uint64]) -> list[_Part]:
    groups = [(values >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (48, 32, 16, 0)]
    return _digits(groups, _HEXADECIMAL)


def _digits(groups: Sequence[NDArray[Any]], table: NDArray[np.uint32]) -> list[_Part]:
    """Groups of four digits, the highest first, without the zeros in front of the number."""
    first = np.full(len(groups[0]), len(table) // 2, np.intp)
    parts: list[_Part] = []
    for group in groups:
        parts.append(table[group.astype(np.intp) + first])
        first[group != 0] = 0
    parts[-1] = np.where(parts[-1] == 0, _ZERO, parts[-1])
    return parts


def _join(rows: int, parts: Iterable[_Part]) -> bytes:
    """Lines made of their parts; null bytes fill up a text shorter than its place, and go."""
    pattern = bytearray()
    arrays: list[NDArray[Any]] = []
    offsets: list[int] = []
    for part in parts:
        if isinstance(part, bytes):
            pattern += part
        else:
            arrays.append(part)
            offsets.append(len(pattern))
            pattern += bytes(part.itemsize)
    out = np.empty((rows, len(pattern)), np.uint8)
    out[:] = np.frombuffer(bytes(pattern), np.uint8)
    layout: Any = {
        "names": [str(n) for n in range(len(arrays))],
        "formats": [array.dtype for array in arrays],
        "offsets": offsets,
        "itemsize": len(pattern),
    }
    fields: Any = out.view(np.dtype(layout))[:, 0]
    for n, array in enumerate(arrays):
        fields[str(n)] = array
    return out.tobytes().translate(None, b"\0")


def _kind_names(text: Callable[[str], str], nothing: str) -> list[str]:
    names = [nothing] * (max(Type) + 1 << 8)
    for kind, enum in _KINDS.items():
        for member in enum:
            names[kind << 8 | member] = text(member.name)
    return names


class TextWriter:
    """Writes batches as lines; `CsvWriter` and `NdjsonWriter` say how a line looks."""

    #: What begins and ends a name, and what is written where there is nothing.
    quote = ""
    nothing = ""

    def __init__(self, file: BinaryIO, header: Mapping[str, Any]) -> None:
        """Write what stands before the events."""
        self._file = file
        # Times before the start are negative, as in the document of an analysis.
        self._start = np.uint64(header["clock"]["monotonic_ns"] or 0)
        self._types = _texts(self._members(Type))
        self._sites = _texts(self._members(Site))
        self._kinds = _texts(_kind_names(self._name, self.nothing))
        self._levels = _texts([self._name(text) for text in ("unknown", "L1", "L2")])
        self._vcpus = _texts([self.nothing])[np.zeros(1 << 16, np.intp)].astype("S5")
        self._vcpus[:NO_VCPU] = _numbers()[:NO_VCPU]
        self._sign = _texts(["", "-"])
        file.write(self.head(header))

    def head(self, header: Mapping[str, Any]) -> bytes:
        """What stands before the events."""
        raise NotImplementedError

    def flags(self, names: Sequence[str]) -> str:
        """An event's flags as one cell."""
        raise NotImplementedError

    def line(self, cells: Mapping[str, list[_Part]]) -> list[_Part]:
        """Put an event's cells together; each is made of one piece or more."""
        raise NotImplementedError

    def write(self, columns: Columns) -> int:
        """Write one batch; returns how many events it has."""
        rows = len(columns["ts"])
        used = np.unique(columns["flags"])
        flags = _texts([self.flags([f.name or "" for f in Flag if n & f]) for n in used.tolist()])
        for start in range(0, rows, _ROWS):
            part = {name: values[start : start + _ROWS] for name, values in columns.items()}
            cells = self._cells(part)
            cells["flags"] = [flags[np.searchsorted(used, part["flags"])]]
            self._file.write(_join(len(part["ts"]), self.line(cells)))
        return rows

    def close(self) -> None:
        """Nothing stands behind the events."""

    def _name(self, text: str) -> str:
        return f"{self.quote}{text}{self.quote}"

    def _members(self, enum: type[Type] | type[Site]) -> list[str]:
        prefix = enum.__name__.lower()
        known = {int(member): member.name for member in enum}
        return [self._name(known.get(n, f"{prefix}-{n}")) for n in range(256)]

    def _cells(self, columns: Columns) -> dict[str, list[_Part]]:
        ns = (columns["ts"] - self._start).view(np.int64)
        flags, slot = columns["flags"], columns["slot"]
        known = (flags & np.uint32(Flag.LEVEL_KNOWN)) != 0
        level = np.where(known, np.where(flags & np.uint32(Flag.L2), 2, 1), 0)
        kind = columns["type"].astype(np.intp) << 8 | columns["kind"]
        quote = self.quote.encode()
        return {
            "ns": [self._sign[(ns < 0).view(np.uint8)], *_decimal(np.abs(ns).view(np.uint64), 5)],
            "vm": _decimal(columns["vm"], 3),
            "vcpu": [self._vcpus[columns["vcpu"]]],
            "seq": _decimal(columns["seq"], 3),
            "observation": [self._types[columns["type"]]],
            "site": [self._sites[columns["site"]]],
            "level": [self._levels[level]],
            **{
                name: [quote + b"0x", *_hexadecimal(columns[name]), quote]
                for name in ("addr", "value", "gen")
            },
            "aux": _decimal(columns["aux"], 3),
            "slot": [
                self._sign[(slot < 0).view(np.uint8)],
                _numbers()[np.abs(slot.astype(np.int32))],
            ],
            "kind": [_numbers()[columns["kind"]]],
            "kind_name": [self._kinds[kind]],
            "len": [_numbers()[columns["len"]]],
        }


class CsvWriter(TextWriter):
    """One line with the columns' names, then one an event; no field needs quotes."""

    def head(self, header: Mapping[str, Any]) -> bytes:  # noqa: ARG002 - CSV has no place for it
        """The columns' names."""
        return ",".join(COLUMNS).encode() + b"\n"

    def flags(self, names: Sequence[str]) -> str:
        """Flags with a bar between them."""
        return "|".join(names)

    def line(self, cells: Mapping[str, list[_Part]]) -> list[_Part]:
        """Cells with commas between them."""
        line: list[_Part] = []
        for name in COLUMNS:
            line += [*cells[name], b","]
        return [*line[:-1], b"\n"]


class NdjsonWriter(TextWriter):
    """One line with the capture's header, then one JSON object an event."""

    quote = '"'
    nothing = "null"

    def head(self, header: Mapping[str, Any]) -> bytes:
        """The header line."""
        tool = {"name": "kvmprobe", "version": __version__}
        line = {"schema": SCHEMA, "tool": tool, "capture": header}
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"

    def flags(self, names: Sequence[str]) -> str:
        """A list of names."""
        return "[" + ",".join(f'"{name}"' for name in names) + "]"

    def line(self, cells: Mapping[str, list[_Part]]) -> list[_Part]:
        """An object."""
        line: list[_Part] = []
        for n, name in enumerate(COLUMNS):
            line += [f'{"," if n else "{"}"{name}":'.encode(), *cells[name]]
        return [*line, b"}\n"]
