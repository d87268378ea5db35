# SPDX-License-Identifier: MIT
"""R1: an access of L2 to a slot of KVM's own was taken for MMIO, and the cache learnt it."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import (
    ACQUITS,
    CAUSE,
    CONVICTS,
    FAULTIN_SEEN,
    FILL_SEEN,
    Event,
    Needs,
    Rule,
    hides_from_l2,
    in_l2,
    in_memory,
    no_slot_fault,
)
from kvmprobe.probes.schema import FaultinResult, Type

_FAULTIN = int(Type.FAULTIN)
_FILL = int(Type.FILL)
_KEPT = int(FaultinResult.KEPT)

#: What the rules on this fault have in common.
SOURCE = (
    '3a2936dedd20 "kvm: mmu: Don\'t expose private memslots to L2"; the mail '
    "20240228024147.41573-11-seanjc@google.com takes it back; fixed in Linux 6.10"
)
TO_DO = (
    "boot a kernel with the fix: Linux 6.10 or newer, as in Debian 13 (6.12) and in Debian 12's "
    "backports; Debian 12's own 6.1 has no fix.  Or turn unrestricted guest on where the processor "
    "has it (kvm_intel.unrestricted_guest=1, which needs kvm_intel.ept=1).  Or offer the guest no "
    "nested virtualization (kvm_intel.nested=0, or a CPU model without vmx)."
)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:
    """Convict a fill or a no-slot fault of L2 on the TSS or identity map; acquit a kept one."""
    if not (hides_from_l2(e) and in_l2(e) and in_memory(e)):
        return 0
    if e.type == _FAULTIN and e.kind == _KEPT:
        return ACQUITS
    code = no_slot_fault(e, words, at)
    if code == CONVICTS or (code != 0 and e.type == _FILL):
        code |= CAUSE
    return code


RULE = Rule(
    id="internal-slot-fill",
    fault="internal-slot",
    title="L2 touched memory of KVM's own and KVM took it for MMIO",
    severity="warning",
    severity_reason=(
        "It proves that the kernel has the fault.  The guest was harmed only if L1 was hit later, "
        "which internal-slot-hit reports."
    ),
    source=SOURCE,
    proves="The kernel hides its internal memslots from L2: it is vulnerable.",
    guards=(
        "the level must be known, and be L2",
        "memslots must not have changed during the lookup (UNSTABLE)",
        "the slot must not be on its way out (SLOT_INVALID)",
        "a fill read back after its generation was gone says nothing: the slot may be younger",
        "gfn 0 never counts",
        "the APIC access page (gfn 0xfee00) never counts: emulating it is intended",
        "a fault seen both as FAULTIN and as FILL counts once",
    ),
    needs=Needs(convicts=((FILL_SEEN, FAULTIN_SEEN),), acquits=(FAULTIN_SEEN,)),
    goes_wrong=(
        "KVM makes memslots of its own for a guest: the hidden TSS (3 pages) and the identity map "
        "(1 page), needed on Intel hosts without unrestricted guest.  A guest hypervisor (L1) sees "
        "them as ordinary memory.  This kernel hides them from the nested guest (L2).  When L2 "
        "touches such a page, KVM treats the access as MMIO and notes the page in the vCPU's MMIO "
        "cache.  The note outlives the return to L1."
    ),
    guest_notices=(
        "The nested guest reads from and writes to the VMM instead of memory: it reads what the "
        "VMM answers for an unknown device, and what it writes is lost."
    ),
    to_do=TO_DO,
    step=step,
    watches=(Type.FAULTIN, Type.FILL),
    acquittal=("fault(s) of L2 on KVM's own memslots were kept: the kernel shows them to L2"),
)
