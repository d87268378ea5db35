# SPDX-License-Identifier: MIT
"""R7: an access to backed memory became MMIO, and the cache had no part in it."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import (
    APIC_GFN,
    CONVICTS,
    MATCH_SEEN,
    Event,
    Needs,
    Observation,
    Rule,
)
from kvmprobe.probes.schema import Flag, MmioType, Site, Type

_MMIO = int(Type.MMIO)
_UNSATISFIED_READ = int(MmioType.UNSATISFIED_READ)
_WRITE = int(MmioType.WRITE)
_READONLY = int(Flag.SLOT_READONLY)
_NEVER = int(Flag.MATCHED | Flag.UNSTABLE | Flag.SLOT_INVALID | Flag.SLOT_PRESUMED)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:  # noqa: ARG001 - every step has this form
    """Convict MMIO on a valid slot without a match in the same emulation."""
    if e.type != _MMIO or e.slot < 0 or e.flags & _NEVER != 0 or e.gfn == APIC_GFN:
        return 0
    if e.kind == _UNSATISFIED_READ or (e.kind == _WRITE and e.flags & _READONLY == 0):
        return CONVICTS
    return 0


RULE = Rule(
    id="unexplained-mmio",
    fault="host-memory",
    title="Host memory access failure: an access to backed memory became MMIO",
    severity="warning",
    severity_reason=(
        "The guest read wrong data or lost a write, but the VMM did not provide the memory it "
        "promised: it is no fault of KVM's, and gets no verdict."
    ),
    source=(
        "emulator_read_write_onepage(): an access is MMIO if kvm_vcpu_read_guest() or "
        "kvm_vcpu_write_guest() fails; derived from the source, not reproduced"
    ),
    proves=(
        "KVM found a memslot and could not reach the VMM's memory behind it: unmapped, protected, "
        "poisoned, or waiting for user space (userfaultfd).  It proves nothing against the kernel."
    ),
    guards=(
        "only unsatisfied reads and writes (kvm_mmio types 0 and 2), taken at kvm_mmio, where the "
        "memslots can't go away",
        "the slot must have been looked up, not presumed",
        "memslots must not have changed during the lookup (UNSTABLE)",
        "the slot must not be on its way out (SLOT_INVALID)",
        "the MMIO cache must not have been believed in the same emulation (MATCHED): other rules "
        "have that",
        "a write to a read-only slot (KVM_MEM_READONLY) never counts: ROM and flash are MMIO then",
        "the APIC access page (gfn 0xfee00) never counts: emulating it is intended",
    ),
    needs=Needs(convicts=((Observation(Type.MMIO, (Site.MMIO,)),), (MATCH_SEEN,))),
    goes_wrong=(
        "A guest's memory is memory of the VMM's process.  KVM emulated an instruction of the "
        "guest, found that its address has memory behind it, and failed to reach that memory in "
        "the VMM's process.  So it asked the VMM to answer, as for a device."
    ),
    guest_notices=(
        "A read gives what the VMM answers for an unknown device, a write is lost, or the VMM "
        "stops the guest."
    ),
    to_do=(
        "look at what the VMM does with that memory: memory backends that were unplugged or whose "
        "file was cut short, balloons, post-copy migration (userfaultfd), and memory errors in the "
        "host's log (hwpoison)."
    ),
    step=step,
    watches=(Type.MMIO,),
    accuses=False,
)
