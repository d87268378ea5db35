# SPDX-License-Identifier: MIT
"""R6: accesses of L2 to the APIC access page that KVM emulated; information only."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import (
    APIC_GFN,
    CONVICTS,
    Event,
    Needs,
    Observation,
    Rule,
    in_l2,
)
from kvmprobe.probes.schema import SLOT_APIC, Flag, Site, Type

_MMIO = int(Type.MMIO)
_UNTRUSTED = int(Flag.UNSTABLE | Flag.SLOT_INVALID)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:  # noqa: ARG001 - every step has this form
    """Count emulated accesses of L2 to the APIC access page."""
    if (
        e.type == _MMIO
        and e.slot == SLOT_APIC
        and e.gfn == APIC_GFN
        and e.flags & _UNTRUSTED == 0
        and in_l2(e)
    ):
        return CONVICTS
    return 0


RULE = Rule(
    id="apic-page-emulated",
    fault="internal-slot",
    title="L2 touched the APIC access page, which KVM emulates",
    severity="info",
    severity_reason="Every kernel does this on purpose; it only costs time.",
    source="vcpu_is_mmio_gpa() takes the page 0xfee00000 for MMIO in every version, by design",
    proves="Nothing about a fault: each access costs an exit to L0 and an emulation.",
    guards=(
        "the level must be known, and be L2",
        "memslots must not have changed during the lookup (UNSTABLE)",
        "the slot must not be on its way out (SLOT_INVALID)",
        "the page must be the APIC access page and lie in KVM's own slot for it",
    ),
    needs=Needs(convicts=((Observation(Type.MMIO, (Site.MMIO,)),),)),
    goes_wrong=(
        "The nested guest (L2) uses the page at 0xfee00000, behind which KVM keeps a page of its "
        "own to speed up the interrupt controller.  KVM emulates such accesses of L2 in every "
        "version.  They are right but slow."
    ),
    guest_notices=("Nothing, or that L2 is slow: a high rate shows as time spent in the host."),
    to_do=("nothing, unless the rate is high; then let L2 use x2APIC."),
    step=step,
    watches=(Type.MMIO,),
    accuses=False,
)
