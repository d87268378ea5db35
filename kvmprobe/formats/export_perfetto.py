# SPDX-License-Identifier: MIT
"""A capture as a Perfetto trace: a process a VM, a track a vCPU, the MMIO cache as slices.

docs/formats/export.md says what is shown and how.  Numbers of fields are those of
protos/perfetto/trace/trace_packet.proto and track_event/{track_event,track_descriptor,
debug_annotation}.proto.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.detector import Detector
from kvmprobe.analysis.findings import Finding
from kvmprobe.analysis.integrity import name_of
from kvmprobe.analysis.text import slot_name
from kvmprobe.analysis.vms import VmNames
from kvmprobe.formats.export_entries import FIELDS, Entries, key_of
from kvmprobe.formats.export_window import Window
from kvmprobe.formats.perfetto import Hole, Template, field, message, number, size
from kvmprobe.probes.schema import (
    NO_VCPU,
    Columns,
    Flag,
    MemslotChange,
    MmioType,
    Type,
)

_BEGIN, _END, _INSTANT = 1, 2, 3  # TrackEvent.Type
_SEQUENCE = field(10, 1)
_NEEDS_STATE = field(13, 2)  # SEQ_NEEDS_INCREMENTAL_STATE: names and the clock are said before
_MONOTONIC, _REALTIME = 3, 1  # BuiltinClock

_CACHE, _ACCESS, _MEMSLOT, _LOSS, _FINDING = range(1, 6)
_CATEGORIES = ("cache", "access", "memslot", "loss", "finding")
_GPA, _GVA, _GEN, _SLOT, _LEVEL, _SEQ, _EXIT = range(1, 8)
_ANNOTATIONS = ("gpa", "gva", "mmio_gen", "slot", "level", "seq", "exit")
_LEVELS = ("unknown", "L1", "L2")
_FOUND, _MATCH, _MMIO = 1, 2, 3
_INSTANTS = (
    "CACHE", "MATCH", "MMIO read, left to the VMM", "MMIO read", "MMIO write", "MMIO",
)  # fmt: skip
#: Slots are named by numbers from here on, both in slices' names and in annotations.
_FIRST_SLOT = 8


def _event(prefix: str, body: list[bytes | Hole]) -> list[bytes | Hole]:
    """A packet with a track event, of fixed layout."""
    inner = [
        *number(8, Hole(f"{prefix}ts", 10)),
        _SEQUENCE + _NEEDS_STATE,
        *message(11, [*number(11, Hole(f"{prefix}uuid", 10)), *body]),
    ]
    return [*message(1, inner)]


def _annotation(name: bytes | Hole, value: int, hole: Hole) -> list[bytes | Hole]:
    named = [*number(1, name)] if isinstance(name, Hole) else [name]
    return [*message(4, [*named, *number(value, hole)])]


_UINT, _POINTER, _STRING = 3, 7, 17  # DebugAnnotation's values

_END_PARTS = _event("end_", [field(9, _END)])
_EVENT_PARTS = _event(
    "",
    [
        *number(3, Hole("category", 1)),
        *_annotation(field(1, _GPA), _POINTER, Hole("gpa", 10)),
        *_annotation(Hole("value_name", 1), _POINTER, Hole("value", 10)),
        *_annotation(field(1, _GEN), _UINT, Hole("gen", 10)),
        *_annotation(field(1, _SLOT), _STRING, Hole("slot", 3)),
        *_annotation(field(1, _LEVEL), _STRING, Hole("level", 1)),
        *_annotation(field(1, _SEQ), _UINT, Hole("seq", 5)),
        *number(9, Hole("event_type", 1)),
        *number(10, Hole("name", 3)),
    ],
)
_EVENT = Template(_EVENT_PARTS)
_END_EVENT = Template([*_END_PARTS, *_EVENT_PARTS])
_END_SIZE = size(_END_PARTS)

#: Packets made at once: they should stay in the processor's cache.
_CHUNK = 1 << 13
#: Numbers of names by type, by type << 8 | kind, and by level's flags.
_CATEGORY = np.full(256, _ACCESS, np.uint64)
_CATEGORY[[Type.FILL, Type.CACHE]] = _CACHE
_VALUE_NAME = np.full(256, _GVA, np.uint64)
_VALUE_NAME[Type.MMIO] = _EXIT
_NAME = np.full(1 << 16, _FOUND, np.uint64)
_NAME[Type.MATCH << 8 : (Type.MATCH + 1) << 8] = _MATCH
_NAME[Type.MMIO << 8 : (Type.MMIO + 1) << 8] = _MMIO + len(MmioType)
for _kind in MmioType:
    _NAME[Type.MMIO << 8 | _kind] = _MMIO + _kind
_LEVEL_OF = np.ones(4, np.uint64)
_LEVEL_OF[[Flag.LEVEL_KNOWN, Flag.LEVEL_KNOWN | Flag.L2]] = 2, 3

_NONE, _DRAWN, _RARE, _LIFE = range(4)
_ROLE = np.zeros(256, np.uint8)
_ROLE[[Type.FILL, Type.CACHE, Type.MATCH, Type.MMIO]] = _DRAWN
_ROLE[[Type.MEMSLOT, Type.GENERATION, Type.LOSS]] = _RARE
_ROLE[Type.LIFECYCLE] = _LIFE


class PerfettoWriter:
    """Writes batches to a Perfetto trace.  Memory is bounded by the vCPUs that live."""

    def __init__(self, file: BinaryIO, header: Mapping[str, Any], window: Window) -> None:
        """Write the trace's beginning to `file`.

        `window` is applied here: findings are those of the whole capture, and an entry that is in
        the cache when the window opens is drawn from there on.
        """
        self._file = file
        self._window = window
        self._detector = Detector(jit=True, compile_after=100_000)
        self._names = VmNames()
        self._entries = Entries()
        self._waiting: set[int] = set()
        self._pids: set[int] = set()
        self._tracks: set[int] = set()
        self._slots = np.zeros(1 << 16, np.bool_)
        self._last = 0
        text = json.dumps(header, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")
        # Traces are joined by concatenation, so tracks of two captures must differ.
        self._base = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
        self._begin(header)

    def write(self, columns: Columns) -> int:
        """Take in one batch of the whole capture; returns how many of its events are drawn."""
        self._detector.feed(columns)
        self._names.feed(columns)
        chosen = np.flatnonzero(_ROLE[columns["type"]])
        ts = columns["ts"]
        if self._window.end is not None:
            ts = ts[ts < np.uint64(self._window.end)]
            chosen = chosen[columns["ts"][chosen] < np.uint64(self._window.end)]
        self._last = max(self._last, int(ts.max(initial=0)))
        if not len(chosen):
            return 0
        rows = {name: columns[name][chosen] for name in FIELDS}
        if self._window.begin is not None:
            early = rows["ts"] < np.uint64(self._window.begin)
            if early.any():
                before = {name: values[early] for name, values in rows.items()}
                self._entries.follow(before)
                changed = set(np.unique(key_of(before)).tolist())
                self._entries.leave(before)
                self._waiting = (self._waiting | changed) & self._entries.open.keys()
                rows = {name: values[~early] for name, values in rows.items()}
        if not len(rows["ts"]):
            return 0
        self._show_waiting()
        role = _ROLE[rows["type"]]
        drawn = self._draw({name: values[role != _RARE] for name, values in rows.items()})
        rare = np.flatnonzero(role == _RARE)
        for i in rare.tolist():
            self._draw_rare({name: int(rows[name][i]) for name in FIELDS})
        for key, when in self._entries.leave(rows):
            self._packet(when, _END, key)
        return drawn + len(rare)

    def close(self) -> None:
        """Draw the ends of what is still in the caches, and the findings."""
        self._show_waiting()
        for key in sorted(self._entries.open):
            self._packet(self._last, _END, key)
        for finding in self._detector.findings():
            if self._window.meets(finding.first_ts, finding.last_ts):
                self._draw_finding(finding)

    def _draw(self, rows: dict[str, NDArray[Any]]) -> int:
        """Draw fills, matches and MMIO, each vCPU's in order; returns how many."""
        closes, begins = self._entries.follow(rows)
        drawn = rows["type"] != Type.LIFECYCLE
        self._describe(key_of(rows)[drawn])
        for start in range(0, len(drawn), _CHUNK):
            here = slice(start, start + _CHUNK)
            part = {name: values[here] for name, values in rows.items()}
            # Only the order of ends and begins matters: the rest needs no room for an end.
            slices = closes[here] | begins[here]
            if slices.any():
                own = {name: values[slices] for name, values in part.items()}
                self._put_slices(own, closes[here][slices], begins[here][slices])
            instants = drawn[here] & ~slices
            own = {name: values[instants] for name, values in part.items()}
            values = self._values(own, _INSTANT)
            self._file.write(_EVENT.fill(len(own["ts"]), values).data)
        return int(drawn.sum())

    def _put_slices(
        self, rows: dict[str, NDArray[Any]], closes: NDArray[np.bool_], begins: NDArray[np.bool_]
    ) -> None:
        """Draw ends, begins, and ends that are begins too."""
        values = self._values(rows, _BEGIN)
        values |= {"end_ts": values["ts"], "end_uuid": values["uuid"]}
        packets = _END_EVENT.fill(len(closes), values)
        wanted = np.ones(packets.shape, np.bool_)
        wanted[~closes, :_END_SIZE] = False
        wanted[~begins, _END_SIZE:] = False
        self._file.write(packets[wanted].data)

    def _values(
        self, rows: dict[str, NDArray[Any]], event_type: int
    ) -> dict[str, NDArray[np.uint64]]:
        """What fills the holes of the rows' packets: begins of slices, or instants."""
        kinds, slot = rows["type"], rows["slot"].astype(np.int64)
        flags = rows["flags"].astype(np.uint64)
        # Odd: presumed, or with no slot looked up.
        how = np.where(slot < 0, int(Flag.SLOT_KNOWN), int(Flag.SLOT_PRESUMED)).astype(np.uint64)
        code = ((slot + 1) * 2).clip(0) + ((flags & how) != 0)
        self._intern_slots(code)
        slots = (code + _FIRST_SLOT).astype(np.uint64)
        level = flags & np.uint64(Flag.LEVEL_KNOWN | Flag.L2)
        name = _NAME[kinds.astype(np.intp) << 8 | rows["kind"]]
        return {
            "ts": rows["ts"],
            "uuid": key_of(rows).view(np.uint64) + np.uint64(self._base),
            "category": _CATEGORY[kinds],
            "gpa": rows["addr"],
            "value_name": _VALUE_NAME[kinds],
            "value": rows["value"],
            "gen": rows["gen"],
            "slot": slots,
            "level": _LEVEL_OF[level.astype(np.intp)],
            "seq": rows["seq"].astype(np.uint64),
            "event_type": np.full(len(name), event_type, np.uint64),
            "name": name if event_type == _INSTANT else slots,
        }

    def _show_waiting(self) -> None:
        """Draw the entries that were in the caches when the window opened."""
        if not self._waiting:
            return
        entries = [self._entries.open[key] for key in sorted(self._waiting)]
        self._waiting = set()
        rows = {name: np.array([entry[name] for entry in entries]) for name in FIELDS}
        rows["ts"][:] = self._window.begin
        self._last = max(self._last, int(rows["ts"][0]))
        key = key_of(rows)
        self._describe(key)
        values = self._values(rows, _BEGIN)
        self._file.write(_EVENT.fill(len(key), values).data)

    def _draw_rare(self, row: dict[str, int]) -> None:
        kind = row["type"]
        notes: dict[str, int | str]
        if kind == Type.LOSS:
            name = f"lost: {name_of(Type, row['kind'])}"
            notes = {"records": row["addr"]}
            self._instant(row["ts"], _LOSS, name, self._named_track(_LOSSES, "losses"), notes)
            return
        track = self._named_track(row["vm"] << 16 | _MEMSLOTS, "memslots", parent=row["vm"])
        if kind == Type.GENERATION:
            name, notes = "GENERATION", {"from": row["value"], "to": row["gen"]}
        else:
            changes = {int(change): change.name for change in MemslotChange}
            name = f"MEMSLOT {changes.get(row['kind'], row['kind'])}"
            notes = {"base_gpa": f"0x{row['addr']:x}", "npages": row["value"],
                     "slot": slot_name(row["slot"]), "generation": row["gen"]}  # fmt: skip
        self._instant(row["ts"], _MEMSLOT, name, track, notes)

    def _draw_finding(self, finding: Finding) -> None:
        track = self._named_track(finding.vm << 16 | _FINDINGS, "findings", parent=finding.vm)
        rule, cause = finding.rule, finding.cause
        notes: dict[str, int | str] = {
            "rule": rule.id, "fault": rule.fault, "severity": rule.severity, "title": rule.title,
            "proves": rule.proves, "vcpu": finding.vcpu, "level": finding.level,
            "gpa": f"0x{finding.gpa:x}", "slot": slot_name(finding.slot),
            "slot_confidence": finding.slot_confidence or "none", "count": finding.count,
            "last_after_ns": finding.last_ts - finding.first_ts,
            "evidence_events": finding.evidence_total, "seq": int(finding.first["seq"]),
        }  # fmt: skip
        if cause is not None:
            notes |= {"cause": cause.rule, "cause_age_ns": cause.age_ns}
        ts = max(finding.first_ts, self._window.begin or 0)
        self._instant(ts, _FINDING, rule.id, track, notes)

    def _instant(
        self, ts: int, category: int, name: str, uuid: int, notes: Mapping[str, int | str]
    ) -> None:
        body = field(3, category) + field(9, _INSTANT) + field(11, uuid) + field(23, name)
        for key, value in notes.items():
            kind = 6 if isinstance(value, str) else 4
            body += field(4, field(10, key) + field(kind, value))
        self._put(field(8, ts) + _SEQUENCE + _NEEDS_STATE + field(11, body))

    def _packet(self, ts: int, event_type: int, key: int) -> None:
        body = field(11, self._uuid(key)) + field(9, event_type)
        self._put(field(8, ts) + _SEQUENCE + _NEEDS_STATE + field(11, body))

    def _put(self, packet: bytes) -> None:
        self._file.write(field(1, packet))

    def _begin(self, header: Mapping[str, Any]) -> None:
        clock = header["clock"]
        monotonic = field(1, field(1, _MONOTONIC) + field(2, clock["monotonic_ns"] or 0))
        wall = b""
        if clock["wall_ns"] is not None and clock["monotonic_ns"] is not None:
            wall = field(1, field(1, _REALTIME) + field(2, clock["wall_ns"]))
        self._put(_SEQUENCE + field(6, monotonic + wall + field(2, _MONOTONIC)))
        names = b"".join(
            field(table, field(1, iid) + field(2, name))
            for table, texts in ((1, _CATEGORIES), (2, _INSTANTS), (3, _ANNOTATIONS), (29, _LEVELS))
            for iid, name in enumerate(texts, 1)
        )
        cleared = field(13, 1)  # SEQ_INCREMENTAL_STATE_CLEARED
        self._put(_SEQUENCE + cleared + field(59, field(58, _MONOTONIC)) + field(12, names))

    def _intern_slots(self, code: NDArray[np.int64]) -> None:
        """Say the names of memslots before they are used for the first time."""
        new = np.unique(code[~self._slots[code]])
        if not len(new):
            return
        self._slots[new] = True
        names = b""
        for n in new.tolist():
            slot, flag = n // 2 - 1, n % 2
            text = slot_name(slot if slot >= 0 else None)
            if slot < 0 and not flag:
                text = "slot not known"
            elif slot >= 0 and flag:
                text += ", presumed"
            names += field(2, field(1, _FIRST_SLOT + n) + field(2, f"cache: {text}"))
            names += field(29, field(1, _FIRST_SLOT + n) + field(2, text))
        self._put(_SEQUENCE + _NEEDS_STATE + field(12, names))

    def _describe(self, keys: NDArray[np.int64]) -> None:
        """Say which tracks there are before they are used for the first time."""
        for key in np.unique(keys).tolist():
            if key not in self._tracks:
                vcpu = key & 0xFFFF
                name = "no vCPU" if vcpu == NO_VCPU else f"vCPU {vcpu}"
                self._named_track(key, name, parent=key >> 16, rank=vcpu)

    def _named_track(self, key: int, name: str, *, parent: int | None = None, rank: int = 0) -> int:
        """The uuid of a track, described when it is new; `parent` is a VM."""
        if key in self._tracks:
            return self._uuid(key)
        self._tracks.add(key)
        body = field(1, self._uuid(key)) + field(2, name) + field(12, rank)
        if parent is not None:
            body += field(5, self._process(parent))
        self._put(_SEQUENCE + field(60, body))
        return self._uuid(key)

    def _process(self, vm: int) -> int:
        """The uuid of a VM's process."""
        key = vm << 16 | _PROCESS
        if key not in self._tracks:
            self._tracks.add(key)
            known = self._names.get(vm)
            name = f"VM {vm}" + (f": {known.name}" if known.name else "")
            pid = known.pid
            if not pid or pid in self._pids or pid >= 1 << 31:
                # A number no process has: one may run several VMs, and the viewer joins equal ones.
                pid = 1 << 30 | vm & ((1 << 30) - 1)
            self._pids.add(pid)
            process = field(1, pid) + field(6, name)
            body = field(1, self._uuid(key)) + field(3, process) + field(11, 3)
            self._put(_SEQUENCE + field(60, body))
        return self._uuid(key)

    def _uuid(self, key: int) -> int:
        return (self._base + key) % (1 << 64)


#: Keys of tracks that are no vCPU's: above every vm << 16 | vcpu.
_PROCESS, _MEMSLOTS, _FINDINGS, _LOSSES = (n << 48 for n in range(1, 5))
