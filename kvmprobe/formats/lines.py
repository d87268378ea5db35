# SPDX-License-Identifier: MIT
"""Lines of a trace as text, many at once, without a step per line.

Four tools print a line an event.  They agree on the middle, from which both ends are read:

    TASK-TID    (TGID) [CPU] FLAGS SECONDS.FRACTION: EVENT: ...          ftrace; columns vary
    TASK-TID    [CPU] SECONDS.FRACTION: EVENT: ...                       trace-cmd report
    TASK  TGID/TID [CPU] SECONDS.FRACTION: SYSTEM:EVENT: ...             perf script

A task's name holds what it likes: QEMU's is "CPU 1/KVM".  So it ends where the number before
"[CPU]" begins.  A time without a fraction is a count of the trace's clock.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.formats import swar
from kvmprobe.formats.points import TRACEPOINTS, WITNESSES, Op, Tracepoint
from kvmprobe.formats.records import NO_VCPU, RECORD, Block, Point

#: Bytes around a text, so that nothing is looked up outside.
PAD = 256
#: Thread numbers have at most 7 digits.
TIDS = 10**7
_NAME_MAX = 40
_NS = np.array([10**n for n in range(9, -1, -1)], np.uint64)

_NEWLINE, _BLANK, _COLON = b"\n "[0], b" "[0], b":"[0]
_OPEN, _CLOSE, _ROUND_OPEN, _ROUND_CLOSE = b"["[0], b"]"[0], b"("[0], b")"[0]
_MINUS, _SLASH, _DOT, _HASH = b"-"[0], b"/"[0], b"."[0], b"#"[0]


class Text(NamedTuple):
    """Whole lines in a padded array; `start` and `end` of each line, its newline not counted."""

    characters: NDArray[np.uint8]
    words: swar.U64
    start: swar.Places
    end: swar.Places

    def line(self, number: int) -> bytes:
        """One line."""
        return self.characters[self.start[number] : self.end[number]].tobytes()


class Parsed(NamedTuple):
    """What a text holds: the records, and the numbers of lines that are something else.

    `record_lines` are the line numbers of the records; `headed` lines that have the form of an
    event but whose text was not understood; `other` all lines without that form; `systems` the
    trace systems that the text shows were recorded whole.
    """

    block: Block
    record_lines: swar.Places
    headed: swar.Places
    other: swar.Places
    events: int
    systems: set[str]


def text_of(padded: NDArray[np.uint8]) -> Text:
    """Take whole lines, each with its newline, between two times PAD newlines."""
    end = np.flatnonzero(padded[PAD:-PAD] == _NEWLINE) + PAD
    start = np.empty_like(end)
    if len(end):
        start[0] = PAD
        start[1:] = end[:-1] + 1
    return Text(padded, swar.words(padded), start, end)


class _Head(NamedTuple):
    """What was read of the heads of lines: which line, and its parts."""

    line: swar.Places
    comm_end: swar.Places
    tid: swar.U64
    tgid: swar.U64
    cpu: swar.U64
    ts: swar.U64
    name: swar.Places
    length: swar.Places

    def rows(self, chosen: swar.Places) -> _Head:
        """Some of the heads."""
        columns: tuple[Any, ...] = self
        return _Head(*(column[chosen] for column in columns))


def _anchors(text: Text) -> tuple[swar.Places, swar.Places, swar.U64, swar.Places]:
    """Find " [CPU] " in lines: the line, the place of the bracket, the CPU, the place after."""
    a, w = text.characters, text.words
    at = np.flatnonzero(a[PAD:-PAD] == _OPEN) + PAD
    at = at[a[at - 1] == _BLANK]
    cpu = swar.decimal(w, at + 1)
    good = cpu.good & (a[cpu.end] == _CLOSE) & (cpu.end - at >= 4) & (cpu.value < 1 << 16)
    at, number, after = at[good], cpu.value[good], cpu.end[good] + 1
    line = np.searchsorted(text.end, at)
    good = a[text.start[line]] != _HASH
    good[1:] &= line[1:] != line[:-1]
    return line[good], at[good], number[good], after[good]


def _heads(text: Text) -> _Head:
    a, w = text.characters, text.words
    line, at, cpu, after = _anchors(text)
    end = swar.skip_back(w, at, _BLANK)
    tgid = np.zeros(len(at), np.uint64)
    bracket = np.flatnonzero(a[end - 1] == _ROUND_CLOSE)
    if len(bracket):
        close = end[bracket] - 1
        number = swar.decimal_before(w, close)
        tgid[bracket] = np.where(number.good, number.value, np.uint64(0))
        # "(-------)" says that the kernel doesn't know.
        opened = np.where(number.good, number.end, swar.skip_back(w, close, _MINUS))
        opened = swar.skip_back(w, opened, _BLANK)
        known = a[opened - 1] == _ROUND_OPEN
        end[bracket] = np.where(known, swar.skip_back(w, opened - 1, _BLANK), end[bracket])
    tid = swar.decimal_before(w, end)
    before = a[tid.end - 1]
    comm_end = tid.end - 1
    pair = np.flatnonzero((before == _SLASH) & tid.good)
    if len(pair):
        number = swar.decimal_before(w, comm_end[pair])
        # Only perf puts a blank before it; in QEMU's names a letter stands there.
        mine = number.good & (a[number.end - 1] == _BLANK)
        tgid[pair[mine]] = number.value[mine]
        comm_end[pair[mine]] = number.end[mine] - 1
        before = before.copy()
        before[pair[mine]] = _BLANK
    good = tid.good & ((before == _MINUS) | (before == _BLANK)) & (comm_end > text.start[line])
    ts_at = swar.skip(w, after, _BLANK)
    seconds = swar.decimal(w, ts_at)
    flags = np.flatnonzero(~_is_time(a, seconds))
    if len(flags):
        blank, found = swar.find(w, ts_at[flags], _BLANK, 16)
        good[flags] &= found
        again = swar.decimal(w, swar.skip(w, np.where(found, blank, ts_at[flags]), _BLANK))
        for column, new in zip(seconds, again, strict=True):
            column[flags] = new
    good &= seconds.good
    ts, stop = _nanoseconds(text, seconds)
    good &= (a[stop] == _COLON) & (a[stop + 1] == _BLANK)
    good &= stop < text.end[line]
    keep = np.flatnonzero(good)
    head = _Head(line, comm_end, tid.value, tgid, cpu, ts, stop + 1, stop).rows(keep)
    return _named(text, head)


def _is_time(a: NDArray[np.uint8], number: swar.Numbers) -> NDArray[np.bool_]:
    after = a[number.end]
    time: NDArray[np.bool_] = number.good & ((after == _DOT) | (after == _COLON))
    return time


def _nanoseconds(text: Text, seconds: swar.Numbers) -> tuple[swar.U64, swar.Places]:
    """Turn "s.f" into ns; returns where each ends.  A number without a fraction is left alone."""
    fraction = swar.decimal(text.words, seconds.end + 1)
    digits = fraction.end - seconds.end - 1
    dotted = (text.characters[seconds.end] == _DOT) & fraction.good & (digits <= 9)
    ns = seconds.value * _NS[0] + fraction.value * _NS[np.where(dotted, digits, 0)]
    return np.where(dotted, ns, seconds.value), np.where(dotted, fraction.end, seconds.end)


def _named(text: Text, head: _Head) -> _Head:
    """Find the event's name, without the system that perf prints before it."""
    a, w = text.characters, text.words
    name = swar.skip(w, head.name, _BLANK)
    colon, found = swar.find(w, name, _COLON, _NAME_MAX)
    system = np.flatnonzero(found & (a[colon + 1] != _BLANK) & (a[colon + 1] != _NEWLINE))
    if len(system):
        name[system] = colon[system] + 1
        colon[system], found[system] = swar.find(w, name[system], _COLON, _NAME_MAX)
    good = found & (colon <= text.end[head.line])
    return head._replace(name=name, length=colon - name).rows(np.flatnonzero(good))


class _Names:
    """The names of a text's events, to be told apart by length and last eight letters."""

    def __init__(self, text: Text, heads: _Head) -> None:
        self._words = text.words
        self._heads = heads
        self._ending = text.words[heads.name + heads.length - 8]

    def called(self, name: str) -> swar.Places:
        """Which of the heads are of the event `name`."""
        same = self._heads.length == len(name)
        if len(name) >= 8:
            same &= self._ending == np.uint64(int.from_bytes(name[-8:].encode(), "little"))
        rows = np.flatnonzero(same)
        if not len(rows):
            return rows
        return rows[swar.starts_with(self._words, self._heads.name[rows], name.encode())]


def parse(text: Text, known: NDArray[np.bool_], systems: set[str]) -> Parsed:
    """Read all lines of a text.

    Args:
        text: whole lines.
        known: by tid, threads whose names were told before; is brought up to date.
        systems: trace systems that needn't be looked for any more.

    """
    heads = _heads(text)
    records = np.zeros(len(heads.line), RECORD)
    for name in ("ts", "tid", "tgid", "cpu"):
        records[name] = getattr(heads, name)
    records["vcpu"] = NO_VCPU
    good = np.zeros(len(records), np.bool_)
    ours = np.zeros(len(records), np.bool_)
    names = _Names(text, heads)
    for tracepoint in TRACEPOINTS:
        rows = names.called(tracepoint.name)
        if len(rows):
            ours[rows] = True
            records["point"][rows] = tracepoint.point
            _payload(text, tracepoint, heads, rows, records, good)
    other = np.ones(len(text.start), np.bool_)
    other[heads.line] = False
    return Parsed(
        Block(records[good], _comms(text, heads, known)),
        heads.line[good],
        heads.line[ours & ~good],
        np.flatnonzero(other),
        len(heads.line),
        {
            system
            for system, witnesses in WITNESSES.items()
            if system not in systems and any(len(names.called(name)) for name in witnesses)
        },
    )


def _comms(text: Text, heads: _Head, known: NDArray[np.bool_]) -> dict[int, bytes]:
    """Task names of the threads that aren't known yet."""
    new = np.flatnonzero(~known[heads.tid])
    tids, first = np.unique(heads.tid[new], return_index=True)
    known[tids] = True
    return {
        tid: text.characters[text.start[heads.line[i]] : heads.comm_end[i]].tobytes().strip()[:16]
        for tid, i in zip(tids.tolist(), new[first].tolist(), strict=True)
    }


def _payload(
    text: Text,
    tracepoint: Tracepoint,
    heads: _Head,
    rows: swar.Places,
    records: NDArray[Any],
    good: NDArray[np.bool_],
) -> None:
    """Read what stands after the names of `rows` into `records`; marks those that are `good`."""
    if tracepoint.point == Point.EMULATE:
        end = text.end[heads.line[rows]]
        records["note"][rows] = swar.starts_with(text.words, end - 7, b" failed")
    start = swar.skip(text.words, heads.name[rows] + heads.length[rows] + 1, _BLANK)
    for form in tracepoint.compiled:
        matched = _match(text, form, start, rows, records)
        good[rows[matched]] = True
        if matched.all():
            break
        rows, start = rows[~matched], start[~matched]


def _match(
    text: Text,
    form: tuple[Op, ...],
    at: swar.Places,
    rows: swar.Places,
    records: NDArray[Any],
) -> NDArray[np.bool_]:
    """Match one form at `at` and fill in `records[rows]`; returns which of the rows matched."""
    w = text.words
    place = np.arange(len(rows))
    values: list[tuple[str, swar.U64, swar.Places]] = []
    for op in form:
        ok: NDArray[np.bool_] | None = None
        value: swar.U64 | None = None
        if op.what == "literal":
            ok = swar.starts_with(w, at, op.words[0])
            at = at + len(op.words[0])
        elif op.what in "xd":
            number = (swar.hexadecimal if op.what == "x" else swar.decimal)(w, at)
            value, at, ok = number
        elif op.what == "_":
            at = swar.skip(w, at, _BLANK)
        elif op.what == "s":
            at, ok = swar.find(w, at, _BLANK, 32)
        elif op.what == "insn":
            value, ok = _opcode(text, at)
        else:
            value, at, ok = _choice(w, at, op)
        if value is not None and op.into:
            values.append((op.into, value, place))
        if ok is not None and not ok.all():
            at, place = at[ok], place[ok]
    matched = np.zeros(len(rows), np.bool_)
    matched[place] = True
    for into, value, of in values:
        if len(of) != len(place):
            value = value[matched[of]]
        target = rows[place]
        if into == "note":
            records["note"][target] |= value.astype(np.uint8)
        elif into == "vcpu":
            records["vcpu"][target] = np.minimum(value, np.uint64(NO_VCPU))
        else:
            records[into][target] = value
    return matched


def _choice(
    w: swar.U64, at: swar.Places, op: Op
) -> tuple[swar.U64, swar.Places, NDArray[np.bool_]]:
    value = np.zeros(len(at), np.uint64)
    ok = np.zeros(len(at), np.bool_)
    end = at.copy()
    for number, word in enumerate(op.words):
        if not word:
            continue
        here = ~ok & swar.starts_with(w, at, word)
        value[here] = number << op.shift
        end[here] += len(word)
        ok |= here
    return value, end, ok


def _opcode(text: Text, at: swar.Places) -> tuple[swar.U64, NDArray[np.bool_]]:
    """The first four of "xx xx ..." as a little-endian number; there must be one."""
    value = np.zeros(len(at), np.uint64)
    more = np.ones(len(at), np.bool_)
    for i in range(4):
        byte = swar.hexadecimal(text.words, at + 3 * i)
        more &= byte.good & (byte.end == at + 3 * i + 2)
        if i == 0:
            first = more.copy()
        value |= np.where(more, byte.value << np.uint64(8 * i), np.uint64(0))
        more &= text.characters[at + 3 * i + 2] == _BLANK
    return value, first
