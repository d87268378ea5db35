# SPDX-License-Identifier: MIT
"""R5: a fault of L1 on a slot of KVM's own was sent to no-slot."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import (
    FAULTIN_SEEN,
    FILL_SEEN,
    Event,
    Needs,
    Rule,
    hides_from_l2,
    in_l1,
    in_memory,
    no_slot_fault,
)
from kvmprobe.probes.schema import Type


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:
    """Convict a fill or a no-slot fault of L1 on the TSS or identity map."""
    if hides_from_l2(e) and in_l1(e) and in_memory(e):
        return no_slot_fault(e, words, at)
    return 0


RULE = Rule(
    id="noslot-from-l1",
    fault="internal-slot",
    title="L1 touched memory of KVM's own and KVM found no memslot",
    severity="warning",
    severity_reason=(
        "No kernel may do this, but it is the access itself that went wrong and no trap is left "
        "for later ones beyond the cache entry."
    ),
    source=(
        "no kernel since 5.10.38 is known to do this; before, a lookup could race with "
        "KVM_MEMSLOT_INVALID, which the guard excludes"
    ),
    proves="KVM hides an internal memslot even from L1: an anomaly on every kernel.",
    guards=(
        "the level must be known, and be L1",
        "memslots must not have changed during the lookup (UNSTABLE)",
        "the slot must not be on its way out (SLOT_INVALID)",
        "a fill read back after its generation was gone says nothing: the slot may be younger",
        "gfn 0 never counts",
        "the APIC access page (gfn 0xfee00) never counts: emulating it is intended",
        "a fault seen both as FAULTIN and as FILL counts once",
    ),
    needs=Needs(convicts=((FILL_SEEN, FAULTIN_SEEN),)),
    goes_wrong=(
        "KVM makes memslots of its own for a guest (hidden TSS, identity map).  They are ordinary "
        "memory to the guest itself, L1.  Here KVM looked one up for L1 and acted as if nothing "
        "were there, so the access became MMIO.  No kernel is known to do this."
    ),
    guest_notices=("It reads wrong data or loses a write."),
    to_do=(
        "keep the capture, compare the kernel with its upstream, and report it to the people who "
        "built it."
    ),
    step=step,
    watches=(Type.FAULTIN, Type.FILL),
)
