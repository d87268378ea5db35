# SPDX-License-Identifier: MIT
"""An event, and what probes remember of a vCPU: probes/events.h and probes/state.h."""

from __future__ import annotations

from dataclasses import dataclass

from kvmprobe.probes.schema import SLOT_TSS, Flag, Site, Type
from tests.model.memslots import Slot
from tests.model.terms import Cache

(
    L2, LEVEL_KNOWN, SMM, AS_KNOWN, DIRECT, NESTED_MMU, WRITE, UNSTABLE, SLOT_KNOWN, READONLY,
    INVALID, BY_GPA, TO_USERSPACE, BELIEVED, GEN_KNOWN, IS_AS0, IS_CURRENT, TWO_AS, SMM_SEEN,
    MATCHED, PRESENT, CANDIDATE, FILL_AS_KNOWN, OTHER_AS, STUCK,
) = (
    int(Flag[name]) for name in (
        "L2", "LEVEL_KNOWN", "SMM", "AS_KNOWN", "DIRECT", "NESTED_MMU", "WRITE", "UNSTABLE",
        "SLOT_KNOWN", "SLOT_READONLY", "SLOT_INVALID", "BY_GPA", "TO_USERSPACE", "BELIEVED",
        "GEN_KNOWN", "GEN_IS_AS0", "GEN_IS_CURRENT", "TWO_AS", "SMM_SEEN", "MATCHED", "PRESENT",
        "CANDIDATE", "FILL_AS_KNOWN", "OTHER_AS", "STUCK",
    )
)  # fmt: skip
FIRST_SIGHT = int(Site.FIRST_SIGHT)
#: A cache that was never filled.
EMPTY = Cache()


@dataclass
class Row:
    """One event, by the names of events.h."""

    vm: int
    vcpu: int
    type: int
    site: int
    flags: int = 0
    addr: int = 0
    value: int = 0
    gen: int = 0
    aux: int = 0
    slot: int = -1
    kind: int = 0
    len: int = 0
    seq: int = 0
    ts: int = 0


@dataclass
class VcpuState:
    """struct vcpu_state."""

    vm: int
    id: int
    tid: int
    flags: int
    seq: int = 0
    exits: int = 0
    gen: int = 0
    cache: Cache = EMPTY
    sampled_gen: int = 0
    sampled_exits: int = 0
    sampled_flags: int = 0
    held: Row | None = None
    read_waits: bool = False
    matched: bool = False
    refill: int = 0
    refill_flags: int = 0
    filled_in: int | None = None
    smm_seen: int = 0
    #: gfn, generation, in SMM -> slot and its flags: the last lookup
    memo: tuple[tuple[int, int, bool], int, int] | None = None
    fault: tuple[int, int, int] | None = None  # address, error code, flags
    faultin: tuple[Slot | None] | None = None
    noslot: int | None = None


def slot_flags(slot: Slot | None) -> int:
    """read_slot()"""
    if slot is None:
        return SLOT_KNOWN
    return SLOT_KNOWN | READONLY * slot.readonly | INVALID * slot.invalid


def candidate(row: Row) -> bool:
    """kvmprobe_candidate()"""
    flags, memory = row.flags, row.slot >= 0
    if row.type in (Type.EMULATE, Type.SPTE):
        return bool(flags & PRESENT)
    if row.type == Type.FAULT:
        return bool(flags & STUCK)
    if row.type == Type.FAULTIN:
        return row.slot >= SLOT_TSS
    if row.type == Type.FILL:
        return memory or bool(flags & SMM)
    if row.type == Type.MATCH:
        stale = flags & (SMM_SEEN | IS_CURRENT) == SMM_SEEN
        return memory or stale or bool(flags & OTHER_AS)
    if row.type in (Type.CACHE, Type.MMIO):
        return memory
    return True
