# SPDX-License-Identifier: MIT
"""Numbers and characters found in text by eight bytes at a time, for many places at once.

A text is a uint8 array; `words` views it as overlapping little-endian 64-bit words, one a byte.
The lowest byte of a word is the first character.  A "mark" is the bit 0x80 in a byte.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
Places = NDArray[np.int64]

_ONES = np.uint64(0x0101010101010101)
_MARKS = np.uint64(0x8080808080808080)
_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_1, _4, _7, _8, _16, _32, _56, _64 = (np.uint64(n) for n in (1, 4, 7, 8, 16, 32, 56, 64))
_EVEN8 = np.uint64(0x00FF00FF00FF00FF)
_EVEN16 = np.uint64(0x0000FFFF0000FFFF)
_LOW32 = np.uint64(0xFFFFFFFF)
_10, _100, _10000 = np.uint64(10), np.uint64(100), np.uint64(10000)
_POWERS = np.array([10**n for n in range(9)], np.uint64)


def _digits(characters: bytes) -> NDArray[np.uint8]:
    table = np.full(256, 0x80, np.uint8)
    for value, character in enumerate(characters):
        table[character] = value
    return table


_DECIMAL = _digits(b"0123456789")
_HEX = _digits(b"0123456789abcdef")
_HEX[list(b"ABCDEF")] = range(10, 16)


class Numbers(NamedTuple):
    """Numbers read: their values, where they end, and whether there was one that fits 64 bits."""

    value: U64
    end: Places
    good: NDArray[np.bool_]


def words(text: NDArray[np.uint8]) -> U64:
    """View a text as one word a byte; the last 7 bytes begin none."""
    view: U64 = np.ndarray((len(text) - 7,), np.dtype("<u8"), text.data, 0, (1,))
    return view


def _leading(marks: U64) -> U64:
    """How many bytes stand before the first marked one; 8 without a mark."""
    lowest = marks & (~marks + _1)
    return ((((lowest >> _7) - _1) & _ONES) * _ONES) >> _56


def _values(word: U64, table: NDArray[np.uint8]) -> U64:
    found: U64 = table.take(word.view(np.uint8)).view(np.uint64)
    return found


def _hexadecimal(digits: U64, count: U64) -> U64:
    x = (digits & _NIBBLES) << (_64 - (count << np.uint64(3)))
    x = (x << _4 | x >> _8) & _EVEN8
    x = (x << _8 | x >> _16) & _EVEN16
    return (x << _16 | x >> _32) & _LOW32


def _decimal(digits: U64, count: U64) -> U64:
    x = (digits & _NIBBLES) << (_64 - (count << np.uint64(3)))
    x = (x * _10 + (x >> _8)) & _EVEN8
    x = (x * _100 + (x >> _16)) & _EVEN16
    return (x * _10000 + (x >> _32)) & _LOW32


def _number(w: U64, at: Places, table: NDArray[np.uint8], base: int) -> Numbers:
    combine = _hexadecimal if base == 16 else _decimal
    digits = _values(w[at], table)
    count = _leading(digits & _MARKS)
    value = combine(digits, count)
    end = at + count.astype(np.int64)
    good = count != 0
    long = np.flatnonzero(count == _8)
    if len(long):
        digits = _values(w[end[long]], table)
        more = _leading(digits & _MARKS)
        scaled = (
            value[long] << (more << np.uint64(2)) if base == 16 else value[long] * _POWERS[more]
        )
        value[long] = scaled + combine(digits, more)
        end[long] += more.astype(np.int64)
        longest = long[more == _8]
        # Seventeen digits don't fit, or are no number that the kernel prints.
        good[longest] = table[(w[end[longest]] & np.uint64(0xFF)).astype(np.intp)] == 0x80
    return Numbers(value, end, good)


def decimal(w: U64, at: Places) -> Numbers:
    """Read decimal numbers of 1 to 16 digits that begin at `at`."""
    return _number(w, at, _DECIMAL, 10)


def hexadecimal(w: U64, at: Places) -> Numbers:
    """Read hexadecimal numbers of 1 to 16 digits, with or without 0x before them."""
    prefix = (w[at] & np.uint64(0xFFFF)) == np.uint64(0x7830)
    return _number(w, at + 2 * prefix, _HEX, 16)


def decimal_before(w: U64, end: Places) -> Numbers:
    """Read decimal numbers of 1 to 7 digits before `end`; their `end` is where they begin."""
    digits = _values(w[end - 8].byteswap(), _DECIMAL)
    count = _leading(digits & _MARKS)
    # The last digit stands lowest now; in the order read it must stand highest.
    value = _decimal(_keep_low(digits, count).byteswap(), np.full_like(count, 8))
    return Numbers(value, end - count.astype(np.int64), (count != 0) & (count != _8))


def _keep_low(word: U64, count: U64) -> U64:
    """Clear all bytes but the lowest `count`."""
    bits = count << np.uint64(3)
    return np.where(count == _8, word, word & ((_1 << bits) - _1))


def skip(w: U64, at: Places, character: int) -> Places:
    """Go on from `at` over any number of one character."""
    return _run(w, at, np.uint64(character) * _ONES)


def _run(w: U64, at: Places, pattern: np.uint64) -> Places:
    at = at.copy()
    todo: NDArray[np.intp] | slice = slice(None)
    while True:
        x = w[at[todo]] ^ pattern
        count = _leading((((x & ~_MARKS) + ~_MARKS) | x) & _MARKS)
        at[todo] += count.astype(np.int64)
        full = count == _8
        if not full.any():
            return at
        todo = np.flatnonzero(full) if isinstance(todo, slice) else todo[full]


def skip_back(w: U64, end: Places, character: int) -> Places:
    """Go back from `end` over at most 8 of one character; returns the new end."""
    x = w[end - 8].byteswap() ^ (np.uint64(character) * _ONES)
    return end - _leading((((x & ~_MARKS) + ~_MARKS) | x) & _MARKS).astype(np.int64)


def find(w: U64, at: Places, character: int, furthest: int) -> tuple[Places, NDArray[np.bool_]]:
    """Find a character at or after `at`, looking at `furthest` bytes or a few more.

    Returns:
        Where it is, and whether it was found.

    """
    at = at.copy()
    pattern = np.uint64(character) * _ONES
    found = np.zeros(len(at), np.bool_)
    todo: NDArray[np.intp] = np.arange(len(at))
    for _ in range(0, furthest, 8):
        x = w[at[todo]] ^ pattern
        count = _leading((x - _ONES) & ~x & _MARKS)
        at[todo] += count.astype(np.int64)
        full = count == _8
        found[todo[~full]] = True
        todo = todo[full]
        if not len(todo):
            break
    return at, found


def starts_with(w: U64, at: Places, literal: bytes) -> NDArray[np.bool_]:
    """Whether the text at `at` begins with `literal`."""
    good = np.ones(len(at), np.bool_)
    for i in range(0, len(literal), 8):
        part = literal[i : i + 8]
        mask = np.uint64((1 << 8 * len(part)) - 1)
        good &= (w[at + i] & mask) == np.uint64(int.from_bytes(part, "little"))
    return good
