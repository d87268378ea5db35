# SPDX-License-Identifier: MIT
"""R11: an MMIO SPTE was written over one that was still present."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import CONVICTS, Event, Needs, Observation, Rule
from kvmprobe.probes.schema import Flag, Site, SpteChange, Type

_SPTE = int(Type.SPTE)
_MARKED = int(SpteChange.MARKED)
_GUARDED = int(Flag.PRESENT | Flag.DIRECT | Flag.AS_KNOWN)
_PRESENT = int(Flag.PRESENT | Flag.AS_KNOWN)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:  # noqa: ARG001 - every step has this form
    """Convict an MMIO SPTE made by shadow paging over a present one."""
    if e.type == _SPTE and e.kind == _MARKED and e.flags & _GUARDED == _PRESENT:
        return CONVICTS
    return 0


RULE = Rule(
    id="spte-overwrite",
    fault="spte-overwrite",
    title="Shadow paging wrote an MMIO entry over one that was still in use",
    severity="warning",
    severity_reason=(
        "The host's own bookkeeping is damaged: the reverse map keeps an entry that leads "
        "nowhere.  The guest gets the right result, and what follows in the host was not shown, so "
        "this is not critical."
    ),
    source=(
        "CVE-2026-23401, fixed first in Debian 6.1.170-1 and 6.12.85-1; mark_mmio_spte() called by "
        "mmu_set_spte(), where the kernel warns once per boot (mmu.c, mark_mmio_spte); reproduced "
        "on Debian 6.12.74 and 6.18.12, and not on 6.1.176, 6.12.107 and 7.2.13"
    ),
    proves=(
        "The kernel is vulnerable, and it happened.  Nothing that can be observed proves a kernel "
        "free of it: those drop the old entry first and say nothing, so the verdict is never fixed."
    ),
    guards=(
        "the old entry must have been present (bit 11, SPTE_MMU_PRESENT), with bit 63 clear, and "
        "differ from the new one",
        "the MMU must be a shadow MMU (not DIRECT): the TDP MMU stores first and traces after, "
        "when another vCPU may have replaced the entry already; this leaves out a guest without "
        "paging, whose shadow MMU is direct too",
        "the kind of MMU must be known, which events that say the address space (AS_KNOWN) tell",
        "a check of an MMIO SPTE (CHECK_MMIO_SPTE) never counts",
    ),
    needs=Needs(convicts=((Observation(Type.SPTE, (Site.MARK_MMIO_SPTE,)),),)),
    goes_wrong=(
        "Without nested paging, or for a nested guest, KVM translates the guest's page tables into "
        "shadow page tables.  A guest's page pointed at memory; then its page table was changed "
        "behind KVM's back, by the VMM or a device, to point at nothing.  KVM wrote its mark for "
        "MMIO over the entry without taking the old one out of its books, so those still name an "
        "entry that maps the page no more."
    ),
    guest_notices=(
        "Nothing: its access is emulated as it should be.  The host's kernel may warn in "
        "mark_mmio_spte, once per boot; later use of the stale record can harm the host."
    ),
    to_do=(
        "upgrade the kernel: Debian 6.1.170-1 or 6.12.85-1, or newer of the same series, and "
        "reboot.  Until then keep nested paging on (kvm_intel.ept=1, kvm_amd.npt=1) and offer "
        "guests no nested virtualization (kvm_intel.nested=0, kvm_amd.nested=0): both leave no "
        "shadow page tables."
    ),
    step=step,
    watches=(Type.SPTE,),
)
