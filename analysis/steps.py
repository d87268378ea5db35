# SPDX-License-Identifier: MIT
"""The step loop: one event a step, plain scalar code that runs as it stands or compiled by numba.

The caller gives it rows that a rule watches, in order, and arrays to work in.  The loop finds the
vCPU's place, runs all rules on the event, and keeps counts and the choice of evidence itself, so
that what is left to do in Python is bounded by the evidence and not by the events.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules import RULES, STEP_ALL
from kvmprobe.analysis.rules.model import (
    ACQUITS,
    CAUSE,
    CITES,
    CONVICTS,
    EVIDENCE,
    WORDS,
    Event,
)
from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, Type

#: Evidence kept per (vm, vcpu, rule): the first so many, in sequence.
EVIDENCE_LIMIT = 100
N_RULES = len(RULES)
N_WORDS = N_RULES * WORDS
NO_CAUSE = -2  #: in `Out.cause`: the event cites nothing
KEPT_CAUSE = -1  #: in `Out.cause` and `Places.cause`: the cause is of an earlier batch

_LIFECYCLE = int(Type.LIFECYCLE)
_VCPU_SEEN = int(LifecycleChange.VCPU_SEEN)
_VCPU_GONE = int(LifecycleChange.VCPU_GONE)
_VM_GONE = int(LifecycleChange.VM_GONE)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_COUNTED = CONVICTS | EVIDENCE


class Rows(NamedTuple):
    """The rows to step over; `key` is vm << 16 | vcpu (int64), the rest as in events.h."""

    key: NDArray[np.int64]
    ts: NDArray[np.uint64]
    type: NDArray[np.uint8]
    site: NDArray[np.uint8]
    flags: NDArray[np.uint32]
    gfn: NDArray[np.uint64]
    slot: NDArray[np.int16]
    kind: NDArray[np.uint8]


class Places(NamedTuple):
    """What is known of each (vm, vcpu), by its place; a VM itself has the place of NO_VCPU.

    `hashes` maps hash -> place (-1: free) and is a power of two long; `seed` holds two odd numbers.
    A vCPU whose `epoch` differs from its VM's is gone and starts afresh.
    """

    hashes: NDArray[np.int32]
    seed: NDArray[np.int64]
    key: NDArray[np.int64]
    vm: NDArray[np.int32]
    epoch: NDArray[np.int64]
    gone: NDArray[np.bool_]
    words: NDArray[np.uint64]  # flat: place, rule, word
    cause: NDArray[np.int64]  # row of the newest cause; KEPT_CAUSE; NO_CAUSE
    uncited: NDArray[np.uint64]  # bit r: rule r hasn't cited the newest cause
    acquitted: NDArray[np.uint64]  # bit r: an acquittal by rule r was passed on
    acquittals: NDArray[np.uint64]  # place, rule: acquittals
    counts: NDArray[np.uint64]  # place, rule: occurrences
    total: NDArray[np.uint64]  # place, rule: events of evidence, kept or not
    first: NDArray[np.uint64]  # place, rule: time of the first occurrence
    last: NDArray[np.uint64]  # place, rule


class Out(NamedTuple):
    """What the loop says of each row it stepped over, for Python to act on."""

    place: NDArray[np.int64]
    keep: NDArray[np.uint64]  # bit r: keep as evidence of rule r
    cite: NDArray[np.uint64]  # bit r: keep the newest cause before it
    cause: NDArray[np.int64]
    acquit: NDArray[np.uint64]  # bit r: the vCPU's first acquittal by rule r
    rules: NDArray[np.uint8]  # of one event: the rules that answered
    codes: NDArray[np.uint8]  # their answers


class Hashed(Protocol):
    """What `find` looks in: `Places`, or another table of the same keys."""

    @property
    def hashes(self) -> NDArray[np.int32]:
        """Hash -> place, -1: free; a power of two long."""

    @property
    def seed(self) -> NDArray[np.int64]:
        """Two odd numbers."""

    @property
    def key(self) -> NDArray[np.int64]:
        """The key of each place."""


def find(places: Hashed, key: int) -> int:
    """Return where `key` stands in `hashes`, or where it would go."""
    mask = len(places.hashes) - 1
    # Below 2**63, so nothing overflows; seeded, so no capture can be made to collide.
    at: int = (((key >> 16) * places.seed[0] + (key & 0xFFFF) * places.seed[1]) >> 20) & mask
    while True:
        place = places.hashes[at]
        if place < 0 or places.key[place] == key:
            return at
        at = (at + 1) & mask


def begin(places: Places, place: int) -> None:
    """Start a vCPU afresh: what rules remember of it is forgotten, what they found is not."""
    for word in range(place * N_WORDS, (place + 1) * N_WORDS):
        places.words[word] = 0
    places.cause[place] = NO_CAUSE
    places.uncited[place] = 0


def scan(rows: Rows, places: Places, out: Out, start: int, used: int) -> tuple[int, int]:
    """Step over `rows` from `start`, with `used` places taken.

    Returns:
        The row at which the places ran out (or the number of rows), and the places taken.

    """
    for i in range(start, len(rows.key)):
        out.keep[i] = out.cite[i] = out.acquit[i] = _ZERO
        out.cause[i] = NO_CAUSE
        key = rows.key[i]
        at = find(places, key)
        place = places.hashes[at]
        if place < 0:
            if used + 2 > len(places.key):
                return i, used
            home = key | NO_VCPU
            at = find(places, home)
            if places.hashes[at] < 0:
                places.hashes[at] = used
                places.key[used] = home
                places.vm[used] = used
                places.epoch[used] = 0
                used += 1
            vm = places.hashes[at]
            place = vm
            if key != home:
                place = used
                places.hashes[find(places, key)] = used
                places.key[used] = key
                places.vm[used] = vm
                places.epoch[used] = places.epoch[vm]
                begin(places, used)
                used += 1
        out.place[i] = place
        vm = places.vm[place]
        if rows.type[i] == _LIFECYCLE:
            kind = rows.kind[i]
            if kind == _VM_GONE:
                places.epoch[vm] += 1
                places.gone[vm] = True
            elif kind in (_VCPU_GONE, _VCPU_SEEN):
                begin(places, place)
                places.gone[place] = kind == _VCPU_GONE
            continue
        if place != vm and places.epoch[place] != places.epoch[vm]:
            begin(places, place)
            places.epoch[place] = places.epoch[vm]
        places.gone[place] = False
        places.gone[vm] = False
        event = Event(
            rows.ts[i], rows.type[i], rows.site[i], rows.flags[i], rows.gfn[i], rows.slot[i],
            rows.kind[i],
        )  # fmt: skip
        for answer in range(STEP_ALL(event, places.words, place * N_WORDS, out.rules, out.codes)):
            r = out.rules[answer]
            code = out.codes[answer]
            bit = _ONE << np.uint64(r)
            if code & ACQUITS:
                places.acquittals[place, r] += _ONE
                if places.acquitted[place] & bit == 0:
                    places.acquitted[place] |= bit
                    out.acquit[i] |= bit
            if code & CONVICTS:
                if places.counts[place, r] == 0:
                    places.first[place, r] = rows.ts[i]
                places.counts[place, r] += _ONE
                places.last[place, r] = rows.ts[i]
            if code & CITES and places.uncited[place] & bit != 0:
                places.uncited[place] ^= bit
                if places.total[place, r] + _ONE < EVIDENCE_LIMIT:
                    out.cite[i] |= bit
                    out.cause[i] = places.cause[place]
                places.total[place, r] += _ONE
            if code & _COUNTED:
                if places.total[place, r] < EVIDENCE_LIMIT:
                    out.keep[i] |= bit
                places.total[place, r] += _ONE
            if code & CAUSE:
                places.cause[place] = i
                places.uncited[place] = ~np.uint64(0)
    return len(rows.key), used


def new_places(capacity: int, seed: NDArray[np.int64]) -> Places:
    """Make room for `capacity` vCPUs and VMs; `seed` is two odd numbers below 2**30."""
    hashes = 1 << (2 * capacity - 1).bit_length()
    rules = (capacity, N_RULES)
    return Places(
        hashes=np.full(hashes, -1, np.int32),
        seed=seed,
        key=np.zeros(capacity, np.int64),
        vm=np.zeros(capacity, np.int32),
        epoch=np.zeros(capacity, np.int64),
        gone=np.zeros(capacity, np.bool_),
        words=np.zeros(capacity * N_WORDS, np.uint64),
        cause=np.full(capacity, NO_CAUSE, np.int64),
        uncited=np.zeros(capacity, np.uint64),
        acquitted=np.zeros(capacity, np.uint64),
        acquittals=np.zeros(rules, np.uint64),
        counts=np.zeros(rules, np.uint64),
        total=np.zeros(rules, np.uint64),
        first=np.zeros(rules, np.uint64),
        last=np.zeros(rules, np.uint64),
    )


class Room:
    """Memory for rows and answers, kept from batch to batch: new memory costs more than a step."""

    def __init__(self, size: int) -> None:
        """Make room for that many rows."""
        self.rows = Rows(
            key=np.zeros(size, np.int64),
            ts=np.zeros(size, np.uint64),
            type=np.zeros(size, np.uint8),
            site=np.zeros(size, np.uint8),
            flags=np.zeros(size, np.uint32),
            gfn=np.zeros(size, np.uint64),
            slot=np.zeros(size, np.int16),
            kind=np.zeros(size, np.uint8),
        )
        self.out = Out(
            place=np.zeros(size, np.int64),
            keep=np.zeros(size, np.uint64),
            cite=np.zeros(size, np.uint64),
            cause=np.zeros(size, np.int64),
            acquit=np.zeros(size, np.uint64),
            rules=np.zeros(N_RULES, np.uint8),
            codes=np.zeros(N_RULES, np.uint8),
        )

    def cut(self, size: int) -> tuple[Rows, Out]:
        """Give the first so many; good until the next call."""
        rows: dict[str, Any] = {name: own[:size] for name, own in self.rows._asdict().items()}
        out: dict[str, Any] = {name: own[:size] for name, own in self.out._asdict().items()}
        one = {"rules": self.out.rules, "codes": self.out.codes}
        return Rows(**rows), Out(**out | one)


def move(old: Places, keep: NDArray[np.intp], capacity: int) -> Places:
    """Copy the places `keep` (VMs among them before or after) into new ones of that capacity.

    Args:
        old: the places so far.
        keep: indices into `old`, ascending; the VM of each kept vCPU is kept too.
        capacity: room in the new places, at least ``len(keep)``.

    Returns:
        The new places, in which place n is the old place ``keep[n]``.

    """
    new = new_places(capacity, old.seed)
    fields: dict[str, Any] = new._asdict()
    for name in Places._fields:
        if name not in ("hashes", "seed", "vm", "words"):
            fields[name][: len(keep)] = getattr(old, name)[keep]
    new.words.reshape(-1, N_WORDS)[: len(keep)] = old.words.reshape(-1, N_WORDS)[keep]
    new.vm[: len(keep)] = np.searchsorted(keep, old.vm[keep])
    for place, key in enumerate(new.key[: len(keep)].tolist()):
        new.hashes[find(new, key)] = place
    return new
