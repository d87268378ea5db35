# SPDX-License-Identifier: MIT
"""What a simulated host's kernel tells: events that decide a verdict, and calm ones that don't.

What decides is written down row by row, as tests hold it against the reference model of KVM's MMIO
cache (tests/model): the same VM makes the same rows there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import (
    EVENT,
    NO_VCPU,
    SLOT_TSS,
    FaultinResult,
    FaultResult,
    Flag,
    LifecycleChange,
    LossCause,
    MemslotChange,
    MmioType,
    Site,
    SpteChange,
    Type,
)

#: KVM's hidden TSS in the simulated VMs, and the access to it.
TSS_GPA = 0xFFFBD000
_OPERAND = TSS_GPA + 8
_L1_GVA, _L2_GVA = 1 << 44, 1 << 45
_GENERATION = 2
_EXIT_MMIO = 6
_MMIO_SPTE = 0x80000FFFBD010
_SPTEP = TSS_GPA >> 12 << 3

_L1 = Flag.LEVEL_KNOWN | Flag.AS_KNOWN | Flag.DIRECT
_L2 = _L1 | Flag.L2
_HERE = Flag.SLOT_KNOWN | Flag.GEN_KNOWN | Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT | Flag.CANDIDATE
_BELIEVED = _HERE | Flag.FILL_AS_KNOWN
#: Of a row that tells of the cache: its generation and the current one.
_CACHED = {"gen": _GENERATION, "aux": _GENERATION, "slot": SLOT_TSS}

Row = dict[str, Any]


def _row(kind_of: Type, site: Site, flags: Flag, **fields: Any) -> Row:  # noqa: ANN401
    event = {"type": kind_of, "site": site, "flags": flags, "slot": -1, "vcpu": 0}
    return event | fields


def _nesting(entered: bool) -> Row:
    flags = (_L2 if entered else _L1) | Flag.CANDIDATE
    return _row(Type.NESTING, Site.ENTRY, flags, kind=int(entered))


def _emulate(flags: Flag) -> Row:
    return _row(Type.EMULATE, Site.EMULATE_INSN, flags, addr=0x1000)


def _faultin(result: FaultinResult) -> Row:
    flags = _L2 | Flag.SLOT_KNOWN | Flag.CANDIDATE
    return _row(
        Type.FAULTIN, Site.FAULTIN, flags, addr=TSS_GPA, value=TSS_GPA, gen=3, slot=SLOT_TSS,
        kind=result,
    )  # fmt: skip


def _fault(result: FaultResult, returned: int) -> Row:
    return _row(Type.FAULT, Site.PAGE_FAULT, _L2, addr=_OPERAND, gen=500, aux=returned, kind=result)


def _believed(level: Flag, gva: int, write: bool) -> list[Row]:
    """One access for which KVM believed its cache."""
    flags = level | _BELIEVED | (Flag.WRITE if write else Flag(0))
    kind = MmioType.WRITE if write else MmioType.UNSATISFIED_READ
    return [
        _row(
            Type.MATCH, Site.MATCH_MMIO, flags | Flag.BY_GPA, addr=_OPERAND, value=gva + _OPERAND,
            **_CACHED,
        ),
        _row(
            Type.MMIO, Site.MMIO, flags | Flag.TO_USERSPACE | Flag.MATCHED, addr=_OPERAND,
            value=_EXIT_MMIO, kind=kind, len=4, **_CACHED,
        ),
    ]  # fmt: skip


def seen() -> list[Row]:
    """A VM with a hidden TSS, from its beginning, and its one vCPU."""
    first = _L1 | Flag.CANDIDATE
    known = Flag.SLOT_KNOWN | Flag.CANDIDATE
    tss = {"addr": TSS_GPA, "value": 3, "gen": _GENERATION, "slot": SLOT_TSS}
    return [
        _row(Type.LIFECYCLE, Site.FIRST_SIGHT, Flag.CANDIDATE, vcpu=NO_VCPU, addr=1,
             value=int.from_bytes(b"model", "little"), aux=1, len=1,
             kind=LifecycleChange.VM_SEEN),
        _row(Type.GENERATION, Site.MEMSLOTS_UPDATED, Flag.CANDIDATE, vcpu=NO_VCPU,
             value=_GENERATION - 1, gen=_GENERATION),
        _row(Type.MEMSLOT, Site.COMMIT_MEMSLOT, known, vcpu=NO_VCPU, kind=MemslotChange.CREATED,
             **tss),
        _row(Type.LIFECYCLE, Site.FIRST_SIGHT, first, aux=1000, kind=LifecycleChange.VCPU_SEEN),
        _row(Type.CACHE, Site.FIRST_SIGHT, _L1 | Flag.SLOT_KNOWN | Flag.GEN_KNOWN,
             aux=_GENERATION),
        _row(Type.MEMSLOT, Site.FIRST_SIGHT, known, vcpu=NO_VCPU, kind=MemslotChange.FOUND, **tss),
    ]  # fmt: skip


def filled() -> list[Row]:
    """L2 touches the TSS on a kernel with the fault: internal-slot-fill, from the second row on."""
    filling = _L2 | _HERE
    return [
        _nesting(True),
        _faultin(FaultinResult.NOSLOT),
        _row(Type.FILL, Site.NOSLOT, filling, addr=TSS_GPA, kind=3, **_CACHED),
        _row(Type.SPTE, Site.MARK_MMIO_SPTE, _L2, addr=TSS_GPA, value=_MMIO_SPTE,
             gen=_GENERATION << 3, aux=_SPTEP,
             kind=SpteChange.MARKED),
        _emulate(_L2),
        *_believed(_L2, _L2_GVA, write=False)[:1],
        _fault(FaultResult.USERSPACE, 0),
        *_believed(_L2, _L2_GVA, write=False)[1:],
    ]  # fmt: skip


def armed() -> list[Row]:
    """The vCPU is back in L1 with that cache: internal-slot-armed, the second row."""
    return [
        _nesting(False),
        _row(Type.CACHE, Site.ENTRY, _L1 | _BELIEVED, addr=TSS_GPA, kind=3, **_CACHED),
    ]


def hit(write: bool) -> list[Row]:
    """L1 touches the TSS and is sent to the VMM: internal-slot-hit, the second row."""
    return [_emulate(_L1), *_believed(_L1, _L1_GVA, write)]


def kept() -> list[Row]:
    """L2 touches the TSS on a kernel without the fault, which is proof of it."""
    return [
        _nesting(True), _faultin(FaultinResult.KEPT), _fault(FaultResult.RESUMED, 1),
        _nesting(False),
    ]  # fmt: skip


def lost(records: int, cpu: int) -> list[Row]:
    """Records of an observation that the verdict needs are lost."""
    return [
        _row(Type.LOSS, Site.DRAIN, Flag.CANDIDATE, vm=0, vcpu=NO_VCPU, addr=records, aux=cpu,
             kind=Type.FAULTIN, len=LossCause.RING)
    ]  # fmt: skip


def rows(listed: Sequence[Row], vm: int, seq: int, ts: NDArray[np.uint64]) -> NDArray[Any]:
    """Make rows of dtype EVENT, of one VM and its vCPU 0.

    Args:
        listed: what the functions above give.
        vm: the VM's number, unless a row has its own.
        seq: the vCPU's next sequence number.
        ts: a time for each row, ns.

    """
    made = np.zeros(len(listed), EVENT)
    made["vm"] = vm
    for row, event in zip(made, listed, strict=True):
        for name, value in event.items():
            row[name] = value
    made["ts"] = ts
    own = made["vcpu"] != NO_VCPU
    made["seq"][own] = seq + np.arange(np.count_nonzero(own))
    return made
