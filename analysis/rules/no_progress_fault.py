# SPDX-License-Identifier: MIT
"""R10: a vCPU repeats one fault and KVM gets nowhere."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import CONVICTS, Event, Needs, Observation, Rule
from kvmprobe.probes.schema import Flag, Site, Type

_FAULT = int(Type.FAULT)
_STUCK = int(Flag.STUCK)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:  # noqa: ARG001 - every step has this form
    """Convict a fault that the probe found in a long row of equal ones."""
    return CONVICTS if e.type == _FAULT and e.flags & _STUCK != 0 else 0


RULE = Rule(
    id="no-progress-fault",
    fault="no-progress",
    title="A vCPU repeats the same page fault without progress",
    severity="warning",
    severity_reason=(
        "The vCPU stands still and burns a CPU while it lasts; no data goes wrong.  The cause can "
        "lie outside KVM, so there is no verdict."
    ),
    source=(
        "KVM's counters pf_taken, pf_fixed, pf_emulate and pf_spurious (6.1 and newer); a known "
        "instance is the sign extension of mmu_seq, mended in 6.1.52; derived from the source, not "
        "reproduced"
    ),
    proves=(
        "At least 1000 faults in a row, over at least 1 s, had one address and one error code, and "
        "KVM neither mapped, emulated nor dismissed one of them.  It does not say why."
    ),
    guards=(
        "the address and the error code must be the same in the whole row",
        "each fault must have reached KVM's handler (pf_taken moves)",
        "one that is mapped, emulated or found spurious (pf_fixed, pf_emulate, pf_spurious) ends "
        "the row",
        "the probe counts, so lost events neither make nor break a row; it tells at 1000 and 1 s, "
        "and each time the row has doubled since: an occurrence is not a fault",
    ),
    needs=Needs(convicts=((Observation(Type.FAULT, (Site.PAGE_FAULT, Site.PAGE_FAULT_TP)),),)),
    goes_wrong=(
        "The guest touched a page, KVM could not map it yet and let the guest try again; the same "
        "happened thousands of times.  Normally a retry or two is enough."
    ),
    guest_notices=(
        "A vCPU hangs: soft lockups, stalled RCU, timeouts.  The host shows one thread of the VMM "
        "at 100 %."
    ),
    to_do=(
        "update the kernel if it is a 6.1 older than 6.1.52.  Otherwise look for what keeps the "
        "host's memory moving: migration, ballooning, KSM, NUMA balancing "
        "(kernel.numa_balancing=0), huge page compaction.  Keep the capture and report it if it "
        "lasts."
    ),
    step=step,
    watches=(Type.FAULT,),
    accuses=False,
)
