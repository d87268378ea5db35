# SPDX-License-Identifier: MIT
"""What a rule is, what it sees of an event, and the guards that all rules share.

A rule is a frozen `Rule` and a step function.  The step function sees one event and four words of
its own per vCPU, and answers with a code.  numba compiles it as it stands, so it holds plain scalar
code only.  64-bit values and constants are uint64: numba compares uint64 with int64 as floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import SLOT_IDENTITY, SLOT_TSS, FaultinResult, Flag, Site, Type

# What a step function answers: any of these, or 0 for "nothing to me".
CONVICTS = 1  #: counts as one occurrence, and is evidence
EVIDENCE = 2  #: belongs to an occurrence that was counted already
ACQUITS = 4  #: proves that the kernel does the right thing
CAUSE = 8  #: remember this event as the vCPU's newest cause
CITES = 16  #: the newest cause belongs to this event's evidence

#: Words of memory a rule has per vCPU, all 0 when the vCPU appears.
WORDS = 4

SEVERITIES = ("info", "warning", "critical")

_L2 = int(Flag.L2)
_LEVEL_KNOWN = int(Flag.LEVEL_KNOWN)
_LEVEL = _L2 | _LEVEL_KNOWN
_UNTRUSTED = int(Flag.UNSTABLE | Flag.SLOT_INVALID)
_GEN_KNOWN = int(Flag.GEN_KNOWN)
_GEN_EITHER = int(Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT)
_GEN_CURRENT = int(Flag.GEN_IS_CURRENT)
_GEN_NOT_CURRENT = _GEN_KNOWN | _GEN_CURRENT
_TWO_KNOWN_AS = int(Flag.TWO_AS | Flag.AS_KNOWN)
_FILL_AS = int(Flag.FILL_AS_KNOWN | Flag.OTHER_AS)
_FILL_AS_KNOWN = int(Flag.FILL_AS_KNOWN)
_OTHER_AS = int(Flag.OTHER_AS)
_SMM = int(Flag.SMM)
_SMM_AT_WORK = int(Flag.TWO_AS | Flag.SMM_SEEN)
_FILL = int(Type.FILL)
_FAULTIN = int(Type.FAULTIN)
_MATCH = int(Type.MATCH)
_MMIO = int(Type.MMIO)
_NOSLOT = int(FaultinResult.NOSLOT)
_RSVD = int(Site.RSVD)
_NONE = np.uint64(0)
_ONE = np.uint64(1)
#: The page that KVM always emulates, whatever the cache holds (vcpu_is_mmio_gpa()).
APIC_GFN = np.uint64(0xFEE00)


class Event(NamedTuple):
    """What a step function sees of an event: fields of events.h, `gfn` for the page of `addr`."""

    ts: np.uint64
    type: int
    site: int
    flags: int
    gfn: np.uint64
    slot: int
    kind: int


#: An event, the memory of all rules, and where this rule's words for that vCPU begin -> code.
Step = Callable[[Event, NDArray[np.uint64], int], int]


@dataclass(frozen=True)
class Observation:
    """An observation and the sites any of which gives it in full; no sites: any site will do."""

    type: Type
    sites: tuple[Site, ...] = ()

    def __str__(self) -> str:
        """Name it as plans do: FAULTIN at FAULTIN or SPTE_REQUESTED."""
        return self.type.name + (
            " at " + " or ".join(site.name for site in self.sites) if self.sites else ""
        )


@dataclass(frozen=True)
class Needs:
    """What must have been observed before silence means anything.

    Each entry of `convicts` and the whole of `acquits` are alternatives: one of them is enough.
    Every entry of `convicts` must be met.
    """

    convicts: tuple[tuple[Observation, ...], ...]
    acquits: tuple[Observation, ...] = ()


@dataclass(frozen=True)
class Rule:
    """One rule: what it finds, where that is known from, and how it is found.

    The explanation is for somebody who has never read KVM, in three parts: what `goes_wrong`, what
    the guest notices, and what there is `to_do`.  `watches` names the types the step function
    answers to; of those it sees the events that kvmprobe_candidate() of probes/events.h picks.

    `accuses`: a finding is proof against the kernel, and the fault gets a verdict.  Information
    never is; nor is a symptom that has causes outside KVM.  `doubts`: a finding leaves the fault's
    verdict open, unless there is proof either way.  `acquittal` says what an acquittal shows, after
    its number.
    """

    id: str
    fault: str
    title: str
    severity: str
    severity_reason: str
    source: str
    proves: str
    guards: tuple[str, ...]
    needs: Needs
    goes_wrong: str
    guest_notices: str
    to_do: str
    step: Step = field(repr=False)
    watches: tuple[Type, ...]
    accuses: bool = True
    doubts: bool = False
    acquittal: str = ""

    def __post_init__(self) -> None:
        """Refuse a severity that isn't one.

        Raises:
            ValueError: the severity is none of `SEVERITIES`.

        """
        if self.severity not in SEVERITIES:
            raise ValueError(f"{self.id}: severity {self.severity!r}")

    @property
    def convicts(self) -> bool:
        """Whether a finding proves the fault; information proves nothing."""
        return self.accuses and self.severity != "info"

    @property
    def explain(self) -> str:
        """The whole explanation in one paragraph."""
        return f"{self.goes_wrong}  {self.guest_notices}  What to do: {self.to_do}"


def in_l1(e: Event) -> bool:
    """Whether the event is known to belong to L1."""
    return e.flags & _LEVEL == _LEVEL_KNOWN


def in_l2(e: Event) -> bool:
    """Whether the event is known to belong to L2."""
    return e.flags & _LEVEL == _LEVEL


def in_memory(e: Event) -> bool:
    """Whether a valid slot stood at the event's gpa, beyond doubt, on a page that counts.

    Not while memslots change (UNSTABLE) or the slot goes (SLOT_INVALID); not for gfn 0, which the
    cache can hold but never matches by gpa; not for the APIC page, which is meant to be emulated.
    """
    return e.slot >= 0 and e.flags & _UNTRUSTED == 0 and e.gfn != _NONE and e.gfn != APIC_GFN


def hides_from_l2(e: Event) -> bool:
    """Whether the slot is one that KVM made for itself and must show to L2: TSS, identity map."""
    return e.slot == SLOT_TSS or e.slot == SLOT_IDENTITY


def generation_matches(e: Event) -> bool:
    """Whether the cache entry is live: its generation is the one this kernel compares with.

    That is address space 0's on a kernel with the SMM fault (CVE-2026-99082) and the vCPU's own on
    a kernel without it.  Outside SMM they are the same.  In SMM an entry can't have both, and one
    with the vCPU's own proves the fixed kernel by itself; one with address space 0's is live
    unless the kernel is known to be fixed, which no single event can tell.
    """
    return e.flags & _GEN_KNOWN != 0 and e.flags & _GEN_EITHER != 0


def wrong_address_space(e: Event) -> bool:
    """Whether the cache's entry belongs to another address space, or another generation of it.

    Either half is enough: the entry was filled in the other address space, or its generation isn't
    that of the vCPU's own.  No fixed kernel believes such an entry (kvm_vcpu_memslots() at fill and
    match).  A fill whose address space isn't known can't use the first half.
    """
    if e.flags & _TWO_KNOWN_AS != _TWO_KNOWN_AS:
        return False
    return e.flags & _FILL_AS == _FILL_AS or e.flags & _GEN_NOT_CURRENT == _GEN_KNOWN


def filled_in_smm(e: Event) -> bool:
    """Whether the cache's entry is known to be filled in SMM: then it isn't L2's doing.

    KVM makes its own slots in one address space after the other, so on a kernel with
    CVE-2026-99082 an entry made in SMM in between outlives the second.
    """
    return e.flags & _FILL_AS_KNOWN != 0 and (e.flags & _OTHER_AS != 0) != (e.flags & _SMM != 0)


def smm_explains(e: Event) -> bool:
    """Whether an entry for memory may come from SMM.

    The vCPU was there, and the entry isn't known to be filled in the address space the vCPU is in
    now: then no other cause is known than CVE-2026-99082.
    """
    return e.flags & _SMM_AT_WORK == _SMM_AT_WORK and e.flags & _FILL_AS != _FILL_AS_KNOWN


def announced_in_vain(e: Event) -> bool:
    """Whether a reserved-bit fault may not believe the entry that it could believe.

    In SMM, an entry with address space 0's generation is believed by a kernel with CVE-2026-99082
    only.  If it was, the match at MATCH_MMIO tells.
    """
    return e.site == _RSVD and e.flags & _GEN_NOT_CURRENT == _GEN_KNOWN


def no_slot_fault(e: Event, words: NDArray[np.uint64], at: int) -> int:
    """One fault that was sent to no-slot, seen as FAULTIN and as FILL: counted once.

    Which of the two comes first depends on the site, so each waits for the other.  words[at] holds
    the gfn that waits, shifted by one, and which of the two was seen.  A fill read back when its
    generation was gone says nothing: the slot may have come after it.
    """
    if e.type == _FAULTIN:
        if e.kind != _NOSLOT:
            return 0
        seen = e.gfn << _ONE
    elif e.type == _FILL:
        if e.flags & _GEN_KNOWN != 0 and not generation_matches(e):
            return 0
        seen = (e.gfn << _ONE) | _ONE
    else:
        return 0
    if words[at] == seen ^ _ONE:
        words[at] = _NONE
        return EVIDENCE
    words[at] = seen
    return CONVICTS


def believed(e: Event, words: NDArray[np.uint64], at: int) -> int:
    """One access for which the cache was believed; words[at] and words[at + 1] are its memory.

    A reserved-bit fault announces the belief (site RSVD) before the emulator shows it (MATCH_MMIO):
    counted once.  MMIO on the same page after it shows what became of the access.
    """
    if e.type == _MATCH:
        if announced_in_vain(e):
            return 0
        words[at + 1] = e.gfn
        if e.site == _RSVD:
            words[at] = e.gfn
            return CONVICTS
        announced = words[at] == e.gfn
        words[at] = _NONE
        return EVIDENCE if announced else CONVICTS
    if e.type == _MMIO and words[at + 1] == e.gfn:
        return EVIDENCE
    return 0


#: Plain functions that step functions call, for numba to compile with them.
HELPERS: tuple[Callable[..., Any], ...] = (
    in_l1,
    in_l2,
    in_memory,
    hides_from_l2,
    generation_matches,
    wrong_address_space,
    filled_in_smm,
    smm_explains,
    announced_in_vain,
    no_slot_fault,
    believed,
)

# Where a fill of the no-slot function shows, whichever way the kernel lets us see it.
FILL_SEEN = Observation(
    Type.FILL, (Site.NOSLOT, Site.EMULATE_INSN, Site.ENTRY, Site.MARK_MMIO_SPTE)
)
FAULTIN_SEEN = Observation(Type.FAULTIN, (Site.FAULTIN, Site.SPTE_REQUESTED))
MATCH_SEEN = Observation(Type.MATCH, (Site.MATCH_MMIO,))
CACHE_SEEN = Observation(Type.CACHE)
