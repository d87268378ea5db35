# SPDX-License-Identifier: MIT
"""R12: L2's access to a page where KVM may have a slot of its own; information only."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.internal_slot_fill import SOURCE
from kvmprobe.analysis.rules.model import (
    APIC_GFN,
    FAULTIN_SEEN,
    FILL_SEEN,
    Event,
    Needs,
    Rule,
    hides_from_l2,
    in_l2,
    no_slot_fault,
)
from kvmprobe.probes.schema import Flag, Type

_DOUBT = int(Flag.SLOT_PRESUMED | Flag.UNSTABLE)
_GFN_0 = np.uint64(0)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:
    """Count no-slot faults of L2 where a slot of KVM's own is presumed and no memory was shown."""
    if (
        e.flags & _DOUBT == _DOUBT
        and hides_from_l2(e)
        and in_l2(e)
        and e.gfn != _GFN_0
        and e.gfn != APIC_GFN
    ):
        return no_slot_fault(e, words, at)
    return 0


RULE = Rule(
    id="internal-slot-presumed",
    fault="internal-slot",
    title="L2 touched a page where KVM may have memory of its own, and KVM took it for MMIO",
    severity="info",
    severity_reason=(
        "It is harmless on most hosts: with unrestricted guest KVM has no memory there, and the "
        "page is a hole for every level."
    ),
    source=SOURCE,
    proves=(
        "Nothing by itself: the trace does not say where KVM's own memslots are, and showed no "
        "memory behind the page until then."
    ),
    guards=(
        "the level must be known, and be L2",
        "the slot must be presumed (SLOT_PRESUMED), with no memory shown behind the page so far "
        "(UNSTABLE)",
        "a fill read back after its generation was gone says nothing",
        "gfn 0 and the APIC access page (gfn 0xfee00) never count",
        "a fault seen both as FAULTIN and as FILL counts once",
    ),
    needs=Needs(convicts=((FILL_SEEN, FAULTIN_SEEN),)),
    goes_wrong=(
        "The nested guest (L2) touched one of the well-known addresses at which VMMs let KVM put "
        "its hidden TSS or identity map, and KVM treated the access as MMIO.  Where KVM has such "
        "memory, that is the fault which internal-slot-fill reports.  Where it has none, it is "
        "what must happen.  A trace of another tool does not tell which."
    ),
    guest_notices="Nothing if the page is a hole; else the same as for internal-slot-fill.",
    to_do=(
        "say where the memslots are, if you know (kvmprobe import --internal-slot), or record on "
        "that host with kvmprobe record, which looks them up."
    ),
    step=step,
    watches=(Type.FAULTIN, Type.FILL),
    accuses=False,
    doubts=True,
)
