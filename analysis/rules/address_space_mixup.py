# SPDX-License-Identifier: MIT
"""R4: an entry of one address space was believed for memory of the other."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import (
    MATCH_SEEN,
    Event,
    Needs,
    Rule,
    believed,
    in_l1,
    in_memory,
    smm_explains,
    wrong_address_space,
)
from kvmprobe.probes.schema import SLOT_TSS, Type

_MATCH = int(Type.MATCH)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:
    """Convict a match on memory with an entry of another address space or generation."""
    if not in_memory(e):
        return 0
    if e.type == _MATCH and not (
        wrong_address_space(e) or (e.slot < SLOT_TSS and in_l1(e) and smm_explains(e))
    ):
        return 0
    return believed(e, words, at)


RULE = Rule(
    id="address-space-mixup",
    fault="address-space",
    title="An access to memory became MMIO by an entry of the other address space",
    severity="critical",
    severity_reason=(
        "The firmware or the guest read wrong data or lost a write.  The match alone is enough, "
        "for KVM acts on it at once; MMIO at the same address follows as evidence where seen."
    ),
    source=(
        'CVE-2026-99082, fixed by "KVM: x86: Use active memslots for the per-vCPU MMIO cache", '
        "first in Debian 6.1.192-1, 6.12.115-1 and 7.2.12-1; reproduced on Debian 6.1.176, "
        "6.12.74, 6.12.107, 6.18.12 and 7.2.11, and not on 6.1.192-2, 6.12.117 and 7.2.13"
    ),
    proves=(
        "The kernel is vulnerable, and an access to memory became MMIO: by an entry filled in the "
        "other address space, or older than the memslots of the vCPU's own."
    ),
    guards=(
        "the VM must have two address spaces, and the vCPU's must be known",
        "the entry must be of another generation than the vCPU's own address space, or filled in "
        "the other one: a kernel without the fault believes neither; each half misses what the "
        "other finds",
        "where the address space of the fill isn't known, an entry for the VMM's memory counts in "
        "L1 if the vCPU was ever in SMM (TWO_AS and SMM_SEEN), for no other cause is known; an "
        "entry known to be filled here belongs to cache-hits-memory",
        "memslots must not have changed during the lookup (UNSTABLE)",
        "the slot must not be on its way out (SLOT_INVALID); without a slot the match is "
        "harmless, which address-space-generation reports",
        "gfn 0 never counts",
        "the APIC access page (gfn 0xfee00) never counts: emulating it is intended",
        "a reserved-bit fault (site RSVD) whose entry has address space 0's generation only never "
        "counts by itself; otherwise it and the match it leads to count once",
    ),
    needs=Needs(convicts=((MATCH_SEEN,),)),
    goes_wrong=(
        "A guest's firmware runs in system management mode (SMM), where it sees other memory than "
        "the guest does: KVM keeps two sets of memslots, called address spaces.  The last page "
        "that a vCPU took for MMIO is kept in a cache of one entry.  This kernel does not ask "
        "which of the two the entry belongs to.  The vCPU touched a page that is memory where it "
        "is now and was a hole where the entry was made, or when it was made, and the access went "
        "to the VMM."
    ),
    guest_notices=(
        "A read gave what the VMM answers for an unknown device, a write was lost.  It hits "
        "string port I/O and other emulated instructions, and plain loads and stores after memory "
        "was added to SMM's view only.  Firmware may hang or damage its variables; the guest may "
        "crash or go on with bad data."
    ),
    to_do=(
        "upgrade the kernel and restart the guest: Debian 6.1.192-1, 6.12.115-1 or 7.2.12-1, or "
        "newer of the same series.  No module parameter helps.  Where the firmware does not need "
        "SMM (no Secure Boot), QEMU can leave it out: -machine smm=off."
    ),
    step=step,
    watches=(Type.MATCH, Type.MMIO),
)
