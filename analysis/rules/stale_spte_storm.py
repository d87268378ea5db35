# SPDX-License-Identifier: MIT
"""R8: a VM's memslots change so often that nothing KVM keeps about MMIO stays valid."""

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import CONVICTS, Event, Needs, Observation, Rule
from kvmprobe.probes.schema import Site, Type

_GENERATION = int(Type.GENERATION)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
#: A second, in ns; generations in it that are too many; such seconds in a row that are a storm.
_SECOND = np.uint64(10**9)
_MANY = np.uint64(100)
_SECONDS = np.uint64(5)


def step(e: Event, words: NDArray[np.uint64], at: int) -> int:
    """Convict each second that ends at least five full ones.

    words[at] is when the second began, words[at + 1] its generations so far, words[at + 2] how many
    full seconds came before it.  A time before the second began counts into it: time may go back
    between CPUs.
    """
    if e.type != _GENERATION:
        return 0
    begin, count, full = words[at], words[at + 1], words[at + 2]
    if count == _ZERO:
        words[at] = e.ts
        words[at + 1] = _ONE
        return 0
    if e.ts < begin or e.ts - begin < _SECOND:
        words[at + 1] = count + _ONE
        return 0
    full = full + _ONE if count >= _MANY else _ZERO
    words[at + 1] = _ONE
    if e.ts - begin < _SECOND + _SECOND:
        words[at] = begin + _SECOND
        words[at + 2] = full
    else:
        words[at] = e.ts
        words[at + 2] = _ZERO
    return CONVICTS if full >= _SECONDS else 0


RULE = Rule(
    id="stale-spte-storm",
    fault="memslot-churn",
    title="A VM's memslots change all the time",
    severity="info",
    severity_reason="It costs time and harms no data: KVM does what the VMM asks for.",
    source=(
        "check_mmio_spte() calls an MMIO SPTE stale whose generation isn't the current one; "
        "generations from kvm_arch_memslots_updated(); reproduced on Debian kernels 6.1 to 6.18"
    ),
    proves=(
        "The memslot generation of one VM moved at least 100 times in each of 5 seconds in a row. "
        "An occurrence is a second of it."
    ),
    guards=(
        "each second counts from the end of the one before; a second with fewer generations, or "
        "without any, ends the row",
        "one VM at a time; where no function probe reports generations, one vCPU at a time, which "
        "may miss some and never sees too many",
        "stale SPTEs by themselves never count: one for each root and page after a change of the "
        "memslots is normal",
        "the generation's wrap, at which KVM drops all shadow pages (every 2^17 to 2^18 changes "
        "with two address spaces), isn't observed: its tracepoint would be needed, and the width "
        "isn't in BTF",
    ),
    needs=Needs(
        convicts=(
            (Observation(Type.GENERATION, (Site.MEMSLOTS_UPDATED, Site.EMULATE_INSN, Site.ENTRY)),),
        )
    ),
    goes_wrong=(
        "KVM numbers the states of a VM's memory layout, and trusts what it keeps about MMIO only "
        "while the number stands.  The VMM creates, deletes, moves or reflags memslots so often "
        "that every vCPU finds its notes out of date again and again, and walks the slow path."
    ),
    guest_notices=(
        "Device access is slow, and vCPUs stall for moments; at times all of the guest's page "
        "tables in the host are built anew."
    ),
    to_do=(
        "find what the VMM does: dirty logging switched on and off for a display or a migration, "
        "PCI windows (BARs) or SMRAM moved by the firmware in a loop, memory hotplug.  A newer VMM "
        "may do it less."
    ),
    step=step,
    watches=(Type.GENERATION,),
    accuses=False,
)
