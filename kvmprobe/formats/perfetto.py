# SPDX-License-Identifier: MIT
"""Writes Perfetto's protobuf: single messages, and many packets of one layout at once.

A trace is a sequence of TracePackets (protos/perfetto/trace/trace_packet.proto).  A protobuf
encoder costs microseconds a packet; here a packet's layout is fixed once, every number in it gets
a fixed width, and numpy fills in a whole batch.  A varint may be longer than it has to be: its
unused groups are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def varint(value: int) -> bytes:
    """Encode a number; a negative one in 64-bit two's complement, as protobuf does."""
    value &= _MASK
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def field(number: int, value: int | str | bytes) -> bytes:
    """Encode one field: a number as a varint, text and messages with their length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode("utf-8", "replace") if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


@dataclass(frozen=True)
class Hole:
    """A varint of a fixed width in bytes (1, 3, 5 or 10) that is filled in for each packet."""

    name: str
    width: int


#: A message's encoded bytes in order, with holes.
Parts = Sequence[bytes | Hole]

#: How a varint of each width is stored: its first bytes as one number, its last byte(s) as another.
_STORED = {1: (0, "u1"), 3: (2, "u1"), 5: (4, "u1"), 10: (8, "<u2")}
_FIRST = {3: "<u2", 5: "<u4", 10: "<u8"}
_CONTINUES = np.uint64(0x8080808080808080)


def number(field_number: int, hole: Hole) -> Parts:
    """A number field whose value is filled in."""
    return [varint(field_number << 3), hole]


def message(field_number: int, parts: Parts) -> Parts:
    """A message field made of `parts`."""
    return [varint(field_number << 3 | 2) + varint(size(parts)), *parts]


def size(parts: Parts) -> int:
    """How many bytes the parts are."""
    return sum(part.width if isinstance(part, Hole) else len(part) for part in parts)


class Template:
    """A run of bytes with holes, written for many events at once."""

    def __init__(self, parts: Parts) -> None:
        """Lay out `parts`; the names of their holes are all different."""
        self.size = size(parts)
        pattern = bytearray()
        self._holes: dict[str, Hole] = {}
        names: list[str] = []
        formats: list[str] = []
        offsets: list[int] = []
        for part in parts:
            if isinstance(part, Hole):
                self._holes[part.name] = part
                at, last = _STORED[part.width]
                if part.width in _FIRST:
                    names.append(f"{part.name}.first")
                    formats.append(_FIRST[part.width])
                    offsets.append(len(pattern))
                names.append(f"{part.name}.last")
                formats.append(last)
                offsets.append(len(pattern) + at)
                pattern += bytes(part.width)
            else:
                pattern += part
        self._pattern = np.frombuffer(bytes(pattern), np.uint8)
        self._dtype = np.dtype(
            {"names": names, "formats": formats, "offsets": offsets, "itemsize": self.size}
        )

    def fill(self, count: int, values: dict[str, NDArray[np.uint64]]) -> NDArray[np.uint8]:
        """Write `count` copies with the holes filled in.

        Args:
            count: how many.
            values: hole's name -> uint64, shape (count,); one that doesn't fit its hole is cut.

        Returns:
            uint8, shape (count, size).

        """
        out = np.empty((count, self.size), np.uint8)
        out[:] = self._pattern
        rows: Any = out.view(self._dtype)[:, 0]
        for name, hole in self._holes.items():
            value = values[name]
            if hole.width == 10:
                rows[f"{name}.first"] = spread(value)
                high = (value >> np.uint64(56)) & np.uint64(0x7F) | np.uint64(0x80)
                rows[f"{name}.last"] = high | (value >> np.uint64(63)) << np.uint64(8)
            else:
                if hole.width in _FIRST:
                    rows[f"{name}.first"] = spread(value).astype(_FIRST[hole.width])
                rows[f"{name}.last"] = (value >> np.uint64(7 * (hole.width - 1))) & np.uint64(0x7F)
        return out


def spread(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The first 8 bytes of a long varint: 56 bits, 7 a byte, each byte marked as not the last."""
    x = value & np.uint64(0x00FFFFFFFFFFFFFF)
    # Halve, three times: 2 groups of 28 bits, 4 of 14, 8 of 7.
    for low, shift in ((0x000000000FFFFFFF, 4), (0x00003FFF00003FFF, 2), (0x007F007F007F007F, 1)):
        mask = np.uint64(low)
        x = (x & mask) | ((x & ~mask) << np.uint64(shift))
    spread_out: NDArray[np.uint64] = x | _CONTINUES
    return spread_out
