# SPDX-License-Identifier: MIT
"""R2's last sentence: the MMIO cache holds, or was believed for, a page of the VMM's memory."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import (
    CACHE_SEEN,
    CONVICTS,
    MATCH_SEEN,
    Event,
    Needs,
    Rule,
    believed,
    generation_matches,
    in_l1,
    in_memory,
    smm_explains,
    wrong_address_space,
)
from kvmprobe.probes.schema import SLOT_TSS, Type

_CACHE = int(Type.CACHE)
_FILL = int(Type.FILL)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:
    """Convict a live entry or a match in L1 on a user slot, unless SMM could explain it."""
    if not (e.slot < SLOT_TSS and in_l1(e) and in_memory(e)):
        return 0
    if wrong_address_space(e) or smm_explains(e):
        return 0
    if e.type == _CACHE or e.type == _FILL:
        return CONVICTS if generation_matches(e) else 0
    return believed(e, words, at)


RULE = Rule(
    id="cache-hits-memory",
    fault="cache-hits-memory",
    title="The MMIO cache holds memory of the guest",
    severity="critical",
    severity_reason=(
        "It is the guest's own RAM, which it touches all the time, and no correct kernel leaves "
        "such an entry: whatever made it will do so again."
    ),
    source=(
        "no upstream commit: the cause is unknown; KVM's invariant is that a new memslot moves "
        "the generation and so ends every cache entry (vcpu_match_mmio_gen())"
    ),
    proves=(
        "A live cache entry and a valid memslot of the VMM exist for the same page, so emulated "
        "accesses to that memory become MMIO.  It says nothing about the cause."
    ),
    guards=(
        "the level must be known, and be L1",
        "memslots must not have changed during the lookup (UNSTABLE)",
        "the slot must not be on its way out (SLOT_INVALID)",
        "an entry that was only held must have a known generation that this kernel compares with",
        "an entry that SMM can explain is evidence of the address-space fault (CVE-2026-99082), "
        "not of this one: of another address space or generation, or of an unknown address space "
        "while the vCPU was ever in SMM (TWO_AS and SMM_SEEN)",
        "gfn 0 never counts: the cache can hold it but never matches it",
        "the APIC access page (gfn 0xfee00) never counts: emulating it is intended",
        "slots of KVM's own never count here: internal-slot-armed and internal-slot-hit have them",
    ),
    needs=Needs(convicts=((CACHE_SEEN,), (MATCH_SEEN,))),
    goes_wrong=(
        "KVM keeps the last page it took for MMIO in a cache of one entry per vCPU.  Here that "
        "page is memory which the VMM gave to the guest.  Adding memory ends every entry, so a "
        "correct kernel cannot get here and the cause is not known.  If the guest's firmware used "
        "system management mode before the recording began, it may be the address-space fault "
        "(CVE-2026-99082)."
    ),
    guest_notices=(
        "An emulated access to the page goes to the VMM instead of memory: a read gives wrong "
        "data, a write is lost."
    ),
    to_do=(
        "record again from the start of the guest, keep the capture, update the kernel, and "
        "report it."
    ),
    step=step,
    watches=(Type.FILL, Type.CACHE, Type.MATCH, Type.MMIO),
)
