# SPDX-License-Identifier: MIT
"""Reads binary records one after the other, for numba to compile.

The same as `raw.columns`, `tracedat.decode` and the columns of `perfdata`, with the same records of
the same bytes, tested.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.formats.points import WITNESSES
from kvmprobe.formats.raw import Formats
from kvmprobe.formats.records import NO_VCPU, Point

#: An int or one of numpy's numbers.
Number = Any

#: Kinds of fields: where a number goes, or what is made of it.
_A, _B, _C, _VCPU, _ERRNO, _INSN, _NOTE, _MISSING = range(8)
_SPTE_CHANGED, _SMM = int(Point.SPTE_CHANGED), int(Point.SMM)
_NO_VCPU = np.uint64(NO_VCPU)
_0, _1, _3, _31, _32, _48, _56 = (np.uint64(n) for n in (0, 1, 3, 31, 32, 48, 56))
_LOW32 = np.uint64(0xFFFFFFFF)
_NUMBERS = 1 << 16
SYSTEMS = tuple(WITNESSES)
# Ring-buffer pages: see tracedat
_HEAD = 16
_LENGTH = np.uint64((1 << 27) - 1)
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_TOP = np.uint64(0xF8 << 56)
_5, _27 = np.uint64(5), np.uint64(27)
# perf.data: see perfdata
_SAMPLE = 9
_MAX_FRAMES = np.uint64(1 << 16)


class Layouts(NamedTuple):
    """The tracepoints of a file as arrays.

    `of` says by number which layout a record has (-1: none of ours), `system` the bit of the system
    that it shows to be recorded whole.  `layouts` are (point, first field, fields), `fields` (kind,
    offset, size, shift, offset of the length, its size).
    """

    of: NDArray[np.int16]
    system: NDArray[np.int8]
    layouts: NDArray[np.int64]
    fields: NDArray[np.int64]


class Threads(NamedTuple):
    """Threads whose processes are known, sorted, and their processes."""

    tid: NDArray[np.uint64]
    tgid: NDArray[np.uint64]


def layouts(formats: Formats) -> Layouts:
    """Put the formats of a file into arrays."""
    of, system = np.full(_NUMBERS, -1, np.int16), np.zeros(_NUMBERS, np.int8)
    rows: list[tuple[int, ...]] = []
    fields: list[tuple[int, ...]] = []
    for number, name in formats.witnesses.items():
        if number < _NUMBERS:
            system[number] = 1 << SYSTEMS.index(name)
    for number, layout in formats.layouts.items():
        if number >= _NUMBERS:
            continue
        of[number] = len(rows)
        begin = len(fields)
        for into, name in layout.tracepoint.fields:
            field = layout.fields.get(name)
            if field is None:
                if into != "vcpu":
                    fields.append((_MISSING, 0, 0, 0, -1, 0))
                continue
            kind, shift = _kind(into, name)
            length = layout.fields.get("len") if kind == _INSN else None
            fields.append((kind, *field, shift, *(length or (-1, 0))))
        rows.append((layout.tracepoint.point, begin, len(fields) - begin))
    return Layouts(
        of,
        system,
        np.array(rows, np.int64).reshape(-1, 3),
        np.array(fields, np.int64).reshape(-1, 6),
    )


def _kind(into: str, name: str) -> tuple[int, int]:
    if name == "errno":
        return _ERRNO, 0
    if name == "insn":
        return _INSN, 0
    if into.startswith("note"):
        return _NOTE, int(into.partition("<")[2] or 0)
    return ("a", "b", "c", "vcpu").index(into), 0


def number(a: NDArray[np.uint8], at: Number, size: Number) -> Number:
    """A little-endian number; of more than 8 bytes the first 8."""
    value = _0
    for i in range(min(size, 8)):
        value |= np.uint64(a[at + i]) << np.uint64(8 * i)
    return value


def read(
    a: NDArray[np.uint8],
    at: Number,
    size: Number,
    layout: int,
    f: Layouts,
    record: NDArray[np.uint64],
) -> bool:
    """Read a record of the kernel into words 2 to 5 of `record`; whether it has all fields."""
    vcpu, note = _NO_VCPU, _0
    for i in range(3, 6):
        record[i] = _0
    for i in range(f.layouts[layout, 1], f.layouts[layout, 1] + f.layouts[layout, 2]):
        kind, offset, width = f.fields[i, 0], f.fields[i, 1], f.fields[i, 2]
        if kind == _MISSING or offset + width > size:
            return False
        value = number(a, at + offset, width)
        if kind == _VCPU:
            vcpu = min(value, _NO_VCPU)
        elif kind == _ERRNO:
            note |= np.uint64(value >> _31 != _0)
        elif kind == _NOTE:
            note |= ((value & _3) << np.uint64(f.fields[i, 3])) & np.uint64(0xFF)
        elif kind == _INSN:
            value &= _LOW32
            if f.fields[i, 4] >= 0:
                place = at + f.fields[i, 4] if f.fields[i, 4] < size else at
                length = min(number(a, place, f.fields[i, 5]), np.uint64(4))
                value &= (_1 << (length << _3)) - _1
            record[4] = value
        else:
            record[3 + kind] = value
    point = f.layouts[layout, 0]
    if point in (_SPTE_CHANGED, _SMM):
        note &= _1
    record[2] = vcpu | np.uint64(point) << _48 | note << _56
    return True


def process_of(threads: Threads, tid: Number) -> Number:
    """The process of a thread, 0 where it isn't known."""
    low, high = 0, len(threads.tid)
    while low < high:
        middle = (low + high) // 2
        if threads.tid[middle] < tid:
            low = middle + 1
        else:
            high = middle
    if low < len(threads.tid) and threads.tid[low] == tid:
        return threads.tgid[low]
    return _0


def scan_pages(
    a: NDArray[np.uint8], pages: int, page: int, cpu: int, threads: Threads, f: Layouts,
    rows: NDArray[np.uint64], places: NDArray[np.int64], bad: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> None:  # fmt: skip
    """Read ring-buffer pages (kernel/trace/ring_buffer.c, rb_update_event()).

    Args:
        a: the pages, and 64 bytes more.
        pages: how many.
        page: bytes of each.
        cpu: whose they are.
        threads: the processes of threads.
        f: the tracepoints.
        rows: gets RECORDs as 64-bit words.
        places: gets where the data of each begins.
        bad: gets where pages are damaged.
        counts: gets the number of rows, bad places, records, those too short, and systems' bits.

    """
    n = wrong = events = short = systems = 0
    for base in range(0, pages * page, page):
        ts = number(a, base, 8)
        commit = np.int64(number(a, base + 8, 8) & _LENGTH)
        if commit > page - _HEAD:
            bad[wrong] = base + 8
            wrong += 1
            continue
        at = np.int64(base + _HEAD)
        end = at + commit
        while at + 4 <= end:
            word = number(a, at, 8)
            kind = np.int64(word & _31)
            delta, array = (word & _LOW32) >> _5, word >> _32
            if kind == _TIME_EXTEND:
                ts += delta + (array << _27)
                after = at + 8
            elif kind == _TIME_STAMP:
                ts = (delta + (array << _27)) | (ts & _TOP)
                after = at + 8
            elif kind == _PADDING:
                after = end if delta == _0 else at + 4 + np.int64(array)
            else:
                size = np.int64(array) - 4 if kind == 0 else kind * 4
                data = at + 8 if kind == 0 else at + 4
                after = data + size
                if size >= 8 and after <= end:
                    ts += delta
                    events += 1
                    identifier = np.int64(number(a, data, 2))
                    systems |= f.system[identifier]
                    layout = f.of[identifier]
                    if layout >= 0:
                        record = rows[n]
                        if read(a, data, size, layout, f, record):
                            tid = number(a, data + 4, 4)
                            record[0] = ts
                            record[1] = tid | process_of(threads, tid) << _32
                            record[2] |= np.uint64(cpu) << _32
                            places[n] = data
                            n += 1
                        else:
                            short += 1
                else:
                    after = end + 1
            if after > end:
                bad[wrong] = at
                wrong += 1
                break
            at = after
    counts[0], counts[1], counts[2], counts[3], counts[4] = n, wrong, events, short, systems


def scan_perf(
    a: NDArray[np.uint8], w: NDArray[np.uint64], slots: int, form: NDArray[np.int64],
    ids: NDArray[np.uint64], f: Layouts, rows: NDArray[np.uint64], others: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> Number:  # fmt: skip
    """Read the records of a perf.data.

    Args:
        a: bytes, at least 64 more than there are records.
        w: the same as words.
        slots: words that hold records.
        form: where in a sample its identifier, thread, time, CPU (-1: not there) and the rest
            stand, and whether a call chain precedes the tracepoint's record.
        ids: the samples' identifiers, sorted.
        f: the tracepoints.
        rows: gets RECORDs as 64-bit words.
        others: gets for each record of another kind its word, the rows before it and the newest
            time before it.
        counts: gets the number of rows, others, samples, those not understood, systems' bits and
            the newest time.

    Returns:
        The word after the last whole record; it is damaged where its length says so.

    """
    n = other = samples = short = systems = 0
    newest = _0
    rest = form[4]
    at: Number = 0
    while at < slots:
        head = w[at]
        length = np.int64(head >> _48)
        if length < 8 or length % 8 or at + length // 8 > slots:
            break
        ours = head & _LOW32 == np.uint64(_SAMPLE) and length >= rest + 8
        if ours and form[0] >= 0:
            ours = is_one_of(ids, w[at + form[0] // 8])
        if not ours:
            others[other, 0], others[other, 1], others[other, 2] = at, n, np.int64(newest)
            other += 1
            at += length // 8
            continue
        samples += 1
        ts = w[at + form[2] // 8]
        newest = max(newest, ts)
        begin, end = at * 8, at * 8 + length
        at += length // 8
        data = begin + rest
        if form[5]:
            data += 8 + 8 * np.int64(min(w[data // 8], _MAX_FRAMES))
        if data + 8 > end:
            short += 1
            continue
        size = np.int64(w[data // 8] & _LOW32)
        if size < 8 or data + 4 + size > end:
            short += 1
            continue
        identifier = np.int64(number(a, data + 4, 2))
        systems |= f.system[identifier]
        layout = f.of[identifier]
        if layout < 0:
            continue
        record = rows[n]
        if not read(a, data + 4, size, layout, f, record):
            short += 1
            continue
        who = w[(begin + form[1]) // 8]
        record[0] = ts
        record[1] = who >> _32 | who << _32
        if form[3] >= 0:
            record[2] |= (w[(begin + form[3]) // 8] & np.uint64(0xFFFF)) << _32
        n += 1
    counts[0], counts[1], counts[2], counts[3], counts[4] = n, other, samples, short, systems
    counts[5] = np.int64(newest)
    return at


def is_one_of(ids: NDArray[np.uint64], value: Number) -> bool:
    """Whether `value` is among sorted numbers."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if ids[middle] < value:
            low = middle + 1
        else:
            high = middle
    return bool(low < len(ids) and ids[low] == value)


HELPERS = (number, read, process_of, is_one_of)
