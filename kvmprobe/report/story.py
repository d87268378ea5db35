# SPDX-License-Identifier: MIT
"""Events in words, for people who have never read KVM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvmprobe.analysis.text import slot_name
from kvmprobe.probes.schema import (
    FaultinResult,
    FaultResult,
    Flag,
    LifecycleChange,
    MemslotChange,
    MmioType,
    SpteChange,
    Type,
)

_FAULTS = {
    FaultResult.USERSPACE: "KVM left it to the VMM",
    FaultResult.RESUMED: "the guest went on",
    FaultResult.ERROR: "KVM failed",
}
_FAULTINS = {
    FaultinResult.KEPT: "KVM found the memory behind it",
    FaultinResult.NOSLOT: "KVM takes it for MMIO: no memslot, it says",
    FaultinResult.ERROR: "KVM could not get at the memory now",
}
_SPTES = {
    SpteChange.MARKED: "an MMIO mark is being put into the page tables",
    SpteChange.VALID: "the MMIO mark in the page tables is current",
    SpteChange.STALE: "the MMIO mark in the page tables is out of date",
}
_MEMSLOTS = {
    MemslotChange.CREATED: "created",
    MemslotChange.DELETED: "deleted",
    MemslotChange.MOVED_FROM: "moved away",
    MemslotChange.REFLAGGED: "reflagged",
    MemslotChange.MOVED_TO: "moved here",
    MemslotChange.FOUND: "found",
}
_LIVES = {
    LifecycleChange.VM_SEEN: "the VM was seen for the first time",
    LifecycleChange.VCPU_SEEN: "the vCPU was seen for the first time",
    LifecycleChange.VCPU_GONE: "the vCPU went",
    LifecycleChange.VM_GONE: "the VM went",
    LifecycleChange.VM_NAMED: "the VM was named",
}


def sentence(row: np.void) -> str:
    """Say what one event (dtype `schema.EVENT`) shows."""
    tell = _TELL.get(int(row["type"]))
    return tell(row) if tell else f"observation {int(row['type'])}"


def _of(words: Mapping[Any, str], row: np.void) -> str:
    return words.get(int(row["kind"]), "what came of it was not seen")


def _page(row: np.void) -> str:
    """Name the event's address and what stands there."""
    where = f"0x{int(row['addr']):x}"
    if row["slot"] >= 0:
        return f"{where} ({slot_name(int(row['slot']))})"
    return f"{where} (no memory)" if int(row["flags"]) & Flag.SLOT_KNOWN else where


def _access(row: np.void) -> str:
    flags = int(row["flags"])
    if int(row["kind"]) == MmioType.WRITE:
        what = f"a write of {int(row['len'])} bytes"
    else:
        what = f"a read of {int(row['len'])} bytes"
    who = "the VMM" if flags & Flag.TO_USERSPACE else "a device of KVM's own"
    return f"{what} at {_page(row)} was treated as MMIO and given to {who}"


def _fault(row: np.void) -> str:
    access = "a write" if int(row["flags"]) & Flag.WRITE else "an access"
    return f"{access} at 0x{int(row['addr']):x} faulted: {_of(_FAULTS, row)}"


def _match(row: np.void) -> str:
    access = "a write" if int(row["flags"]) & Flag.WRITE else "an access"
    return f"{access} at {_page(row)}: KVM believed the MMIO cache"


_TELL: dict[int, Callable[[np.void], str]] = {
    Type.FAULT: _fault,
    Type.FAULTIN: lambda row: f"lookup of {_page(row)}: {_of(_FAULTINS, row)}",
    Type.FILL: lambda row: f"the MMIO cache now holds {_page(row)}",
    Type.CACHE: lambda row: f"the MMIO cache was found to hold {_page(row)}",
    Type.MATCH: _match,
    Type.MMIO: _access,
    Type.EMULATE: lambda row: f"KVM emulates the instruction at rip 0x{int(row['addr']):x}",
    Type.SPTE: lambda row: (
        f"{_page(row)}: {_of(_SPTES, row)}"
        + (", over a mapping that was present" if int(row["flags"]) & Flag.PRESENT else "")
    ),
    Type.MEMSLOT: lambda row: (
        f"memslot {slot_name(int(row['slot']))} at 0x{int(row['addr']):x}, "
        f"{int(row['value'])} pages: {_of(_MEMSLOTS, row)}"
    ),
    Type.GENERATION: lambda row: f"memslot generation {int(row['value'])} became {int(row['gen'])}",
    Type.NESTING: lambda row: "the vCPU entered L2" if row["kind"] else "the vCPU went back to L1",
    Type.SMM: lambda row: "the vCPU entered SMM" if row["kind"] else "the vCPU left SMM",
    Type.LIFECYCLE: lambda row: _of(_LIVES, row),
    Type.LOSS: lambda row: f"{int(row['addr'])} records were lost",
}
