# SPDX-License-Identifier: MIT
"""Turns records into events one after the other: what `translate` does by columns, for numba.

Both give the same events of the same records, tested.  The numbers of VMs and vCPUs are given by
`identity`: the loop stops at a record of a vCPU that it hasn't met, and goes on when told.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.formats.build import EXIT_MMIO
from kvmprobe.formats.records import Point
from kvmprobe.formats.slots import PFN_ERROR, PFN_NOSLOT
from kvmprobe.formats.translate import TELLS
from kvmprobe.probes.schema import (
    NO_VCPU,
    FaultinResult,
    Flag,
    LossCause,
    MmioType,
    Site,
    SpteChange,
    Type,
)

#: An int or one of numpy's numbers.
Number = Any

#: An exit to the VMM belongs to the MMIO access before it if fewer records than this lie between.
WINDOW = 8192
#: Words of a record and of an event.
RECORD_WORDS, EVENT_WORDS = 6, 7
_VCPU_MAX = 0xFFFE
_TID = np.uint64((1 << 24) - 1)
HASH = 0x9E3779B97F4A7C15
_HASH = np.uint64(HASH)
_0, _1, _12, _16, _32, _40, _48, _56, _255 = (
    np.uint64(n) for n in (0, 1, 12, 16, 32, 40, 48, 56, 255)
)
_LOW16, _LOW32 = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF)
_SPTE_READ_OR_PRESENT, _SPTE_WRITE = np.uint64(1), np.uint64(2)
_NO_SLOT = np.uint64(0xFFFF)
_L1, _L2 = 1, 2
_NORMAL, _IN_SMM = 1, 2

(
    _LOST, _PAGE_FAULT, _SPTE_REQUESTED, _MARK_MMIO, _HANDLE_MMIO, _CHECK_MMIO, _EMULATE, _MATCH,
    _MMIO, _USERSPACE_EXIT, _ENTRY, _EXIT, _NESTED_ENTER, _NESTED_ENTER_FAILED, _NESTED_EXIT,
    _NESTED_INJECT, _SMM, _SET_SPTE, _SPTE_CHANGED,
) = (int(point) for point in Point)  # fmt: skip
_F_L2, _F_LEVEL, _F_SMM, _F_AS = (
    int(flag) for flag in (Flag.L2, Flag.LEVEL_KNOWN, Flag.SMM, Flag.AS_KNOWN)
)
_F_TWO, _F_SEEN, _F_MATCHED, _F_WRITE = (
    int(flag) for flag in (Flag.TWO_AS, Flag.SMM_SEEN, Flag.MATCHED, Flag.WRITE)
)
_F_BY_GPA, _F_FAILED, _F_PRESUMED, _F_UNSTABLE = (
    int(flag) for flag in (Flag.BY_GPA, Flag.FAILED, Flag.SLOT_PRESUMED, Flag.UNSTABLE)
)
_TO_VMM = np.uint64(int(Flag.TO_USERSPACE)) << _32


def _what(kind: Type, site: Site) -> int:
    return int(kind) << 16 | int(site) << 24


_W_LOSS = _what(Type.LOSS, Site.DRAIN)
_W_FAULT = _what(Type.FAULT, Site.PAGE_FAULT_TP)
_W_FAULTIN = _what(Type.FAULTIN, Site.SPTE_REQUESTED)
_W_MARK = _what(Type.SPTE, Site.MARK_MMIO_SPTE)
_W_FILL_MARK = _what(Type.FILL, Site.MARK_MMIO_SPTE)
_W_FILL_HANDLE = _what(Type.FILL, Site.MMIO_SPTE)
_W_CHECK = _what(Type.SPTE, Site.CHECK_MMIO_SPTE)
_W_EMULATE = _what(Type.EMULATE, Site.EMULATE_INSN)
_W_MATCH = _what(Type.MATCH, Site.MATCH_MMIO)
_W_MMIO = _what(Type.MMIO, Site.MMIO)
_W_NESTING = _what(Type.NESTING, Site.NESTED_TP)
_W_SMM = _what(Type.SMM, Site.NESTED_TP)
_RING = np.uint64(int(LossCause.RING))
_NO_VCPU = np.uint64(NO_VCPU)
_KEPT, _NOSLOT, _ERROR = (
    int(result) for result in (FaultinResult.KEPT, FaultinResult.NOSLOT, FaultinResult.ERROR)
)
_MARKED, _VALID, _STALE = (
    int(change) for change in (SpteChange.MARKED, SpteChange.VALID, SpteChange.STALE)
)
_ASKING, _ANSWER, _WRITE = (
    int(kind) for kind in (MmioType.UNSATISFIED_READ, MmioType.READ, MmioType.WRITE)
)
_EXIT_MMIO = np.uint64(EXIT_MMIO)


class Vcpus(NamedTuple):
    """What is known of each vCPU, by its place.

    `waits` is the event of an MMIO access whose exit to the VMM may still come (-1: none), `since`
    its record.
    """

    vm: NDArray[np.int64]
    number: NDArray[np.int64]
    seq: NDArray[np.int64]
    level: NDArray[np.uint8]
    space: NDArray[np.uint8]
    smm_seen: NDArray[np.uint8]
    matched: NDArray[np.uint8]
    asking: NDArray[np.uint8]
    waits: NDArray[np.int64]
    since: NDArray[np.int64]


class Hashed(NamedTuple):
    """Two tables from a key to a place + 1: of (tgid, tid, vCPU), and of tid.

    They are a power of two long, and at most a quarter full.  `dropped` counts, in its one place,
    records that would tell something, of threads that have named no vCPU.
    """

    thread: NDArray[np.uint64]
    thread_place: NDArray[np.int64]
    tid: NDArray[np.uint64]
    running: NDArray[np.int64]
    dropped: NDArray[np.int64]


class Pages(NamedTuple):
    """The pages presumed to be KVM's own, sorted by gfn; `backed` and `writable` by VM and page.

    `about` are (slot id as 16 bits, first byte, pages, 1: stated) by page.
    """

    gfn: NDArray[np.uint64]
    about: NDArray[np.uint64]
    two_spaces: NDArray[np.uint8]
    backed: NDArray[np.uint8]
    writable: NDArray[np.uint8]


def place_of(keys: NDArray[np.uint64], places: NDArray[np.int64], key: Number) -> Number:
    """Where a key is or would be in a table."""
    last = len(keys) - 1
    at = np.int64((key * _HASH) >> _32) & last
    while places[at] and keys[at] != key:
        at = (at + 1) & last
    return at


def page_of(pages: Pages, gfn: Number) -> int:
    """The number of a page among those presumed, -1: none of them."""
    count = len(pages.gfn)
    if gfn < pages.gfn[0] or gfn > pages.gfn[count - 1]:
        return -1
    for page in range(count):
        if pages.gfn[page] == gfn:
            return page
    return -1


def slot_at(pages: Pages, vm: Number, address: Number, kept: bool) -> tuple[int, int]:
    """What is presumed at an address: the page (-1: nothing), flags."""
    page = page_of(pages, address >> _12)
    if page < 0:
        return -1, 0
    shown = pages.writable[vm, page] if kept else pages.backed[vm, page]
    if shown or pages.about[page, 3]:
        return page, _F_PRESUMED
    return page, _F_PRESUMED | _F_UNSTABLE


def slot_word(pages: Pages, page: int) -> Number:
    """The slot of a page as it stands in an event's last word."""
    return (_NO_SLOT if page < 0 else pages.about[page, 0]) << _32


def learn(pages: Pages, vm: Number, point: Number, gfn: Number, value: Number) -> None:
    """Take in what a record shows of a page."""
    page = page_of(pages, gfn)
    if page < 0:
        return
    if point == _SET_SPTE:
        if value & _SPTE_READ_OR_PRESENT:
            pages.backed[vm, page] = 1
            if value & _SPTE_WRITE:
                pages.writable[vm, page] = 1
    elif not value & (PFN_ERROR | PFN_NOSLOT):
        pages.backed[vm, page] = 1


def put(
    event: NDArray[np.uint64], ts: Number, vcpus: Vcpus, at: Number, what: Number, flags: int
) -> None:
    """Begin an event of a vCPU: all but what it says."""
    event[0] = ts
    event[1] = np.uint64(vcpus.vm[at]) | np.uint64(vcpus.seq[at] & 0xFFFFFFFF) << _32
    event[2] = np.uint64(vcpus.number[at]) | np.uint64(what) | np.uint64(flags) << _32
    event[3] = event[4] = event[5] = event[6] = _0
    vcpus.seq[at] += 1


def forget(vcpus: Vcpus) -> None:
    """After a loss nothing is known of any vCPU."""
    vcpus.level[:] = 0
    vcpus.space[:] = 0
    vcpus.matched[:] = 0
    vcpus.asking[:] = 0
    vcpus.waits[:] = -1


def translate(
    records: NDArray[np.uint64], first: int, vcpus: Vcpus, hashed: Hashed, pages: Pages,
    events: NDArray[np.uint64], n: int,
) -> tuple[int, int]:  # fmt: skip
    """Turn records into events.

    Args:
        records: RECORDs as 64-bit words.
        first: the record to begin with.
        vcpus: what is known of each vCPU; is brought up to date.
        hashed: which vCPU a thread runs.
        pages: what is known of KVM's own pages.
        events: gets EVENTs as 64-bit words.
        n: how many stand there.

    Returns:
        The record at which a vCPU has to be made known first (their number: all were read), and
        how many events stand there now.

    """
    for row in range(first, len(records)):
        record = records[row]
        ts, a, b, c = record[0], record[3], record[4], record[5]
        point = np.int64((record[2] >> _48) & _255)
        note = np.int64(record[2] >> _56)
        if point == _LOST:
            forget(vcpus)
            event = events[n]
            event[0], event[1], event[3], event[4], event[5] = ts, _0, a, _0, _0
            event[2] = _NO_VCPU | np.uint64(_W_LOSS)
            event[6] = ((record[2] >> _32) & _LOW16) | _RING << _56
            n += 1
            continue
        number, tid = record[2] & _LOW32, record[1] & _TID
        running = place_of(hashed.tid, hashed.running, tid)
        if number <= np.uint64(_VCPU_MAX):
            key = ((record[1] >> _32) & _TID) << _40 | tid << _16 | number
            at = hashed.thread_place[place_of(hashed.thread, hashed.thread_place, key)] - 1
            if at < 0:
                return row, n
            hashed.tid[running], hashed.running[running] = tid, at + 1
        else:
            at = hashed.running[running] - 1
            if at < 0:
                if TELLS[point]:
                    hashed.dropped[0] += 1
                continue
        vm = vcpus.vm[at]
        if point == _ENTRY:
            vcpus.waits[at] = -1
            continue
        if point == _USERSPACE_EXIT:
            waits = vcpus.waits[at]
            if waits >= 0 and a == _EXIT_MMIO and note == 0 and row - vcpus.since[at] < WINDOW:
                events[waits, 4] = _EXIT_MMIO
                events[waits, 2] |= _TO_VMM
            vcpus.waits[at] = -1
            continue
        before = vcpus.level[at]
        nests = False
        if point in (_NESTED_ENTER, _NESTED_EXIT):
            vcpus.level[at] = _L2
            nests = point == _NESTED_ENTER or before != _L2
        elif point in (_NESTED_ENTER_FAILED, _NESTED_INJECT):
            vcpus.level[at] = _L1
            nests = True
        elif point == _SMM:
            pages.two_spaces[vm] = 1
            vcpus.space[at] = note + _NORMAL
        elif point == _SPTE_CHANGED and note == 1:
            pages.two_spaces[vm] = 1
        elif point == _MARK_MMIO and pages.two_spaces[vm]:
            # With two address spaces bit 0 of a generation is the address space's number; with one
            # it says nothing.
            vcpus.space[at] = np.int64(c & _1) + _NORMAL
        if vcpus.space[at] == _IN_SMM:
            vcpus.smm_seen[at] = 1
        if point == _SET_SPTE:
            learn(pages, vm, point, a, b)
            continue
        if point in (_EXIT, _SPTE_CHANGED):
            continue
        flags = 0
        if vcpus.level[at]:
            flags |= _F_LEVEL | (_F_L2 if vcpus.level[at] == _L2 else 0)
        if vcpus.space[at]:
            flags |= _F_AS | (_F_SMM if vcpus.space[at] == _IN_SMM else 0)
        if pages.two_spaces[vm]:
            flags |= _F_TWO
        if vcpus.smm_seen[at]:
            flags |= _F_SEEN
        event = events[n]
        if point == _PAGE_FAULT:
            put(event, ts, vcpus, at, _W_FAULT, flags)
            event[3], event[4] = a, b
        elif point == _SPTE_REQUESTED:
            kind = _KEPT
            if b & PFN_NOSLOT:
                kind = _NOSLOT
            elif b & PFN_ERROR:
                kind = _ERROR
            page, more = slot_at(pages, vm, a << _12, kind == _KEPT)
            put(event, ts, vcpus, at, _W_FAULTIN, flags | more)
            event[3] = a << _12
            if page >= 0:
                event[4], event[5] = pages.about[page, 1], pages.about[page, 2]
            event[6] = slot_word(pages, page) | np.uint64(kind) << _48
            learn(pages, vm, point, a, b)
        elif point in (_MARK_MMIO, _HANDLE_MMIO):
            if point == _MARK_MMIO:
                put(event, ts, vcpus, at, _W_MARK, flags)
                event[3] = a << _12
                event[6] = _NO_SLOT << _32 | np.uint64(_MARKED) << _48
                n += 1
                event = events[n]
            page, more = slot_at(pages, vm, a << _12, False)
            what = _W_FILL_MARK if point == _MARK_MMIO else _W_FILL_HANDLE
            put(event, ts, vcpus, at, what, flags | more)
            event[3] = a << _12
            event[6] = slot_word(pages, page) | (b & _255) << _48
        elif point == _CHECK_MMIO:
            put(event, ts, vcpus, at, _W_CHECK, flags)
            event[4], event[5] = c, a << _32 | b
            event[6] = _NO_SLOT << _32 | np.uint64(_VALID if a == b else _STALE) << _48
        elif point == _EMULATE:
            vcpus.matched[at] = 0
            put(event, ts, vcpus, at, _W_EMULATE, flags | (_F_FAILED if note else 0))
            event[3], event[4] = a, b
        elif point == _MATCH:
            vcpus.matched[at] = 1
            page, more = slot_at(pages, vm, a, False)
            more |= (_F_WRITE if note & 1 else 0) | (_F_BY_GPA if note & 2 else 0)
            put(event, ts, vcpus, at, _W_MATCH, flags | more)
            event[3], event[4], event[6] = a, b, slot_word(pages, page)
        elif point == _MMIO:
            answers = vcpus.asking[at] != 0 and note == _ANSWER
            vcpus.asking[at] = note == _ASKING
            if answers:
                # Only tells what the VMM answered.
                continue
            page, more = slot_at(pages, vm, a, False)
            more |= (_F_MATCHED if vcpus.matched[at] else 0) | (_F_WRITE if note == _WRITE else 0)
            put(event, ts, vcpus, at, _W_MMIO, flags | more)
            event[3] = a
            event[6] = slot_word(pages, page) | np.uint64(note) << _48 | min(b, _255) << _56
            vcpus.waits[at], vcpus.since[at] = n, row
        elif nests:
            put(event, ts, vcpus, at, _W_NESTING, flags)
            event[6] = np.uint64(vcpus.level[at] == _L2) << _48
        elif point == _SMM:
            put(event, ts, vcpus, at, _W_SMM, flags)
            event[6] = np.uint64(note) << _48
        else:
            continue
        n += 1
    return len(records), n


HELPERS = (place_of, page_of, slot_at, slot_word, learn, put, forget)
