# SPDX-License-Identifier: MIT
"""Numbers and characters found in text one byte after the other, for numba to compile.

What `swar` does for many places at once.  A text ends in 256 newlines: every step stops at one, or
goes on by less than 100 bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: An int or one of numpy's numbers.
Number = Any

_0, _4, _U10 = np.uint64(0), np.uint64(4), np.uint64(10)
_BLANK, _X = 32, 120


def decimal(a: NDArray[np.uint8], at: Number) -> tuple[Number, int, bool]:
    """Read 1 to 16 decimal digits: the value, its end, and whether there was one."""
    value = _0
    end = at
    while end < at + 16:
        digit = int(a[end]) - 48
        if digit < 0 or digit > 9:
            break
        value = value * _U10 + np.uint64(digit)
        end += 1
    good = end > at and not (end == at + 16 and 48 <= a[end] <= 57)
    return value, end, good


def hex_digit(character: int) -> int:
    """The value of a hexadecimal digit, -1 for anything else."""
    if 48 <= character <= 57:
        return character - 48
    if 97 <= character <= 102:
        return character - 87
    if 65 <= character <= 70:
        return character - 55
    return -1


def hexadecimal(a: NDArray[np.uint8], at: Number) -> tuple[Number, int, bool]:
    """Read 1 to 16 hexadecimal digits, with or without 0x before them."""
    if a[at] == 48 and a[at + 1] == _X:
        at += 2
    value = _0
    end = at
    while end < at + 16:
        digit = hex_digit(int(a[end]))
        if digit < 0:
            break
        value = value << _4 | np.uint64(digit)
        end += 1
    return value, end, end > at and not (end == at + 16 and hex_digit(int(a[end])) >= 0)


def decimal_before(a: NDArray[np.uint8], end: int) -> tuple[Number, int, bool]:
    """Read 1 to 7 decimal digits that end at `end`: the value, where they begin, whether so."""
    value, scale = _0, np.uint64(1)
    at = end
    while at > end - 8:
        digit = int(a[at - 1]) - 48
        if digit < 0 or digit > 9:
            break
        value += scale * np.uint64(digit)
        scale *= _U10
        at -= 1
    return value, at, end - 8 < at < end


def skip_back(a: NDArray[np.uint8], end: int, character: int) -> int:
    """Go back from `end` over at most 8 of one character."""
    at = end
    while at > end - 8 and a[at - 1] == character:
        at -= 1
    return at


def skip_blanks(a: NDArray[np.uint8], at: Number) -> Number:
    """Go on over blanks."""
    while a[at] == _BLANK:
        at += 1
    return at


def find(a: NDArray[np.uint8], at: Number, character: int, furthest: int) -> Number:
    """Find a character within `furthest` bytes; -1: not there."""
    for i in range(at, at + furthest):
        if a[i] == character:
            return i
    return -1


HELPERS = (decimal, hex_digit, hexadecimal, decimal_before, skip_back, skip_blanks, find)
