# SPDX-License-Identifier: MIT
"""The loops of `loops_text`, `loops_binary` and `loops_events`, compiled, for large traces.

Each takes the place of a step that is otherwise done by columns, and gives the same.  Loading them
takes about a second, compiling them for the first time many: small traces do without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.jit import available, cache_directory, compiled
from kvmprobe.formats import lines, loops_binary, loops_events, loops_text, raw
from kvmprobe.formats.identity import Births
from kvmprobe.formats.records import RECORD, Block
from kvmprobe.formats.slots import Slot
from kvmprobe.formats.translate import Translator
from kvmprobe.probes.schema import EVENT

#: Bytes of traces from which on it pays to load the loops, and to compile them to be thrown away.
_LARGE, _HUGE = 64 << 20, 2 << 30
_SHORTEST_LINE = 16  # of a line that gives a record


class Loops(NamedTuple):
    """The compiled functions."""

    text: Callable[..., None]
    pages: Callable[..., None]
    perf: Callable[..., int]
    events: Callable[..., tuple[int, int]]


@cache
def loops() -> Loops:
    """Compile the loops, or load what was compiled earlier; call it only where `available()`."""
    here = Path(__file__).parent
    binary = loops_binary.HELPERS
    return Loops(
        compiled(loops_text.scan, loops_text.HELPERS, here),
        compiled(loops_binary.scan_pages, binary, here),
        compiled(loops_binary.scan_perf, binary, here),
        compiled(loops_events.translate, loops_events.HELPERS, here),
    )


def loops_for(size: int) -> Loops | None:
    """The loops, if they pay for a trace of `size` bytes."""
    if size < _LARGE or not available():
        return None
    if size < _HUGE and cache_directory(Path(__file__).parent) is None:
        return None
    return loops()


def _systems(bits: int, names: tuple[str, ...]) -> set[str]:
    return {name for bit, name in enumerate(names) if bits >> bit & 1}


class TextLoop:
    """`lines.parse`, compiled."""

    def __init__(self, loops: Loops) -> None:
        """Prepare the tracepoints' forms."""
        self._scan = loops.text
        self._forms = loops_text.forms()
        self._out = _out(0, 0)

    def __call__(
        self, text: lines.Text, known: NDArray[np.bool_], systems: set[str]
    ) -> lines.Parsed:
        """Read all lines of a text; as `lines.parse`.

        The line numbers are good until the next call.
        """
        most = len(text.characters) // _SHORTEST_LINE + 1
        out = self._out
        if most > len(out.rows) or len(text.end) > len(out.other):
            out = self._out = _out(most, 2 * len(text.end))
        self._scan(text.characters, lines.PAD, text.end, known, self._forms, out)
        rows, headed, other, comms, events, bits = out.counts.tolist()
        names = {
            tid: text.characters[start:end].tobytes().strip()[:16]
            for tid, start, end in out.comms[:comms].tolist()
        }
        return lines.Parsed(
            Block(_records(out.rows[:rows]), names),
            out.row_line[:rows], out.headed[:headed], out.other[:other], events,
            _systems(bits, loops_text.SYSTEMS) - systems,
        )  # fmt: skip


def _out(most: int, lines_: int) -> loops_text.Out:
    """Room for what is found in so many records and lines."""
    return loops_text.Out(
        _rows(most), np.empty(most, np.int64),
        np.empty(lines_, np.int64), np.empty(lines_, np.int64), np.empty((lines_, 3), np.int64),
        np.zeros(6, np.int64),
    )  # fmt: skip


def _rows(most: int) -> NDArray[np.uint64]:
    """Room for so many RECORDs as words; memory that is not touched costs nothing."""
    return np.empty((most, loops_events.RECORD_WORDS), np.uint64)


def _records(rows: NDArray[np.uint64]) -> NDArray[Any]:
    """Words as RECORDs, in memory of their own size."""
    return rows.copy().view(RECORD).reshape(-1)


class PagesLoop:
    """`tracedat.decode` and `raw.columns`, compiled."""

    def __init__(self, loops: Loops, formats: raw.Formats, tgids: dict[int, int]) -> None:
        """Prepare the tracepoints' layouts, and the processes of threads."""
        self._scan = loops.pages
        self._layouts = loops_binary.layouts(formats)
        self._rows, self._places = _rows(0), np.empty(0, np.int64)
        tids = sorted(tgids)
        self._threads = loops_binary.Threads(
            np.array(tids, np.uint64), np.array([tgids[tid] for tid in tids], np.uint64)
        )

    def __call__(
        self, padded: NDArray[np.uint8], pages: int, page: int, cpu: int, systems: set[str]
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64], int, int]:
        """Read pages: the records, where their data begin, damaged places, events, those too short.

        `systems` gets those recorded whole.
        """
        # The shortest event that is read: 4 bytes and 8 of data.
        most = pages * page // 12 + 1
        if most > len(self._rows):
            self._rows = _rows(most)
            self._places = np.empty(most, np.int64)
        rows, places = self._rows, self._places
        bad, counts = np.empty(pages + 1, np.int64), np.zeros(5, np.int64)
        self._scan(
            padded, pages, page, cpu, self._threads, self._layouts, rows, places, bad, counts
        )
        n, wrong, events, short, bits = counts.tolist()
        systems |= _systems(bits, loops_binary.SYSTEMS)
        return _records(rows[:n]), places[:n].copy(), bad[:wrong], events, short


class PerfRead(NamedTuple):
    """Records of a perf.data as RECORDs, and what else there was.

    `others` are (word, rows before, newest time before) of records of other kinds; then the number
    of samples and of those not understood, the newest time, and the word where it ends.
    """

    records: NDArray[Any]
    others: list[tuple[int, int, int]]
    samples: int
    short: int
    newest: int
    end: int


class PerfLoop:
    """The columns of `perfdata`, compiled."""

    def __init__(
        self, loops: Loops, formats: raw.Formats, form: tuple[int, ...], ids: NDArray[np.uint64]
    ) -> None:
        """Prepare the tracepoints' layouts, the form of samples and their identifiers."""
        self._scan = loops.perf
        self._layouts = loops_binary.layouts(formats)
        self._rows, self._others = _rows(0), np.empty((0, 3), np.int64)
        self._form = np.array(form, np.int64)
        self._ids = ids

    def __call__(self, words: NDArray[np.uint64], slots: int, systems: set[str]) -> PerfRead:
        """Read records; `systems` gets those recorded whole."""
        # The shortest sample: a head, thread, time and 12 bytes of data.
        most = slots // 4 + 1
        if most > len(self._rows):
            self._rows, self._others = _rows(most), np.empty((slots + 1, 3), np.int64)
        rows, others, counts = self._rows, self._others, np.zeros(6, np.int64)
        end = self._scan(
            words.view(np.uint8), words, slots, self._form, self._ids, self._layouts, rows, others,
            counts,
        )  # fmt: skip
        n, other, samples, short, bits, newest = counts.tolist()
        systems |= _systems(bits, loops_binary.SYSTEMS)
        told = [(at, before, time % (1 << 64)) for at, before, time in others[:other].tolist()]
        return PerfRead(_records(rows[:n]), told, samples, short, newest % (1 << 64), end)


class LoopTranslator(Translator):
    """A Translator that steps over records, compiled."""

    def __init__(self, slots: tuple[Slot, ...], loops: Loops) -> None:
        """Start with nothing known; `slots` are KVM's own slots as the user states them."""
        super().__init__(slots)
        self._loop = loops.events
        wide, narrow = np.zeros(0, np.int64), np.zeros(0, np.uint8)
        self._vcpus = loops_events.Vcpus(
            wide, wide, wide, narrow, narrow, narrow, narrow, narrow, wide, wide
        )
        self._hashed = _tables(1 << 8)
        self._keys: dict[int, int] = {}  # as in _hashed, to fill larger ones
        gfns, about = self._presumed.table()
        count = len(gfns)
        self._pages = loops_events.Pages(
            gfns, about, np.zeros(1, np.uint8),
            np.zeros((1, count), np.uint8), np.zeros((1, count), np.uint8),
        )  # fmt: skip

    def finish(self) -> NDArray[Any]:
        """Return the events that waited for more; what is fed later is another trace."""
        events = super().finish()
        for state in self._vcpus[3:5] + self._vcpus[6:8]:
            state[:] = 0
        return events

    def _translate(self, records: NDArray[Any]) -> NDArray[Any]:
        if not len(records):
            return np.empty(0, EVENT)
        words = np.ascontiguousarray(records).view(np.uint64).reshape(-1, loops_events.RECORD_WORDS)
        # A record gives two events at most, and a VM and a vCPU become known by it.
        out = np.empty((4 * len(words), loops_events.EVENT_WORDS), np.uint64)
        self._vcpus.waits[:] = -1
        row = n = 0
        while True:
            row, n = self._loop(words, row, self._vcpus, self._hashed, self._pages, out, n)
            if row == len(words):
                break
            births = self._meet(records[row])
            told = births.events.view(np.uint64).reshape(-1, loops_events.EVENT_WORDS)
            out[n : n + len(told)] = told
            for at in births.place[births.place >= 0].tolist():
                # It is the vCPU's first event, and stands last.
                self._vcpus.seq[at] += 1
            n += len(births.events)
        if self._hashed.dropped[0]:
            self._hashed.dropped[0] = 0
            self._drop(records)
        events: NDArray[Any] = out[:n].view(EVENT).reshape(-1)
        self._doubt(events)
        return events

    def _meet(self, record: np.void) -> Births:
        """Number the vCPU of a record, and make room for what will be known of it."""
        key, place, births = self._identity.meet(record)
        vm, count = int(self._identity.vm[place]), self._identity.count
        if count > len(self._vcpus.vm):
            before = len(self._vcpus.vm)
            self._vcpus = loops_events.Vcpus(*(_more(state, count) for state in self._vcpus))
            self._vcpus.waits[before:] = -1
        self._vcpus.vm[place], self._vcpus.number[place] = vm, key & 0xFFFF
        if vm >= len(self._pages.two_spaces):
            gfn, about, *seen = self._pages
            self._pages = loops_events.Pages(gfn, about, *(_more(state, vm + 1) for state in seen))
        self._keys[key] = place
        if len(self._keys) * 4 > len(self._hashed.thread):
            old, self._hashed = self._hashed, _tables(8 * len(self._keys))
            self._hashed.dropped[:] = old.dropped
            for known, at in self._keys.items():
                _put(self._hashed.thread, self._hashed.thread_place, known, at + 1)
            for known, at in zip(old.tid.tolist(), old.running.tolist(), strict=True):
                if at:
                    _put(self._hashed.tid, self._hashed.running, known, at)
        else:
            _put(self._hashed.thread, self._hashed.thread_place, key, place + 1)
        return births


def _more(state: NDArray[Any], count: int) -> NDArray[Any]:
    """An array with room for `count` rows, and for as many again."""
    more = np.zeros((2 * count, *state.shape[1:]), state.dtype)
    more[: len(state)] = state
    return more


def _tables(least: int) -> loops_events.Hashed:
    """Empty hash tables of at least so many entries."""
    size = 1 << (least - 1).bit_length()
    keys, places = np.zeros((2, size), np.uint64), np.zeros((2, size), np.int64)
    return loops_events.Hashed(keys[0], places[0], keys[1], places[1], np.zeros(1, np.int64))


def _put(keys: NDArray[np.uint64], places: NDArray[np.int64], key: int, place: int) -> None:
    """Enter a new key into a table; see `loops_events.place_of`."""
    at = (key * loops_events.HASH % (1 << 64) >> 32) % len(keys)
    while places[at]:
        at = (at + 1) % len(keys)
    keys[at], places[at] = key, place
