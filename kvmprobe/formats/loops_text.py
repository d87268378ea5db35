# SPDX-License-Identifier: MIT
"""Reads lines one byte after the other: what `lines.parse` does by columns, for numba to compile.

Both give the same records of the same text, tested.  A text ends in 256 newlines, so that nothing
is looked up outside: every step stops at one, or goes on by less than 100 bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.formats import loops_numbers
from kvmprobe.formats.loops_numbers import (
    decimal,
    decimal_before,
    find,
    hex_digit,
    hexadecimal,
    skip_back,
    skip_blanks,
)
from kvmprobe.formats.points import TRACEPOINTS, WITNESSES
from kvmprobe.formats.records import NO_VCPU, Point

#: An int or one of numpy's numbers.
Number = Any

#: What a step of a form does, and where its number goes: the places of _OPS and _INTO.
_OPS = ("literal", "x", "d", "_", "s", "insn", "choice")
_INTO = ("", "a", "b", "c", "vcpu", "note")
_LITERAL, _HEX, _DECIMAL, _BLANKS, _WORD, _INSN, _CHOICE = range(7)
_NOTE = 5
_EMULATE = int(Point.EMULATE)
_NO_VCPU = np.uint64(NO_VCPU)
_0, _U10 = np.uint64(0), np.uint64(10)
_NS = np.uint64(10**9)
_NAME_MAX = 40
_WORD_MAX = 32
_FLAGS_MAX = 16
_NEWLINE, _BLANK, _HASH, _ROUND_OPEN, _ROUND_CLOSE = 10, 32, 35, 40, 41
_MINUS, _DOT, _SLASH, _COLON, _OPEN, _CLOSE = 45, 46, 47, 58, 91, 93
#: Bits of `Counts`: which systems are evidently recorded whole.
SYSTEMS = tuple(WITNESSES)


class Forms(NamedTuple):
    """The tracepoints' names and forms as arrays.

    `names` are those of all events that matter: row (first letter in `letters`, letters, point or
    -1 for a witness, its system's bit, first form, forms), sorted by letters; `by_length` says
    where the names of each length begin.  `forms` are (first step, steps), `steps` (what, into,
    shift, first word, words), `words` (first letter, letters).
    """

    letters: NDArray[np.uint8]
    by_length: NDArray[np.int64]
    names: NDArray[np.int64]
    forms: NDArray[np.int64]
    steps: NDArray[np.int64]
    words: NDArray[np.int64]


class Out(NamedTuple):
    """What the loop fills in: `rows` are RECORDs as 64-bit words.

    `row_line`, `headed` and `other` are line numbers; `comms` (tid, first letter, end) of threads
    that are met for the first time; `counts` how many of each, then events and systems' bits.
    """

    rows: NDArray[np.uint64]
    row_line: NDArray[np.int64]
    headed: NDArray[np.int64]
    other: NDArray[np.int64]
    comms: NDArray[np.int64]
    counts: NDArray[np.int64]


@cache
def forms() -> Forms:
    """Put the tracepoints of `points` into arrays."""
    letters = bytearray()
    names: list[tuple[int, ...]] = []
    forms: list[tuple[int, ...]] = []
    steps: list[tuple[int, ...]] = []
    words: list[tuple[int, ...]] = []

    def add(text: bytes) -> tuple[int, int]:
        letters.extend(text)
        return len(letters) - len(text), len(text)

    for tracepoint in TRACEPOINTS:
        names.append(
            (*add(tracepoint.name.encode()), tracepoint.point, 0, len(forms),
             len(tracepoint.compiled))
        )  # fmt: skip
        for form in tracepoint.compiled:
            forms.append((len(steps), len(form)))
            for op in form:
                steps.append(
                    (_OPS.index(op.what), _INTO.index(op.into), op.shift, len(words), len(op.words))
                )
                words += [add(word) for word in op.words]
    for bit, witnesses in enumerate(WITNESSES.values()):
        names += [(*add(name.encode()), -1, 1 << bit, 0, 0) for name in witnesses]
    names.sort(key=lambda name: name[1])
    lengths = [name[1] for name in names]
    return Forms(
        np.frombuffer(bytes(letters), np.uint8),
        np.searchsorted(lengths, np.arange(_NAME_MAX + 2)),
        np.array(names, np.int64),
        np.array(forms, np.int64),
        np.array(steps, np.int64),
        np.array(words, np.int64),
    )


def starts_with(
    a: NDArray[np.uint8], at: Number, letters: NDArray[np.uint8], word: int, n: int
) -> bool:
    """Whether the text at `at` begins with `n` letters from `word` on."""
    for i in range(n):  # noqa: SIM110 - numba compiles no generators
        if a[at + i] != letters[word + i]:
            return False
    return True


def opcode(a: NDArray[np.uint8], at: Number) -> tuple[Number, bool]:
    """The first four of "xx xx ..." as a little-endian number; there must be one."""
    value = _0
    for i in range(4):
        high, low = hex_digit(int(a[at])), hex_digit(int(a[at + 1]))
        if high < 0 or low < 0 or hex_digit(int(a[at + 2])) >= 0:
            return value, i > 0
        value |= np.uint64(high * 16 + low) << np.uint64(8 * i)
        if a[at + 2] != _BLANK:
            return value, True
        at += 3
    return value, True


def match(a: NDArray[np.uint8], at: Number, f: Forms, form: int, got: NDArray[np.uint64]) -> bool:
    """Match one form at `at`; the numbers read go to `got`, by their place in _INTO."""
    got[:] = _0
    got[4] = _NO_VCPU
    for step in range(f.forms[form, 0], f.forms[form, 0] + f.forms[form, 1]):
        what, into, word = f.steps[step, 0], f.steps[step, 1], f.steps[step, 3]
        value, ok = _0, True
        if what == _LITERAL:
            ok = starts_with(a, at, f.letters, f.words[word, 0], f.words[word, 1])
            at += f.words[word, 1]
        elif what == _HEX:
            value, at, ok = hexadecimal(a, at)
        elif what == _DECIMAL:
            value, at, ok = decimal(a, at)
        elif what == _BLANKS:
            at = skip_blanks(a, at)
        elif what == _WORD:
            at = find(a, at, _BLANK, _WORD_MAX)
            ok = at >= 0
        elif what == _INSN:
            value, ok = opcode(a, at)
        else:
            ok = False
            for i in range(f.steps[step, 4]):
                n = f.words[word + i, 1]
                if n and starts_with(a, at, f.letters, f.words[word + i, 0], n):
                    value = np.uint64(i << f.steps[step, 2])
                    at += n
                    ok = True
                    break
        if not ok:
            return False
        if into == _NOTE:
            got[_NOTE] |= value
        elif into:
            got[into] = value
    got[4] = min(got[4], _NO_VCPU)
    return True


def anchor(a: NDArray[np.uint8], start: int, end: int) -> tuple[int, Any, int]:
    """Find " [CPU] " in a line: the place of the bracket (-1: none), the CPU, the place after."""
    at = start
    if a[start] != _HASH:
        while at < end:
            if a[at] == _OPEN and a[at - 1] == _BLANK:
                cpu, after, good = decimal(a, at + 1)
                if good and a[after] == _CLOSE and after - at >= 4 and cpu < np.uint64(1 << 16):
                    return at, cpu, after + 1
            at += 1
    return -1, _0, 0


def process(a: NDArray[np.uint8], end: int) -> tuple[Number, int]:
    """Read a column "(TGID)" that ends at `end`: the process (0: not known), where it begins."""
    if a[end - 1] != _ROUND_CLOSE:
        return _0, end
    tgid, opened, good = decimal_before(a, end - 1)
    if not good:
        # "(-------)" says that the kernel doesn't know.
        tgid, opened = _0, skip_back(a, end - 1, _MINUS)
    opened = skip_back(a, opened, _BLANK)
    if a[opened - 1] != _ROUND_OPEN:
        return _0, end
    return tgid, skip_back(a, opened - 1, _BLANK)


def moment(a: NDArray[np.uint8], at: Number) -> tuple[Number, int, bool]:
    """Read "FLAGS SECONDS.FRACTION" with or without flags: ns, the end, and whether so."""
    at = skip_blanks(a, at)
    seconds, end, good = decimal(a, at)
    if not good or (a[end] != _DOT and a[end] != _COLON):
        blank = find(a, at, _BLANK, _FLAGS_MAX)
        if blank < 0:
            return _0, at, False
        seconds, end, good = decimal(a, skip_blanks(a, blank))
        if not good:
            return _0, at, False
    if a[end] == _DOT:
        fraction, stop, good = decimal(a, end + 1)
        if good and stop - end - 1 <= 9:
            for _ in range(stop - end - 1, 9):
                fraction *= _U10
            return seconds * _NS + fraction, stop, True
    return seconds, end, True


def named(a: NDArray[np.uint8], at: Number, end: int) -> tuple[int, int]:
    """Find the event's name, without the system before it: its place (-1: none), its end."""
    name = skip_blanks(a, at)
    colon = find(a, name, _COLON, _NAME_MAX)
    if colon >= 0 and a[colon + 1] != _BLANK and a[colon + 1] != _NEWLINE:
        name = colon + 1
        colon = find(a, name, _COLON, _NAME_MAX)
    if colon < 0 or colon > end:
        return -1, 0
    return name, colon


def called(a: NDArray[np.uint8], at: Number, n: int, f: Forms) -> int:
    """The row of the name at `at` in `Forms.names`; -1: not there."""
    for row in range(f.by_length[n], f.by_length[n + 1]):
        if starts_with(a, at, f.letters, f.names[row, 0], n):
            return row
    return -1


def scan(
    a: NDArray[np.uint8], first: int, ends: NDArray[np.int64], known: NDArray[np.bool_], f: Forms,
    out: Out,
) -> None:  # fmt: skip
    """Read all lines of a text.

    Args:
        a: the text, with newlines before and behind it.
        first: where the first line begins.
        ends: where each line's newline is.
        known: by tid, threads met before; is brought up to date.
        f: the tracepoints.
        out: filled in.

    """
    got = np.empty(6, np.uint64)
    rows = headed = other = comms = events = systems = 0
    end = first - 1
    for line in range(len(ends)):
        start, end = end + 1, ends[line]
        tid = tgid = ts = _0
        comm_end = stop = name = colon = 0
        before = a[start]
        at, cpu, after = anchor(a, start, end)
        good = at >= 0
        if good:
            tgid, comm_end = process(a, skip_back(a, at, _BLANK))
            tid, comm_end, good = decimal_before(a, comm_end)
            comm_end -= 1
            before = a[comm_end]
        if good and before == _SLASH:
            number, begin, pair = decimal_before(a, comm_end)
            # Only perf puts a blank before it; in QEMU's names a letter stands there.
            if pair and a[begin - 1] == _BLANK:
                tgid, comm_end, before = number, begin - 1, a[begin - 1]
        if good and (before in (_MINUS, _BLANK)) and comm_end > start:
            ts, stop, good = moment(a, after)
            good = good and a[stop] == _COLON and a[stop + 1] == _BLANK and stop < end
        else:
            good = False
        if good:
            name, colon = named(a, stop + 1, end)
            good = name >= 0
        if not good:
            out.other[other] = line
            other += 1
            continue
        events += 1
        if not known[tid]:
            known[tid] = True
            out.comms[comms, 0], out.comms[comms, 1], out.comms[comms, 2] = tid, start, comm_end
            comms += 1
        row = called(a, name, colon - name, f)
        if row < 0:
            continue
        point = f.names[row, 2]
        if point < 0:
            systems |= f.names[row, 3]
            continue
        text = skip_blanks(a, colon + 1)
        matched = False
        for form in range(f.names[row, 4], f.names[row, 4] + f.names[row, 5]):
            matched = matched or match(a, text, f, form, got)
        if not matched:
            out.headed[headed] = line
            headed += 1
            continue
        note = got[_NOTE]
        if point == _EMULATE:
            note = np.uint64(ends_in_failed(a, end))
        record = out.rows[rows]
        record[0] = ts
        record[1] = tid | tgid << np.uint64(32)
        record[2] = got[4] | cpu << np.uint64(32) | np.uint64(point) << np.uint64(48)
        record[2] |= note << np.uint64(56)
        record[3], record[4], record[5] = got[1], got[2], got[3]
        out.row_line[rows] = line
        rows += 1
    out.counts[0], out.counts[1], out.counts[2], out.counts[3] = rows, headed, other, comms
    out.counts[4], out.counts[5] = events, systems


def ends_in_failed(a: NDArray[np.uint8], end: int) -> bool:
    """Whether a line that ends at `end` says " failed" there."""
    return bool(
        a[end - 7] == _BLANK and a[end - 6] == 102 and a[end - 5] == 97 and a[end - 4] == 105
        and a[end - 3] == 108 and a[end - 2] == 101 and a[end - 1] == 100
    )  # fmt: skip


HELPERS = (
    *loops_numbers.HELPERS, starts_with, opcode, match, anchor, process, moment, named, called,
    ends_in_failed,
)  # fmt: skip
