# SPDX-License-Identifier: MIT
"""Hits and near misses of the rules on the siblings; tests/unit/test_rules.py has the others."""

from __future__ import annotations

from typing import Any

from kvmprobe.probes.schema import (
    NO_VCPU,
    SLOT_APIC,
    SLOT_IDENTITY,
    Flag,
    MmioType,
    Site,
    SpteChange,
    Type,
)
from tests.streams import APIC_GPA, IDENTITY_GPA, L1, L2, LIVE, RAM_GPA, UNKNOWN, ev, kept, noslot

Events = list[dict[str, Any]]

FILL, CACHE, MATCH, MMIO = Type.FILL, Type.CACHE, Type.MATCH, Type.MMIO
HOLE: dict[str, Any] = {"addr": 0xA0000, "slot": -1}
RAM: dict[str, Any] = {"addr": RAM_GPA, "slot": 3}
RSVD: dict[str, Any] = {"site": Site.RSVD}

_GEN = Flag.GEN_KNOWN
#: A VM with two address spaces; in SMM and, having been there, not in SMM.
TWO = Flag.TWO_AS | Flag.AS_KNOWN
IN_SMM = L1 | TWO | Flag.SMM | Flag.SMM_SEEN
NORMAL = L1 | TWO | Flag.SMM_SEEN
#: The entry's generation: address space 0's while in SMM, the vCPU's own while in SMM, none.
AS0 = _GEN | Flag.GEN_IS_AS0
AS1 = _GEN | Flag.GEN_IS_CURRENT
OLD = _GEN
FILLED_HERE = Flag.FILL_AS_KNOWN
FILLED_THERE = Flag.FILL_AS_KNOWN | Flag.OTHER_AS

SHADOW = L1 | Flag.AS_KNOWN | Flag.PRESENT
MARKED: dict[str, Any] = {"kind": SpteChange.MARKED, "site": Site.MARK_MMIO_SPTE, **HOLE}
STUCK: dict[str, Any] = {"addr": RAM_GPA, "slot": -1}
READ, WRITE = MmioType.UNSATISFIED_READ, MmioType.WRITE


def storm(
    per_second: int, seconds: int, *, start: int = 10**15, vcpu: int = NO_VCPU, pause: int = 0
) -> Events:
    """Changes of the generation, evenly spread; `pause`: ns without any after the third second."""
    step = 10**9 // per_second
    return [
        ev(
            Type.GENERATION, UNKNOWN, addr=0, slot=-1, vcpu=vcpu, site=Site.MEMSLOTS_UPDATED,
            ts=start + n * step + (pause if n >= 3 * per_second else 0),
        )
        for n in range(per_second * seconds + 1)
    ]  # fmt: skip


#: rule -> name of the case -> (events, occurrences).
#: L2, where a slot of KVM's own is presumed and no memory was shown.
DOUBT = L2 | Flag.SLOT_PRESUMED | Flag.UNSTABLE

HITS: dict[str, dict[str, tuple[Events, int]]] = {
    "internal-slot-presumed": {
        "fill": ([ev(FILL, DOUBT)], 1),
        "fill of the identity map": ([ev(FILL, DOUBT, addr=IDENTITY_GPA, slot=SLOT_IDENTITY)], 1),
        "no-slot fault and its fill": ([noslot(DOUBT), ev(FILL, DOUBT)], 1),
        "two of them": ([noslot(DOUBT), noslot(DOUBT)], 2),
    },
    "address-space-generation": {
        "fill in SMM with the wrong generation": ([ev(FILL, IN_SMM | AS0, **HOLE)], 1),
        "the same on memory": ([ev(FILL, IN_SMM | AS0, **RAM)], 1),
        "true MMIO in SMM, believed": ([ev(MATCH, IN_SMM | AS0, **HOLE)], 1),
        "harmless hit of an older generation": ([ev(MATCH, IN_SMM | OLD, **HOLE)], 1),
        "harmless hit, filled in SMM": ([ev(MATCH, NORMAL | LIVE | FILLED_THERE, **HOLE)], 1),
        "held, filled in SMM": ([ev(CACHE, NORMAL | LIVE | FILLED_THERE, **RAM)], 1),
        "held, filled who knows where": ([ev(CACHE, NORMAL | LIVE, **RAM)], 1),
        "reserved-bit fault and its harmless match": (
            [ev(MATCH, IN_SMM | AS0, **RSVD, **HOLE), ev(MATCH, IN_SMM | AS0, **HOLE)], 1,
        ),
        "slot on its way out": ([ev(MATCH, IN_SMM | AS0 | Flag.SLOT_INVALID, **RAM)], 1),
        "L2": ([ev(MATCH, IN_SMM | L2 | AS0, **HOLE)], 1),
    },
    "address-space-mixup": {
        "forward": ([ev(MATCH, IN_SMM | AS0 | FILLED_THERE, **RAM)], 1),
        "forward, fill not seen": ([ev(MATCH, IN_SMM | AS0, **RAM)], 1),
        "reverse": ([ev(MATCH, NORMAL | LIVE | FILLED_THERE, **RAM)], 1),
        "reverse, fill not seen": ([ev(MATCH, NORMAL | LIVE, **RAM)], 1),
        "reverse, generations not known": ([ev(MATCH, NORMAL, **RAM)], 1),
        "memory added since": ([ev(MATCH, IN_SMM | AS0 | FILLED_HERE, **RAM)], 1),
        "plain access: the fault, then its match": (
            [ev(MATCH, IN_SMM | AS0, **RSVD, **RAM), ev(MATCH, IN_SMM | AS0, **RAM)], 1,
        ),
        "reverse at a reserved-bit fault": (
            [ev(MATCH, NORMAL | LIVE | FILLED_THERE, **RSVD, **RAM)], 1,
        ),
        "the fault and the match of the reverse": (
            [ev(MATCH, NORMAL | LIVE | FILLED_THERE, **RSVD, **RAM),
             ev(MATCH, NORMAL | LIVE | FILLED_THERE, **RAM)], 1,
        ),
        "memory of KVM's own": ([ev(MATCH, IN_SMM | AS0)], 1),
        "level unknown": ([ev(MATCH, (IN_SMM ^ L1) | AS0, **RAM)], 1),
        "slot 0": ([ev(MATCH, IN_SMM | AS0, addr=RAM_GPA, slot=0)], 1),
    },
    "spte-overwrite": {
        "shadow paging": ([ev(Type.SPTE, SHADOW, **MARKED)], 1),
        "nested paging of L1": (
            [ev(Type.SPTE, SHADOW | L2 | Flag.NESTED_MMU, **MARKED)], 1,
        ),
        "twice": ([ev(Type.SPTE, SHADOW, **MARKED)] * 2, 2),
    },
    "unexplained-mmio": {
        "read": ([ev(MMIO, L1, kind=READ, **RAM)], 1),
        "write": ([ev(MMIO, L1 | Flag.WRITE, kind=WRITE, **RAM)], 1),
        "read of ROM": ([ev(MMIO, L1 | Flag.SLOT_READONLY, kind=READ, **RAM)], 1),
        "L2": ([ev(MMIO, L2, kind=READ, **RAM)], 1),
        "level unknown": ([ev(MMIO, UNKNOWN, kind=READ, **RAM)], 1),
        "page 0": ([ev(MMIO, L1, kind=READ, addr=8, slot=0)], 1),
        "memory of KVM's own": ([ev(MMIO, L1, kind=READ)], 1),
    },
    "no-progress-fault": {
        "told by the probe": ([ev(Type.FAULT, L1 | Flag.STUCK, **STUCK)], 1),
        "told again": ([ev(Type.FAULT, L1 | Flag.STUCK, **STUCK)] * 3, 3),
        "L2": ([ev(Type.FAULT, L2 | Flag.STUCK, **STUCK)], 1),
        "among others": (
            [ev(Type.FAULT, **STUCK), ev(Type.FAULT, L1 | Flag.STUCK, **STUCK)], 1,
        ),
    },
    "stale-spte-storm": {
        "five seconds": (storm(100, 5), 1),
        "eight seconds": (storm(100, 8), 4),
        "many a second": (storm(5000, 6), 2),
        "seen by one vCPU": (storm(100, 5, vcpu=0), 1),
        "at the end of time": (storm(100, 5, start=2**64 - 6 * 10**9), 1),
    },
}  # fmt: skip

#: rule -> name of the case -> events in which the rule must find nothing.
MISSES: dict[str, dict[str, Events]] = {
    "internal-slot-presumed": {
        "memory was shown": [ev(FILL, L2 | Flag.SLOT_PRESUMED)],
        "a slot that was looked up changes": [ev(FILL, L2 | Flag.UNSTABLE)],
        "L1": [ev(FILL, L1 | Flag.SLOT_PRESUMED | Flag.UNSTABLE)],
        "level unknown": [ev(FILL, Flag.SLOT_PRESUMED | Flag.UNSTABLE)],
        "APIC page": [ev(FILL, DOUBT, addr=APIC_GPA, slot=SLOT_APIC)],
        "gfn 0": [ev(FILL, DOUBT, addr=0x10)],
        "the APIC page's address, another slot": [ev(FILL, DOUBT, addr=APIC_GPA)],
        "a fault that was kept": [kept(DOUBT)],
        "fill read back too late": [ev(FILL, DOUBT | Flag.GEN_KNOWN)],
    },
    "address-space-generation": {
        "fill in SMM with its own generation": [ev(FILL, IN_SMM | AS1, **HOLE)],
        "fill outside SMM": [ev(FILL, NORMAL | LIVE, **HOLE), ev(FILL, NORMAL | AS0, **HOLE)],
        "fill in an unknown address space": [ev(FILL, L1 | Flag.TWO_AS | AS0, **HOLE)],
        "fill with neither generation": [ev(FILL, IN_SMM | OLD, **HOLE)],
        "fill with both generations": [ev(FILL, IN_SMM | LIVE, **HOLE)],
        "fill, generation not known": [ev(FILL, IN_SMM | Flag.GEN_IS_AS0, **HOLE)],
        "one address space": [
            ev(FILL, (IN_SMM ^ Flag.TWO_AS) | AS0, **HOLE),
            ev(MATCH, (IN_SMM ^ Flag.TWO_AS) | AS0, **HOLE),
        ],
        "memslots changed meanwhile": [
            ev(FILL, IN_SMM | AS0 | Flag.UNSTABLE, **HOLE),
            ev(MATCH, IN_SMM | OLD | Flag.UNSTABLE, **HOLE),
            ev(CACHE, NORMAL | LIVE | FILLED_THERE | Flag.UNSTABLE, **RAM),
        ],
        "true MMIO in SMM, fixed kernel": [ev(MATCH, IN_SMM | AS1 | FILLED_HERE, **HOLE)],
        "true MMIO outside SMM": [ev(MATCH, NORMAL | LIVE | FILLED_HERE, **HOLE)],
        "match, address space not known": [ev(MATCH, (IN_SMM ^ Flag.AS_KNOWN) | AS0, **HOLE)],
        "match, fill not known": [ev(MATCH, NORMAL | LIVE | Flag.OTHER_AS, **HOLE)],
        "reserved-bit fault alone": [
            ev(MATCH, IN_SMM | AS0, **RSVD, **HOLE),
            ev(MATCH, NORMAL | LIVE | FILLED_THERE, **RSVD, **HOLE),
        ],
        "misread": [ev(MATCH, IN_SMM | AS0, **RAM)],
        "held in SMM": [ev(CACHE, IN_SMM | AS0 | FILLED_THERE, **RAM)],
        "held, filled here": [ev(CACHE, NORMAL | LIVE | FILLED_HERE, **RAM)],
        "held with an old generation": [ev(CACHE, NORMAL | OLD | FILLED_THERE, **RAM)],
        "held for a hole": [ev(CACHE, NORMAL | LIVE | FILLED_THERE, **HOLE)],
        "held, never in SMM": [ev(CACHE, L1 | TWO | LIVE, **RAM)],
        "held for KVM's own memory": [ev(CACHE, NORMAL | LIVE)],
        "held in L2": [ev(CACHE, NORMAL | L2 | LIVE, **RAM)],
    },
    "address-space-mixup": {
        "harmless": [ev(MATCH, IN_SMM | AS0, **HOLE)],
        "one address space": [ev(MATCH, L1 | Flag.AS_KNOWN | LIVE, **RAM)],
        "address space not known": [ev(MATCH, L1 | Flag.TWO_AS | AS0, **RAM)],
        "filled here, own generation": [ev(MATCH, NORMAL | LIVE | FILLED_HERE, **RAM)],
        "never in SMM": [ev(MATCH, L1 | TWO | LIVE, **RAM)],
        "L2, fill not seen": [ev(MATCH, NORMAL | L2 | LIVE, **RAM)],
        "level and fill not known": [ev(MATCH, (NORMAL ^ L1) | LIVE, **RAM)],
        "KVM's own memory, fill not seen": [ev(MATCH, NORMAL | LIVE)],
        "memslots changed meanwhile": [ev(MATCH, IN_SMM | OLD | Flag.UNSTABLE, **RAM)],
        "slot on its way out": [ev(MATCH, IN_SMM | AS0 | Flag.SLOT_INVALID, **RAM)],
        "gfn 0": [ev(MATCH, IN_SMM | AS0, addr=8, slot=0)],
        "APIC page": [ev(MATCH, IN_SMM | AS0, addr=APIC_GPA, slot=3)],
        "reserved-bit fault that may not believe it": [ev(MATCH, IN_SMM | AS0, **RSVD, **RAM)],
        "held only": [ev(CACHE, NORMAL | LIVE | FILLED_THERE, **RAM)],
        "MMIO without a match": [ev(MMIO, IN_SMM | AS0, kind=READ, **RAM)],
    },
    "spte-overwrite": {
        "nothing was present": [ev(Type.SPTE, SHADOW ^ Flag.PRESENT, **MARKED)],
        "TDP MMU": [ev(Type.SPTE, SHADOW | Flag.DIRECT, **MARKED)],
        "kind of MMU not known": [ev(Type.SPTE, L1 | Flag.PRESENT, **MARKED)],
        "valid SPTE": [ev(Type.SPTE, SHADOW, **MARKED | {"kind": SpteChange.VALID})],
        "stale SPTE": [ev(Type.SPTE, SHADOW, **MARKED | {"kind": SpteChange.STALE})],
    },
    "unexplained-mmio": {
        "an in-kernel device answered": [ev(MMIO, L1, kind=MmioType.READ, **RAM)],
        "no such access": [ev(MMIO, L1, kind=3, **RAM)],
        "slot presumed": [ev(MMIO, L1 | Flag.SLOT_PRESUMED, kind=READ, **RAM)],
        "memslots changed meanwhile": [ev(MMIO, L1 | Flag.UNSTABLE, kind=READ, **RAM)],
        "slot on its way out": [ev(MMIO, L1 | Flag.SLOT_INVALID, kind=READ, **RAM)],
        "cache believed": [ev(MMIO, L1 | Flag.MATCHED, kind=READ, **RAM)],
        "write to ROM": [ev(MMIO, L1 | Flag.SLOT_READONLY, kind=WRITE, **RAM)],
        "APIC page": [ev(MMIO, L1, kind=READ, addr=APIC_GPA + 0x20, slot=3)],
        "true MMIO": [ev(MMIO, L1, kind=READ, **HOLE)],
        "a match": [ev(MATCH, L1, **RAM)],
    },
    "no-progress-fault": {
        "an ordinary fault": [ev(Type.FAULT, **STUCK)],
        "many of them": [ev(Type.FAULT, **STUCK)] * 2000,
        "a believed fault": [ev(Type.FAULT, L1 | Flag.BELIEVED, **STUCK)],
        "another observation": [ev(FILL, L1 | Flag.STUCK, **HOLE)],
    },
    "stale-spte-storm": {
        "not yet five seconds": storm(100, 5)[:-1],
        "99 a second": storm(99, 20),
        "a pause": storm(100, 7, pause=10**9),
        "two VMs together": storm(60, 8) + [e | {"vm": 2} for e in storm(60, 8)],
        "stale SPTEs": [
            ev(Type.SPTE, L1, kind=SpteChange.STALE, ts=10**15 + n * 10**6, **HOLE)
            for n in range(9000)
        ],
    },
}
