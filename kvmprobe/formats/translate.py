# SPDX-License-Identifier: MIT
"""From records of other tools' traces to events of probes/events.h.

A trace shows tracepoints alone.  What the live probes read from memory is inferred here, from what
came before on the same vCPU: whose vCPU a thread runs, the level (nested tracepoints), the address
space (kvm_smm_transition), whether the cache was believed, whether an access went to the VMM.  What
can't be inferred stays unknown.  After a loss nothing is known until it is shown again.

All is done by columns: within each vCPU the state at an event is what the newest event that sets it
says.  Where blocks are cut makes no difference.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.formats.build import EXIT_MMIO, Ints, Known, Mask, Part, build, order_of
from kvmprobe.formats.identity import Identity
from kvmprobe.formats.records import RECORD, Block, Point
from kvmprobe.formats.slots import Presumed, Slot
from kvmprobe.probes.schema import (
    EVENT,
    NO_VCPU,
    SLOT_APIC,
    FaultinResult,
    Flag,
    LossCause,
    MmioType,
    Site,
    Type,
)

#: An exit to the VMM belongs to the MMIO access before it if fewer records than this lie between.
WINDOW = 8192
_L1, _L2 = 1, 2
_LEVEL = np.uint32(Flag.LEVEL_KNOWN | Flag.L2)
_UNSHOWN = np.uint32(Flag.SLOT_PRESUMED | Flag.UNSTABLE)
_NORMAL, _SMM = 1, 2
#: What a record would have told of its vCPU.
_TELLS: dict[Point, tuple[Type, ...]] = {
    Point.PAGE_FAULT: (Type.FAULT,),
    Point.SPTE_REQUESTED: (Type.FAULTIN,),
    Point.MARK_MMIO: (Type.FILL, Type.SPTE),
    Point.HANDLE_MMIO: (Type.FILL,),
    Point.CHECK_MMIO: (Type.SPTE,),
    Point.EMULATE: (Type.EMULATE,),
    Point.MATCH: (Type.MATCH,),
    Point.MMIO: (Type.MMIO,),
    Point.NESTED_ENTER: (Type.NESTING,),
    Point.NESTED_ENTER_FAILED: (Type.NESTING,),
    Point.NESTED_EXIT: (Type.NESTING,),
    Point.NESTED_INJECT: (Type.NESTING,),
    Point.SMM: (Type.SMM,),
}
#: By point: whether it is one of those.
TELLS = np.isin(np.arange(256), list(_TELLS))
#: Threads without a vCPU that are counted one by one; those beyond are one thread.
_THREADS = 1 << 15
_NEVER = np.iinfo(np.int64).max
#: What `_Batch.newest` says: in an earlier batch if at all; nowhere since the newest loss.
_EARLIER, _LOST = -1, -2


class _Batch(NamedTuple):
    """Records of known vCPUs, sorted by vCPU; `when` is the place of each in the trace.

    `first` is the row at which the vCPU's records begin, `loss` the place of the newest loss before
    each row and `last_loss` that of the batch's last one (-1: none in this batch).
    """

    records: NDArray[Any]
    when: Ints
    place: Ints
    first: Ints
    loss: Ints
    last_loss: int

    def is_(self, *points: Point) -> Mask:
        """Which rows are of these points."""
        wanted = np.zeros(256, np.bool_)
        wanted[list(points)] = True
        mask: Mask = wanted[self.records["point"]]
        return mask

    def newest(self, mask: Mask, *, before: bool = False) -> Ints:
        """For each row the newest row of `mask` on its vCPU: at or before it, or only before it."""
        newest = np.maximum.accumulate(np.where(mask, np.arange(len(mask)), -1))
        if before:
            newest = np.concatenate(([-1], newest[:-1]))
        newest[newest < self.first] = _EARLIER
        lost = np.where(newest >= 0, self.when[newest] < self.loss, self.loss >= 0)
        newest[lost] = _LOST
        return newest

    def value(self, newest: Ints, values: NDArray[Any], kept: NDArray[Any]) -> NDArray[Any]:
        """The value at the newest row, or what was kept from earlier batches, or 0 after a loss."""
        found = np.where(newest >= 0, values[np.maximum(newest, 0)], kept[self.place])
        found[newest == _LOST] = 0
        return found


class Translator:
    """Turns the blocks of a trace into events, in the same order."""

    def __init__(self, slots: tuple[Slot, ...] = ()) -> None:
        """Start with nothing known; `slots` are KVM's own slots as the user states them."""
        self._presumed = Presumed(slots)
        self._identity = Identity()
        self._held = np.empty(0, RECORD)
        # By place, that is vCPU: what the trace has shown of it so far.
        self._level = np.zeros(0, np.uint8)
        self._space = np.zeros(0, np.uint8)
        self._smm_seen = np.zeros(0, np.bool_)
        self._matched = np.zeros(0, np.bool_)
        self._reading = np.zeros(0, np.bool_)
        self._seq = np.zeros(0, np.int64)
        self._two_spaces: set[int] = set()  # VMs
        #: By observation, events that would convict if a well-known address were known to be KVM's
        #: slot; and the pages concerned.
        self.doubtful: Counter[Type] = Counter()
        self.doubtful_pages: set[int] = set()
        self._unplaced: Counter[tuple[int, int]] = Counter()  # by tid and point

    def feed(self, block: Block) -> NDArray[Any]:
        """Take in a block; returns events of dtype EVENT, as many as can be told by now.

        Raises:
            CaptureError: more vCPUs than a host can have.

        """
        self._identity.names(block.comms)
        records = np.concatenate([self._held, block.records]) if len(self._held) else block.records
        cut = _decided(records)
        self._held = records[cut:].copy()
        return self._translate(records[:cut])

    @property
    def vcpus(self) -> int:
        """How many vCPUs were met."""
        return self._identity.count

    @property
    def unplaced(self) -> Counter[Type]:
        """By observation, records that are dropped: their threads never named a vCPU."""
        counts: Counter[Type] = Counter()
        for (tid, point), count in self._unplaced.items():
            if not self._identity.knows(tid):
                for kind in _TELLS[Point(point)]:
                    counts[kind] += count
        return counts

    def finish(self) -> NDArray[Any]:
        """Return the events that waited for more; what is fed later is another trace."""
        records, self._held = self._held, np.empty(0, RECORD)
        events = self._translate(records)
        for state in (self._level, self._space, self._matched, self._reading):
            state[:] = 0
        return events

    def _translate(self, records: NDArray[Any]) -> NDArray[Any]:
        if not len(records):
            return np.empty(0, EVENT)
        place, births = self._identity.places(records)
        self._grow()
        lost = records["point"] == Point.LOST
        sub = 1 - (births.place < 0)
        parts = [
            _losses(records, np.flatnonzero(lost)),
            Part(births.events, births.row * 8 + sub, births.place),
        ]
        if (TELLS[records["point"]] & (place < 0)).any():
            self._drop(records)
        batch = _by_vcpu(records, place, lost)
        if len(batch.when):
            parts += build(self._known(batch), self._presumed)
        elif lost.any():
            self._keep(batch, batch.when, (self._level,) * 4)
        events = self._join(parts)
        self._doubt(events)
        return events

    def _drop(self, records: NDArray[Any]) -> None:
        """Count what threads did that named no vCPU so far; one that does later began late."""
        told = records[TELLS[records["point"]]]
        pairs, counts = np.unique(
            told["tid"].astype(np.int64) << 8 | told["point"], return_counts=True
        )
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            tid = pair >> 8
            if not self._identity.knows(tid):
                known = (tid, pair & 255) in self._unplaced or len(self._unplaced) < _THREADS
                self._unplaced[tid if known else -1, pair & 255] += count

    def _doubt(self, events: NDArray[Any]) -> None:
        """Count what rests on nothing but a well-known address."""
        unshown = (events["flags"] & _UNSHOWN) == _UNSHOWN
        if not unshown.any():
            return
        doubt = events[unshown]
        level = doubt["flags"] & _LEVEL
        kind = doubt["type"]
        noslot = (kind == Type.FAULTIN) & (doubt["kind"] == FaultinResult.NOSLOT)
        convicts = (level == _LEVEL) & (noslot | (kind == Type.FILL))
        convicts |= (level == np.uint32(Flag.LEVEL_KNOWN)) & (kind == Type.MATCH)
        doubt = doubt[convicts & (doubt["slot"] != SLOT_APIC)]
        types, counts = np.unique(doubt["type"], return_counts=True)
        for number, count in zip(types.tolist(), counts.tolist(), strict=True):
            self.doubtful[Type(number)] += count
        self.doubtful_pages.update((np.unique(doubt["addr"] >> np.uint64(12))).tolist())

    def _grow(self) -> None:
        more = self._identity.count - len(self._seq)
        if more > 0:
            for name in ("_level", "_space", "_smm_seen", "_matched", "_reading", "_seq"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(more, old.dtype)]))

    def _known(self, batch: _Batch) -> Known:
        """Work out the state at every record, and keep what the next batch needs."""
        vm = self._identity.vm[batch.place]
        point, note = batch.records["point"], batch.records["note"]
        entered = batch.is_(Point.NESTED_ENTER, Point.NESTED_EXIT)
        nested = entered | batch.is_(Point.NESTED_ENTER_FAILED, Point.NESTED_INJECT)
        levels = np.where(entered, _L2, _L1).astype(np.uint8)
        level = batch.value(batch.newest(nested), levels, self._level)
        before = batch.value(batch.newest(nested, before=True), levels, self._level)
        space, smm_seen, two = self._spaces(batch, vm)
        mmio = point == Point.MMIO
        reading = note == MmioType.UNSATISFIED_READ
        asked = batch.value(batch.newest(mmio, before=True), reading, self._reading)
        drops = mmio & asked & (note == MmioType.READ)
        believed = point == Point.MATCH
        matching = batch.newest(believed | (point == Point.EMULATE))
        matched = batch.value(matching, believed, self._matched)
        flags = (
            np.array([0, Flag.LEVEL_KNOWN, Flag.LEVEL_KNOWN | Flag.L2], np.uint32)[level]
            | np.array([0, Flag.AS_KNOWN, Flag.AS_KNOWN | Flag.SMM], np.uint32)[space]
            | np.where(two, np.uint32(Flag.TWO_AS), np.uint32(0))
            | np.where(smm_seen, np.uint32(Flag.SMM_SEEN), np.uint32(0))
        )
        known = Known(
            batch.records, batch.when, batch.place, vm, self._identity.number[batch.place], flags,
            # An exit from L2 that L0 handles itself shows the level, and changes it only if it
            # wasn't known.
            nests=nested & ~((point == Point.NESTED_EXIT) & (before == _L2)),
            drops=drops, to_vmm=_to_vmm(batch, mmio & ~drops), matched=matched,
        )  # fmt: skip
        self._presumed.learn(batch.records, vm, batch.when)
        asked = batch.value(batch.newest(mmio), reading, self._reading)
        last = np.append(np.flatnonzero(np.diff(batch.first)), len(batch.first) - 1)
        self._smm_seen[batch.place[last]] = smm_seen[last]
        self._keep(batch, last, (level, space, matched, asked))
        return known

    def _keep(self, batch: _Batch, last: Ints, values: tuple[NDArray[Any], ...]) -> None:
        """Keep what the vCPUs' last rows say, as far as it was shown since the newest loss."""
        states = (self._level, self._space, self._matched, self._reading)
        for state, value in zip(states, values, strict=True):
            if batch.last_loss >= 0:
                state[:] = 0
            fresh = last[batch.when[last] > batch.last_loss]
            state[batch.place[fresh]] = value[fresh]

    def _spaces(self, batch: _Batch, vm: Ints) -> tuple[NDArray[Any], Mask, Mask]:
        """The address space, whether the vCPU was in SMM, and whether the VM has two spaces."""
        note = batch.records["note"]
        smm = batch.is_(Point.SMM)
        since = np.full(int(vm.max()) + 1, _NEVER)
        since[[number for number in self._two_spaces if number < len(since)]] = -1
        shows = np.flatnonzero(smm | (batch.is_(Point.SPTE_CHANGED) & (note == 1)))
        np.minimum.at(since, vm[shows], batch.when[shows])
        self._two_spaces.update(vm[shows].tolist())
        two: Mask = since[vm] <= batch.when
        # With two address spaces bit 0 of a generation is the address space's number; with one it
        # says nothing.
        marks = batch.is_(Point.MARK_MMIO) & two
        parity = (batch.records["c"] & np.uint64(1)).astype(np.uint8)
        spaces = np.where(marks, parity, note) + np.uint8(_NORMAL)
        space = batch.value(batch.newest(smm | marks), spaces, self._space)
        seen = np.maximum.accumulate(np.where(space == _SMM, np.arange(len(space)), -1))
        return space, self._smm_seen[batch.place] | (seen >= batch.first), two

    def _join(self, parts: list[Part]) -> NDArray[Any]:
        """Put events in order and number each vCPU's."""
        order = np.argsort(np.concatenate([part.order for part in parts]), kind="stable")
        events: NDArray[Any] = np.concatenate([part.events for part in parts])[order]
        place = np.concatenate([part.place for part in parts])[order]
        own = np.flatnonzero(place >= 0)
        # 16-bit keys are sorted by radix; Identity knows fewer vCPUs.
        own = own[np.argsort(place[own].astype(np.uint16), kind="stable")]
        counts = np.bincount(place[own], minlength=len(self._seq))
        begin = np.cumsum(counts) - counts
        at = place[own]
        events["seq"][own] = (self._seq[at] + np.arange(len(own)) - begin[at]) & 0xFFFFFFFF
        self._seq += counts
        return events


def _decided(records: NDArray[Any]) -> int:
    """How many records can be told now: up to an MMIO access whose exit may still come."""
    begin = max(0, len(records) - WINDOW)
    tail = records[begin:]
    point = tail["point"]
    if not (point == Point.MMIO).any():
        return len(records)
    rows = np.flatnonzero(np.isin(point, (Point.MMIO, Point.USERSPACE_EXIT, Point.ENTRY)))[::-1]
    _, newest = np.unique(tail["tid"][rows], return_index=True)
    newest = rows[newest]
    waits = newest[tail["point"][newest] == Point.MMIO]
    return begin + int(waits.min()) if len(waits) else len(records)


def _by_vcpu(records: NDArray[Any], place: Ints, lost: Mask) -> _Batch:
    when = np.arange(len(records))
    losses = np.maximum.accumulate(np.where(lost, when, -1))
    own = np.flatnonzero(place >= 0)
    own = own[np.argsort(place[own].astype(np.uint16), kind="stable")]
    begins = np.flatnonzero(np.diff(place[own], prepend=-1))
    first = np.repeat(begins, np.diff(np.append(begins, len(own))))
    last_loss = int(losses[-1]) if len(losses) else -1
    return _Batch(records[own], own, place[own], first, losses[own], last_loss)


def _to_vmm(batch: _Batch, mmio: Mask) -> Mask:
    """Which MMIO accesses were followed by an exit to the VMM for MMIO."""
    exits = batch.is_(Point.USERSPACE_EXIT)
    newest = batch.newest(mmio | exits | batch.is_(Point.ENTRY), before=True)
    wanted = exits & (batch.records["a"] == EXIT_MMIO) & (batch.records["note"] == 0)
    rows = np.flatnonzero(wanted & (newest >= 0))
    access = newest[rows]
    near = mmio[access] & (batch.when[rows] - batch.when[access] < WINDOW)
    to_vmm = np.zeros(len(mmio), np.bool_)
    to_vmm[access[near]] = True
    return to_vmm


def _losses(records: NDArray[Any], rows: Ints) -> Part:
    events = np.zeros(len(rows), EVENT)
    events["ts"] = records["ts"][rows]
    events["vcpu"] = NO_VCPU
    events["type"], events["site"] = Type.LOSS, Site.DRAIN
    events["addr"] = records["a"][rows]
    events["aux"] = records["cpu"][rows]
    events["len"] = LossCause.RING
    return Part(events, order_of(rows, 0), np.full(len(rows), -1))
