# SPDX-License-Identifier: MIT
"""R3: the poisoned cache was believed for an access of L1 to memory."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.internal_slot_fill import SOURCE, TO_DO
from kvmprobe.analysis.rules.model import (
    CITES,
    CONVICTS,
    MATCH_SEEN,
    Event,
    Needs,
    Rule,
    believed,
    filled_in_smm,
    hides_from_l2,
    in_l1,
    in_memory,
)
from kvmprobe.probes.schema import Type


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:
    """Convict a match in L1 on the TSS or identity map; MMIO on that page follows as evidence."""
    if not (hides_from_l2(e) and in_l1(e) and in_memory(e)) or filled_in_smm(e):
        return 0
    code = believed(e, words, at)
    return code | CITES if code == CONVICTS else code


RULE = Rule(
    id="internal-slot-hit",
    fault="internal-slot",
    title="L1 was sent to MMIO for an access to memory",
    severity="critical",
    severity_reason=(
        "The guest read wrong data or lost a write.  MMIO at the same address follows as evidence "
        "where it was seen; the match alone is enough, for KVM acts on it at once."
    ),
    source=SOURCE,
    proves="The kernel is vulnerable and the fault did its harm to L1.",
    guards=(
        "the level must be known, and be L1",
        "memslots must not have changed during the lookup (UNSTABLE)",
        "the slot must not be on its way out (SLOT_INVALID)",
        "an entry known to be filled in SMM is not L2's: it is left to the address-space fault",
        "an entry made before the recording began is taken for L2's: SMM can have made it only on "
        "a kernel with CVE-2026-99082, while KVM was making its slot, and VMMs have KVM make it "
        "before a vCPU runs",
        "gfn 0 never counts",
        "the APIC access page (gfn 0xfee00) never counts: emulating it is intended",
        "a reserved-bit fault (site RSVD) and the match it leads to count once",
        "a reserved-bit fault in SMM whose entry has address space 0's generation only never "
        "counts by itself: a kernel without CVE-2026-99082 does not believe it",
        "the exit to the VMM is evidence, never a condition",
    ),
    needs=Needs(convicts=((MATCH_SEEN,),)),
    goes_wrong=(
        "The guest hypervisor (L1) touched memory and KVM believed its MMIO cache instead: the "
        "access went to the VMM.  The entry came from an access of the nested guest (L2) to memory "
        "that KVM made for itself; the newest such access on this vCPU stands first in the "
        "evidence."
    ),
    guest_notices=(
        "A read gave what the VMM answers for an unknown device, a write was lost.  It shows as "
        "wrong data from string port I/O, from emulated instructions, and at times from plain "
        "loads and stores; the guest can crash or go on with bad data."
    ),
    to_do="restart the guest, and " + TO_DO,
    step=step,
    watches=(Type.MATCH, Type.MMIO),
)
