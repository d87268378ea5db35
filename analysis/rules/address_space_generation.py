# SPDX-License-Identifier: MIT
"""R4 without harm: the MMIO cache's generation is taken from the wrong address space."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import (
    ACQUITS,
    CACHE_SEEN,
    CONVICTS,
    FILL_SEEN,
    MATCH_SEEN,
    Event,
    Needs,
    Rule,
    generation_matches,
    in_l1,
    in_memory,
    smm_explains,
    wrong_address_space,
)
from kvmprobe.probes.schema import SLOT_TSS, Flag, Site, Type

_CACHE = int(Type.CACHE)
_FILL = int(Type.FILL)
_MATCH = int(Type.MATCH)
_RSVD = int(Site.RSVD)
_SMM = int(Flag.SMM)
_UNSTABLE = int(Flag.UNSTABLE)
_IN_SMM = int(Flag.TWO_AS | Flag.AS_KNOWN | Flag.SMM | Flag.GEN_KNOWN)
_GENERATIONS = int(Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT)
_AS0 = int(Flag.GEN_IS_AS0)
_CURRENT = int(Flag.GEN_IS_CURRENT)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:  # noqa: ARG001 - every step has this form
    """Judge a fill in SMM by its generation; convict a harmless match and an armed entry."""
    if e.flags & _UNSTABLE != 0:
        return 0
    if e.type == _FILL:
        if e.flags & _IN_SMM != _IN_SMM:
            return 0
        if e.flags & _GENERATIONS == _AS0:
            return CONVICTS
        return ACQUITS if e.flags & _GENERATIONS == _CURRENT else 0
    if e.type == _MATCH:
        # With memory behind the page it is a misread: address-space-mixup has it.
        convicts = e.site != _RSVD and wrong_address_space(e) and not in_memory(e)
    else:
        convicts = (
            e.type == _CACHE
            and e.slot < SLOT_TSS
            and e.flags & _SMM == 0
            and in_l1(e)
            and in_memory(e)
            and generation_matches(e)
            and smm_explains(e)
        )
    return CONVICTS if convicts else 0


RULE = Rule(
    id="address-space-generation",
    fault="address-space",
    title="The MMIO cache goes by the memslots of the wrong address space",
    severity="warning",
    severity_reason=(
        "It proves that the kernel has the fault, and nobody was harmed: the access was MMIO "
        "anyway, or the entry only waits.  address-space-mixup reports harm."
    ),
    source=(
        'CVE-2026-99082, fixed by "KVM: x86: Use active memslots for the per-vCPU MMIO cache", '
        "first in Debian 6.1.192-1, 6.12.115-1 and 7.2.12-1; vcpu_cache_mmio_info() and "
        "vcpu_match_mmio_gen() take kvm_memslots() on kernels with the fault and "
        "kvm_vcpu_memslots() on others"
    ),
    proves=(
        "The kernel takes the generation of the MMIO cache from address space 0 even in SMM: it "
        "is vulnerable."
    ),
    guards=(
        "the VM must have two address spaces, and the vCPU's must be known",
        "memslots must not have changed during the lookup (UNSTABLE)",
        "a fill counts in SMM only: outside SMM both kinds of kernel store the same generation",
        "a fill whose generation is neither address space's, or both, decides nothing",
        "a match counts if its entry is of another generation than the vCPU's own address space, "
        "or was filled in the other one; a fill in an unknown address space can't say the latter",
        "a reserved-bit fault (site RSVD) never counts: the match that follows does",
        "a held entry counts outside SMM only, in L1, live, for a valid memslot of the VMM, in a "
        "vCPU that was in SMM (TWO_AS and SMM_SEEN) and not filled here: in SMM a kernel without "
        "the fault holds such entries too, and does not believe them",
    ),
    needs=Needs(convicts=((FILL_SEEN, CACHE_SEEN), (MATCH_SEEN,)), acquits=(FILL_SEEN,)),
    goes_wrong=(
        "A guest's firmware runs in system management mode (SMM), where it sees other memory than "
        "the guest does: KVM keeps two sets of memslots, called address spaces.  The last page "
        "that a vCPU took for MMIO is kept in a cache of one entry, which ends when the memslots "
        "change.  This kernel always looks at the first set, even in SMM, so an entry made in one "
        "mode is believed in the other, and outlives changes of the second set."
    ),
    guest_notices=(
        "Nothing so far: what was believed was right by chance, or not used yet.  The same on a "
        "page that is memory in one mode only gives wrong data."
    ),
    to_do=(
        "upgrade the kernel: Debian 6.1.192-1, 6.12.115-1 or 7.2.12-1, or newer of the same "
        "series.  No module parameter helps.  Where the firmware does not need SMM (no Secure "
        "Boot), QEMU can leave it out: -machine smm=off."
    ),
    step=step,
    watches=(Type.FILL, Type.CACHE, Type.MATCH),
    acquittal="fill(s) in SMM had the generation of SMM's own address space: the kernel is fixed",
)
