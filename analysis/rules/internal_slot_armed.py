# SPDX-License-Identifier: MIT
"""R2: the vCPU runs L1 while its MMIO cache holds a page of KVM's own slots."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.internal_slot_fill import SOURCE, TO_DO
from kvmprobe.analysis.rules.model import (
    CACHE_SEEN,
    CITES,
    CONVICTS,
    FILL_SEEN,
    Event,
    Needs,
    Rule,
    filled_in_smm,
    generation_matches,
    hides_from_l2,
    in_l1,
    in_memory,
)
from kvmprobe.probes.schema import Type

_CACHE = int(Type.CACHE)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:  # noqa: ARG001 - every step has this form
    """Convict a live cache entry on the TSS or identity map, found while the vCPU runs L1."""
    if (
        e.type == _CACHE
        and hides_from_l2(e)
        and in_l1(e)
        and in_memory(e)
        and generation_matches(e)
        and not filled_in_smm(e)
    ):
        return CONVICTS | CITES
    return 0


RULE = Rule(
    id="internal-slot-armed",
    fault="internal-slot",
    title="The MMIO cache of a vCPU in L1 holds a page of KVM's own memory",
    severity="warning",
    severity_reason=(
        "The next emulated access of L1 to that page goes wrong, but none was seen yet: one "
        "memslot change or one true MMIO access disarms it."
    ),
    source=SOURCE,
    proves=(
        "L2 filled the cache on a vulnerable kernel, perhaps before the recording began, and the "
        "entry is still live for L1."
    ),
    guards=(
        "the level must be known, and be L1",
        "memslots must not have changed during the lookup (UNSTABLE)",
        "the slot must not be on its way out (SLOT_INVALID)",
        "the entry's generation must be known and be the one this kernel compares with",
        "an entry known to be filled in SMM is not L2's: it is left to the address-space fault",
        "an entry made before the recording began is taken for L2's: SMM can have made it only on "
        "a kernel with CVE-2026-99082, while KVM was making its slot, and VMMs have KVM make it "
        "before a vCPU runs",
        "gfn 0 never counts: the cache can hold it but never matches it",
        "the APIC access page (gfn 0xfee00) never counts: emulating it is intended",
    ),
    needs=Needs(convicts=((CACHE_SEEN, FILL_SEEN),)),
    goes_wrong=(
        "KVM keeps the last page it took for MMIO in a cache of one entry per vCPU.  This entry "
        "points at memory that KVM made for itself (hidden TSS or identity map) and is still "
        "valid while the guest hypervisor (L1) runs.  As soon as KVM emulates an instruction of "
        "L1 that touches the page, the access goes to the VMM instead of memory."
    ),
    guest_notices=(
        "Nothing yet.  The next emulated access of L1 to that page reads wrong data or loses a "
        "write."
    ),
    to_do=TO_DO,
    step=step,
    watches=(Type.CACHE,),
)
