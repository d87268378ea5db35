# SPDX-License-Identifier: GPL-2.0-only OR MIT
"""The event schema, derived from events.h: numpy dtype, Arrow schema, names.

events.h is the only definition.  This module reads its struct and enums; it understands no more C
than stands there, and fails at import when the header says something it doesn't understand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow

HERE = Path(__file__).parent
HEADER = HERE / "events.h"

#: One batch of events as columns: field name -> 1-D array, all of one length, dtypes of `EVENT`.
Columns = Mapping[str, NDArray[Any]]

_C_TYPES = {"u8": "u1", "u16": "<u2", "s16": "<i2", "u32": "<u4", "u64": "<u8"}


@dataclass(frozen=True)
class Field:
    """One field of the event: its name, numpy type string and description."""

    name: str
    dtype: str
    doc: str


@dataclass(frozen=True)
class Member:
    """One member of an enum of events.h, without its KVMPROBE_ prefix."""

    name: str
    value: int
    doc: str


def _read_fields(text: str) -> tuple[Field, ...]:
    body = re.search(r"struct kvmprobe_event \{\n(.*?)\n\};", text, re.S)
    if body is None:
        raise ImportError(f"{HEADER}: no struct kvmprobe_event")
    fields = []
    for line in body[1].splitlines():
        m = re.fullmatch(r"\t(\w+)\s+(\w+);\s*/\* (.*) \*/", line)
        if m is None or m[1] not in _C_TYPES:
            raise ImportError(f"{HEADER}: not understood: {line.strip()}")
        fields.append(Field(m[2], _C_TYPES[m[1]], m[3]))
    return tuple(fields)


def _read_enum(text: str, name: str, prefix: str) -> tuple[Member, ...]:
    body = re.search(rf"enum {name} \{{\n(.*?)\n\}};", text, re.S)
    if body is None:
        raise ImportError(f"{HEADER}: no enum {name}")
    members = []
    for line in body[1].splitlines():
        m = re.fullmatch(rf"\t{prefix}(\w+) = (\d+)(?: << (\d+))?,\s*/\* (.*) \*/", line)
        if m is None:
            raise ImportError(f"{HEADER}: not understood: {line.strip()}")
        members.append(Member(m[1], int(m[2]) << int(m[3] or 0), m[4]))
    return tuple(members)


def _read_define(text: str, name: str) -> int:
    m = re.search(rf"#define {name} (\d+)", text)
    if m is None:
        raise ImportError(f"{HEADER}: no {name}")
    return int(m[1])


_TEXT = HEADER.read_text(encoding="utf-8")

SCHEMA_MAJOR = _read_define(_TEXT, "KVMPROBE_SCHEMA_MAJOR")
SCHEMA_MINOR = _read_define(_TEXT, "KVMPROBE_SCHEMA_MINOR")

FIELDS = _read_fields(_TEXT)
#: The event as it leaves the ring: 56 bytes, little endian, no padding.
EVENT = np.dtype([(f.name, f.dtype) for f in FIELDS])

#: Every enum of events.h by its C name, its members in order.
ENUMS: dict[str, tuple[Member, ...]] = {
    name: _read_enum(_TEXT, name, prefix)
    for name, prefix in (
        ("kvmprobe_type", "KVMPROBE_"),
        ("kvmprobe_site", "KVMPROBE_AT_"),
        ("kvmprobe_flag", "KVMPROBE_F_"),
        ("kvmprobe_fault_result", "KVMPROBE_FAULT_"),
        ("kvmprobe_faultin_result", "KVMPROBE_FAULTIN_"),
        ("kvmprobe_mmio_type", "KVMPROBE_MMIO_"),
        ("kvmprobe_spte_change", "KVMPROBE_SPTE_"),
        ("kvmprobe_memslot_change", "KVMPROBE_MEMSLOT_"),
        ("kvmprobe_lifecycle_change", "KVMPROBE_"),
        ("kvmprobe_loss_cause", "KVMPROBE_LOST_"),
    )
}


def _values(enum: str) -> dict[str, int]:
    return {m.name: m.value for m in ENUMS[enum]}


_TYPE = _values("kvmprobe_type")


class Type(IntEnum):
    """The observation: the `type` column."""

    FAULT = _TYPE["FAULT"]
    FAULTIN = _TYPE["FAULTIN"]
    FILL = _TYPE["FILL"]
    CACHE = _TYPE["CACHE"]
    MATCH = _TYPE["MATCH"]
    MMIO = _TYPE["MMIO"]
    EMULATE = _TYPE["EMULATE"]
    SPTE = _TYPE["SPTE"]
    MEMSLOT = _TYPE["MEMSLOT"]
    GENERATION = _TYPE["GENERATION"]
    NESTING = _TYPE["NESTING"]
    SMM = _TYPE["SMM"]
    LIFECYCLE = _TYPE["LIFECYCLE"]
    LOSS = _TYPE["LOSS"]


_SITE = _values("kvmprobe_site")


class Site(IntEnum):
    """Where an event was seen: the `site` column."""

    PAGE_FAULT = _SITE["PAGE_FAULT"]
    PAGE_FAULT_TP = _SITE["PAGE_FAULT_TP"]
    FAULTIN = _SITE["FAULTIN"]
    SPTE_REQUESTED = _SITE["SPTE_REQUESTED"]
    NOSLOT = _SITE["NOSLOT"]
    MMIO_SPTE = _SITE["MMIO_SPTE"]
    MARK_MMIO_SPTE = _SITE["MARK_MMIO_SPTE"]
    CHECK_MMIO_SPTE = _SITE["CHECK_MMIO_SPTE"]
    EMULATE_INSN = _SITE["EMULATE_INSN"]
    ENTRY = _SITE["ENTRY"]
    MATCH_MMIO = _SITE["MATCH_MMIO"]
    MMIO = _SITE["MMIO"]
    RSVD = _SITE["RSVD"]
    COMMIT_MEMSLOT = _SITE["COMMIT_MEMSLOT"]
    MEMSLOTS_UPDATED = _SITE["MEMSLOTS_UPDATED"]
    FIRST_SIGHT = _SITE["FIRST_SIGHT"]
    VCPU_DESTROY = _SITE["VCPU_DESTROY"]
    VM_DESTROY = _SITE["VM_DESTROY"]
    DRAIN = _SITE["DRAIN"]
    NESTED_TP = _SITE["NESTED_TP"]


_FLAG = _values("kvmprobe_flag")


class Flag(IntFlag):
    """Bits of the `flags` column."""

    L2 = _FLAG["L2"]
    LEVEL_KNOWN = _FLAG["LEVEL_KNOWN"]
    SMM = _FLAG["SMM"]
    AS_KNOWN = _FLAG["AS_KNOWN"]
    DIRECT = _FLAG["DIRECT"]
    NESTED_MMU = _FLAG["NESTED_MMU"]
    WRITE = _FLAG["WRITE"]
    UNSTABLE = _FLAG["UNSTABLE"]
    SLOT_KNOWN = _FLAG["SLOT_KNOWN"]
    SLOT_READONLY = _FLAG["SLOT_READONLY"]
    SLOT_INVALID = _FLAG["SLOT_INVALID"]
    SLOT_PRESUMED = _FLAG["SLOT_PRESUMED"]
    BY_GPA = _FLAG["BY_GPA"]
    TO_USERSPACE = _FLAG["TO_USERSPACE"]
    FAILED = _FLAG["FAILED"]
    BELIEVED = _FLAG["BELIEVED"]
    GEN_KNOWN = _FLAG["GEN_KNOWN"]
    GEN_IS_AS0 = _FLAG["GEN_IS_AS0"]
    GEN_IS_CURRENT = _FLAG["GEN_IS_CURRENT"]
    TWO_AS = _FLAG["TWO_AS"]
    SMM_SEEN = _FLAG["SMM_SEEN"]
    MATCHED = _FLAG["MATCHED"]
    PRESENT = _FLAG["PRESENT"]
    CANDIDATE = _FLAG["CANDIDATE"]
    FILL_AS_KNOWN = _FLAG["FILL_AS_KNOWN"]
    OTHER_AS = _FLAG["OTHER_AS"]
    STUCK = _FLAG["STUCK"]


_FAULT_RESULT = _values("kvmprobe_fault_result")


class FaultResult(IntEnum):
    """`kind` of FAULT."""

    UNKNOWN = _FAULT_RESULT["UNKNOWN"]
    USERSPACE = _FAULT_RESULT["USERSPACE"]
    RESUMED = _FAULT_RESULT["RESUMED"]
    ERROR = _FAULT_RESULT["ERROR"]


_FAULTIN_RESULT = _values("kvmprobe_faultin_result")


class FaultinResult(IntEnum):
    """`kind` of FAULTIN."""

    UNKNOWN = _FAULTIN_RESULT["UNKNOWN"]
    KEPT = _FAULTIN_RESULT["KEPT"]
    NOSLOT = _FAULTIN_RESULT["NOSLOT"]
    ERROR = _FAULTIN_RESULT["ERROR"]


_MMIO_TYPE = _values("kvmprobe_mmio_type")


class MmioType(IntEnum):
    """`kind` of MMIO."""

    UNSATISFIED_READ = _MMIO_TYPE["UNSATISFIED_READ"]
    READ = _MMIO_TYPE["READ"]
    WRITE = _MMIO_TYPE["WRITE"]


_SPTE_CHANGE = _values("kvmprobe_spte_change")


class SpteChange(IntEnum):
    """`kind` of SPTE."""

    MARKED = _SPTE_CHANGE["MARKED"]
    VALID = _SPTE_CHANGE["VALID"]
    STALE = _SPTE_CHANGE["STALE"]


_MEMSLOT_CHANGE = _values("kvmprobe_memslot_change")


class MemslotChange(IntEnum):
    """`kind` of MEMSLOT."""

    CREATED = _MEMSLOT_CHANGE["CREATED"]
    DELETED = _MEMSLOT_CHANGE["DELETED"]
    MOVED_FROM = _MEMSLOT_CHANGE["MOVED_FROM"]
    REFLAGGED = _MEMSLOT_CHANGE["REFLAGGED"]
    MOVED_TO = _MEMSLOT_CHANGE["MOVED_TO"]
    FOUND = _MEMSLOT_CHANGE["FOUND"]


_LIFECYCLE_CHANGE = _values("kvmprobe_lifecycle_change")


class LifecycleChange(IntEnum):
    """`kind` of LIFECYCLE."""

    VM_SEEN = _LIFECYCLE_CHANGE["VM_SEEN"]
    VCPU_SEEN = _LIFECYCLE_CHANGE["VCPU_SEEN"]
    VCPU_GONE = _LIFECYCLE_CHANGE["VCPU_GONE"]
    VM_GONE = _LIFECYCLE_CHANGE["VM_GONE"]
    VM_NAMED = _LIFECYCLE_CHANGE["VM_NAMED"]


_LOSS_CAUSE = _values("kvmprobe_loss_cause")


class LossCause(IntEnum):
    """`len` of LOSS."""

    RING = _LOSS_CAUSE["RING"]
    EXIT = _LOSS_CAUSE["EXIT"]
    STATE = _LOSS_CAUSE["STATE"]
    RECURSION = _LOSS_CAUSE["RECURSION"]
    READ = _LOSS_CAUSE["READ"]
    WRITER = _LOSS_CAUSE["WRITER"]


SLOT_TSS = _read_define(_TEXT, "KVMPROBE_SLOT_TSS")
SLOT_APIC = _read_define(_TEXT, "KVMPROBE_SLOT_APIC")
SLOT_IDENTITY = _read_define(_TEXT, "KVMPROBE_SLOT_IDENTITY")
#: `vcpu` of an event that belongs to no vCPU.
NO_VCPU = 0xFFFF


def columns(rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Turn rows of dtype `EVENT` into contiguous columns."""
    return {name: np.ascontiguousarray(rows[name]) for name in EVENT.names or ()}


def rows(columns: Columns) -> NDArray[Any]:
    """Turn a full set of columns into rows of dtype `EVENT`."""
    out = np.empty(len(columns["ts"]), EVENT)
    for name in EVENT.names or ():
        out[name] = columns[name]
    return out


def arrow_schema() -> pyarrow.Schema:
    """The Arrow schema of a batch: one non-null column a field, same order and width as `EVENT`."""
    import pyarrow as pa

    return pa.schema(
        [pa.field(f.name, pa.from_numpy_dtype(np.dtype(f.dtype)), nullable=False) for f in FIELDS]
    )
