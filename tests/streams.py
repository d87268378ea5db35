# SPDX-License-Identifier: MIT
"""Streams of events made by hand, and strategies that make many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.analysis.detector import Detector
from kvmprobe.analysis.findings import Acquittal, Finding
from kvmprobe.probes.schema import (
    EVENT,
    NO_VCPU,
    SLOT_APIC,
    SLOT_IDENTITY,
    SLOT_TSS,
    FaultinResult,
    Flag,
    LifecycleChange,
    Site,
    Type,
    columns,
)

TSS_GPA = 0xFFFBD000
IDENTITY_GPA = 0xFFFBC000
RAM_GPA = 0x180000
APIC_GPA = 0xFEE00000
MIB = 1 << 20

L1 = Flag.LEVEL_KNOWN
L2 = Flag.LEVEL_KNOWN | Flag.L2
UNKNOWN = Flag(0)
LIVE = Flag.GEN_KNOWN | Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT

#: How an event is usually seen.
_SITES = {
    Type.FAULT: Site.PAGE_FAULT,
    Type.FAULTIN: Site.FAULTIN,
    Type.FILL: Site.NOSLOT,
    Type.CACHE: Site.EMULATE_INSN,
    Type.MATCH: Site.MATCH_MMIO,
    Type.MMIO: Site.MMIO,
    Type.LIFECYCLE: Site.FIRST_SIGHT,
}


def ev(
    kind_of: Type,
    flags: Flag = L1,
    *,
    addr: int = TSS_GPA,
    slot: int = SLOT_TSS,
    **fields: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """One event of vCPU 0 of VM 1; `stream` gives it a time and a sequence number."""
    known = Flag.SLOT_KNOWN if slot >= 0 and not flags & Flag.SLOT_PRESUMED else Flag(0)
    event = {"vm": 1, "vcpu": 0, "type": kind_of, "site": _SITES.get(kind_of, 0)}
    return event | {"flags": flags | known, "addr": addr, "slot": slot} | fields


def noslot(flags: Flag = L2, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    """A fault that was sent to no-slot."""
    return ev(Type.FAULTIN, flags, kind=FaultinResult.NOSLOT, **fields)


def kept(flags: Flag = L2, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    """A fault that was kept on its slot."""
    return ev(Type.FAULTIN, flags, kind=FaultinResult.KEPT, **fields)


def gone(**fields: Any) -> dict[str, Any]:  # noqa: ANN401
    """The end of the vCPU."""
    return ev(Type.LIFECYCLE, UNKNOWN, slot=-1, kind=LifecycleChange.VCPU_GONE, **fields)


def vm_gone(vm: int = 1) -> dict[str, Any]:
    """The end of the VM."""
    kind = LifecycleChange.VM_GONE
    return ev(Type.LIFECYCLE, UNKNOWN, slot=-1, kind=kind, vm=vm, vcpu=NO_VCPU)


def stream(events: Iterable[dict[str, Any]], start: int = 1000) -> NDArray[Any]:
    """Events as rows of dtype EVENT, a microsecond apart, each vCPU's in sequence."""
    listed = list(events)
    rows = np.zeros(len(listed), EVENT)
    seq: dict[tuple[int, int], int] = {}
    for n, (row, event) in enumerate(zip(rows, listed, strict=True)):
        vcpu = event["vm"], event["vcpu"]
        event = {"ts": start + 1000 * n, "seq": seq.get(vcpu, 0)} | event
        seq[vcpu] = seq.get(vcpu, 0) + 1
        for name, value in event.items():
            row[name] = value
    return rows


def detect(
    rows: NDArray[Any], *, cuts: Sequence[int] = (), jit: bool = False
) -> tuple[Detector, list[Finding]]:
    """Feed rows to a new detector, cut into batches at `cuts`."""
    detector = Detector(jit=jit)
    for part in np.split(rows, sorted(cuts)):
        detector.feed(columns(part))
    return detector, detector.findings()


def told(detector: Detector) -> list[tuple[Any, ...]]:
    """All that a detector says, in a form that can be compared."""
    return tell(detector.findings(), detector.acquittals())


def tell(found: Iterable[Finding], acquittals: Iterable[Acquittal]) -> list[tuple[Any, ...]]:
    """Findings and acquittals in a form that can be compared."""
    findings = [
        (
            f.rule.id, f.vm, f.vcpu, f.first.tobytes(), f.first_ts, f.last_ts, f.count,
            f.evidence.tobytes(), f.evidence_total,
            f.cause and (f.cause.rule, f.cause.event.tobytes(), f.cause.age_ns, f.cause.count),
        )
        for f in found
    ]  # fmt: skip
    return findings + [(a.rule.id, a.vm, a.first.tobytes(), a.count) for a in acquittals]


_BASE = (L1, L2, L1, L2, L1 | LIVE, L1 | LIVE, UNKNOWN, L1 | Flag.UNSTABLE)
_TWO = Flag.TWO_AS | Flag.AS_KNOWN
_FLAGS = st.sampled_from(_BASE).flatmap(
    lambda base: st.sampled_from(
        (
            base, base, base, base | Flag.MATCHED, base | Flag.SLOT_INVALID, base | Flag.PRESENT,
            base | Flag.BELIEVED, base | Flag.TWO_AS | Flag.SMM_SEEN, base | Flag.STUCK,
            base | _TWO | Flag.SMM_SEEN | Flag.FILL_AS_KNOWN,
            base | _TWO | Flag.SMM_SEEN | Flag.FILL_AS_KNOWN | Flag.OTHER_AS,
            base | _TWO | Flag.SMM_SEEN | Flag.SMM | Flag.GEN_KNOWN | Flag.GEN_IS_AS0,
            base | _TWO | Flag.SMM_SEEN | Flag.SMM | Flag.GEN_KNOWN,
        )
    )
)  # fmt: skip
_ADDRS = st.sampled_from((TSS_GPA, TSS_GPA + 8, IDENTITY_GPA, RAM_GPA, APIC_GPA, 0, 1 << 63))


@st.composite
def events(draw: st.DrawFn, vm: int = 1, vcpu: int = 0) -> dict[str, Any]:
    """One event of a vCPU, likely to matter to a rule."""
    kind_of = draw(st.sampled_from(tuple(Type)))
    fields = {
        "site": draw(st.sampled_from((_SITES.get(kind_of, Site.ENTRY), Site.RSVD))),
        "addr": draw(_ADDRS),
        "slot": draw(st.sampled_from((SLOT_TSS, SLOT_IDENTITY, SLOT_APIC, SLOT_TSS, 0, 5, -1))),
        "kind": draw(st.integers(0, 3)),
        "gen": draw(st.sampled_from((4, (1 << 63) | 4, (1 << 53) + 1))),
    }
    if kind_of == Type.LIFECYCLE:
        fields |= {"slot": -1, "kind": draw(st.sampled_from((2, 3)))}
    return ev(kind_of, draw(_FLAGS), vm=vm, vcpu=vcpu, **fields)


@st.composite
def vcpu_streams(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """Some vCPUs' events, each vCPU's by themselves and in order."""
    vcpus = draw(
        st.lists(
            st.tuples(st.integers(1, 3), st.sampled_from((0, 1, 4095))),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    return [draw(st.lists(events(vm, vcpu), max_size=25)) for vm, vcpu in vcpus]


def interleave(streams: Sequence[Sequence[dict[str, Any]]], seed: int) -> list[dict[str, Any]]:
    """Merge vCPUs' events in some order that keeps each vCPU's own; VMs end after their vCPUs."""
    random = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(streams)), [len(s) for s in streams])
    places = [iter(s) for s in streams]
    merged = [next(places[n]) for n in random.permutation(owner).tolist()]
    vms = sorted({event["vm"] for event in merged})
    return merged + [vm_gone(vm) for vm in vms[::2]]
