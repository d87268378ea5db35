# SPDX-License-Identifier: MIT
"""Perfetto traces, read back with Perfetto's own protobufs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from perfetto.protos.perfetto.trace import (  # type: ignore[import-untyped, unused-ignore]
    perfetto_trace_pb2 as pb,
)

from kvmprobe.formats.export import export_stream
from kvmprobe.formats.export_window import Window
from kvmprobe.formats.perfetto import Hole, Template, field, message, number
from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, MemslotChange, Type
from kvmprobe.store.reader import CaptureReader
from tests.bench.events import stream as lifelike
from tests.exports import START, any_events, write
from tests.streams import RAM_GPA, TSS_GPA, UNKNOWN, ev, gone, noslot, stream, vm_gone

GOLDEN = Path(__file__).parents[1] / "data/golden/intel-6.1-tss.kvmprobe"
BEGIN, END, INSTANT = 1, 2, 3


class Trace:
    """A parsed trace: tracks by uuid, events as dicts with the interned names put in."""

    def __init__(self, data: bytes) -> None:
        trace = pb.Trace.FromString(data)
        self.packets: list[Any] = list(trace.packet)
        self.tracks: dict[int, Any] = {}
        self.events: list[dict[str, Any]] = []
        names: dict[tuple[str, int], str] = {}
        for packet in self.packets:
            assert packet.trusted_packet_sequence_id == 1
            for table, entries in packet.interned_data.ListFields():
                for entry in entries:
                    text = entry.str if hasattr(entry, "str") else entry.name
                    text = text.decode() if isinstance(text, bytes) else text
                    assert names.setdefault((table.name, entry.iid), text) == text
            if packet.HasField("track_descriptor"):
                assert packet.track_descriptor.uuid not in self.tracks
                self.tracks[packet.track_descriptor.uuid] = packet.track_descriptor
            if packet.HasField("track_event"):
                assert packet.sequence_flags == pb.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
                self.events.append(self._event(packet, names))

    def _event(self, packet: Any, names: dict[tuple[str, int], str]) -> dict[str, Any]:  # noqa: ANN401
        event = packet.track_event
        found: dict[str, Any] = {
            "ts": packet.timestamp,
            "type": event.type,
            "track": self.name(event.track_uuid),
            "category": [names["event_categories", iid] for iid in event.category_iids],
        }
        if event.type != END:
            found["name"] = event.name or names["event_names", event.name_iid]
        for note in event.debug_annotations:
            value = getattr(note, note.WhichOneof("value"))
            if note.WhichOneof("value") == "string_value_iid":
                value = names["debug_annotation_string_values", value]
            found[note.name or names["debug_annotation_names", note.name_iid]] = value
        return found

    def name(self, uuid: int) -> str:
        """A track as "process/track"."""
        track = self.tracks[uuid]
        if not track.parent_uuid:
            return str(track.name)
        return f"{self.tracks[track.parent_uuid].process.process_name}/{track.name}"

    def slices(self, track: str) -> list[tuple[int, int, str, int]]:
        """(begin, end, name, gpa) of a track's slices, which must not lie in one another."""
        found: list[tuple[int, int, str, int]] = []
        now: dict[str, Any] | None = None
        ordered = sorted((e for e in self.events if e["track"] == track), key=lambda e: e["ts"])
        for event in ordered:
            if event["type"] == BEGIN:
                assert now is None
                now = event
            elif event["type"] == END:
                assert now is not None
                found.append((now["ts"], event["ts"], now["name"], now["gpa"]))
                now = None
        assert now is None
        return found

    def instants(self, category: str) -> list[dict[str, Any]]:
        """A category's instants, in the order of the file."""
        return [e for e in self.events if e["type"] == INSTANT and e["category"] == [category]]


def trace(
    tmp_path: Path,
    *batches: NDArray[Any],
    window: Window | None = None,
    **parts: Any,  # noqa: ANN401
) -> Trace:
    path = tmp_path / "c"
    path.unlink(missing_ok=True)
    return trace_of(write(path, *batches, **parts), window)


def trace_of(path: Path, window: Window | None = None) -> Trace:
    out = io.BytesIO()
    with CaptureReader(path) as reader:
        export_stream(reader, out, "perfetto", window=window)
    return Trace(out.getvalue())


def fill(addr: int = RAM_GPA, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    return ev(Type.FILL, addr=addr, slot=-1, **fields)


def cache(addr: int = RAM_GPA, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    return ev(Type.CACHE, addr=addr, slot=-1, **fields)


_WIDTHS = st.sampled_from((1, 3, 5, 10))


@given(st.lists(st.tuples(_WIDTHS, st.integers(0, (1 << 64) - 1)), min_size=1, max_size=6))
def test_template_writes_what_a_parser_reads(holes: list[tuple[int, int]]) -> None:
    values = [value % (1 << min(7 * width, 64)) for width, value in holes]
    inner: list[bytes | Hole] = [field(10, "a name")]
    for n, (width, _) in enumerate(holes):
        inner += message(9, number(3, Hole(str(n), width)))
    template = Template(inner)
    columns = {str(n): np.array([v, 0], np.uint64) for n, v in enumerate(values)}
    first, second = (
        pb.DebugAnnotation.FromString(row.tobytes()) for row in template.fill(2, columns)
    )
    assert first.name == second.name == "a name"
    # Fields given twice are merged in protobuf: look at the last, and at each by itself.
    assert len(template.fill(2, columns)[0]) == template.size
    for n, (width, _) in enumerate(holes):
        row = Template(number(3, Hole("x", width))).fill(1, {"x": columns[str(n)][:1]})[0]
        assert pb.DebugAnnotation.FromString(row.tobytes()).uint_value == values[n]


@given(st.integers(-(1 << 63), (1 << 64) - 1), st.text())
def test_field_is_protobuf(value: int, text: str) -> None:
    data = field(10, text) + field(3, value % (1 << 64)) + field(4, value if value < 1 << 63 else 0)
    parsed = pb.DebugAnnotation.FromString(data)
    assert parsed.name == text.encode("utf-8", "replace").decode()
    assert parsed.int_value == (value if value < 1 << 63 else 0)


def test_fault_of_the_golden_capture() -> None:
    found = trace_of(GOLDEN)
    assert {d.process.pid for d in found.tracks.values() if d.HasField("process")} == {121}
    (entry,) = found.slices("VM 1: psl2/vCPU 0")
    assert entry[2:] == ("cache: TSS, presumed", TSS_GPA)
    accesses = found.instants("access")
    assert [(e["name"], e["level"], e["gpa"]) for e in accesses] == [
        ("MATCH", "L2", TSS_GPA),
        ("MMIO read, left to the VMM", "L2", TSS_GPA),
        ("MATCH", "L1", TSS_GPA),
        ("MMIO read, left to the VMM", "L1", TSS_GPA),
    ]
    assert all(entry[0] <= e["ts"] <= entry[1] for e in accesses)
    flagged = found.instants("finding")
    assert {e["track"] for e in flagged} == {"VM 1: psl2/findings"}
    assert [(e["name"], e["severity"], e["gpa"], e["count"]) for e in flagged] == [
        ("internal-slot-fill", "warning", "0xfffbd000", 1),
        ("internal-slot-hit", "critical", "0xfffbd000", 1),
    ]
    assert flagged[1]["ts"] == accesses[2]["ts"]
    assert (flagged[1]["cause"], flagged[1]["cause_age_ns"]) == ("internal-slot-fill", 298_000)


def test_clocks(tmp_path: Path) -> None:
    first, second, *_ = trace(tmp_path, stream([fill()])).packets
    clocks = {c.clock_id: c.timestamp for c in first.clock_snapshot.clocks}
    assert first.clock_snapshot.primary_trace_clock == pb.BUILTIN_CLOCK_MONOTONIC
    assert clocks == {
        pb.BUILTIN_CLOCK_MONOTONIC: START,
        pb.BUILTIN_CLOCK_REALTIME: 1_795_366_800_000_000_000,
    }
    assert second.trace_packet_defaults.timestamp_clock_id == pb.BUILTIN_CLOCK_MONOTONIC
    assert second.sequence_flags == pb.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED


CASES: dict[str, tuple[list[dict[str, Any]], list[tuple[int, int, int]]]] = {
    "to the end": ([fill(), ev(Type.FAULT)], [(1000, 2000, RAM_GPA)]),
    "to the next fill": (
        [fill(), fill(TSS_GPA), ev(Type.MATCH)],
        [(1000, 2000, RAM_GPA), (2000, 3000, TSS_GPA)],
    ),
    "an equal fill is a new one": (
        [fill(), fill()],
        [(1000, 2000, RAM_GPA), (2000, 2000, RAM_GPA)],
    ),
    "found again": ([fill(), cache(), cache()], [(1000, 3000, RAM_GPA)]),
    "found another": (
        [cache(), cache(gen=5), cache(gen=5)],
        [(1000, 2000, RAM_GPA), (2000, 3000, RAM_GPA)],
    ),
    "vCPU gone": ([fill(), gone(), ev(Type.FAULT)], [(1000, 2000, RAM_GPA)]),
    "vCPU gone and found": (
        [fill(), gone(), cache()],
        [(1000, 2000, RAM_GPA), (3000, 3000, RAM_GPA)],
    ),
    "VM gone": ([fill(), vm_gone(), ev(Type.FAULT, vm=2)], [(1000, 2000, RAM_GPA)]),
    "all at one time": (
        [fill(ts=9), fill(TSS_GPA, ts=9), fill(ts=9)],
        [(9, 9, RAM_GPA), (9, 9, TSS_GPA), (9, 9, RAM_GPA)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_entries(tmp_path: Path, name: str) -> None:
    events, wanted = CASES[name]
    rows = stream(events)
    for cuts in ([], [1], list(range(1, len(rows)))):
        found = trace(tmp_path, *np.split(rows, cuts))
        slices = found.slices("VM 1/vCPU 0")
        assert [(begin, end, gpa) for begin, end, _, gpa in slices] == wanted


def test_every_event_is_drawn_as_it_is(tmp_path: Path) -> None:
    rows = lifelike(30_000)
    rows["flags"][::3] |= 1
    found = trace(tmp_path, rows[:20_000], rows[20_000:])
    for kind, name in ((Type.MATCH, "MATCH"), (Type.MMIO, "MMIO write")):
        own = rows[rows["type"] == kind]
        drawn = sorted((e for e in found.instants("access") if e["name"] == name), key=_when)
        assert [e["gpa"] for e in drawn] == own["addr"].tolist()
        assert [e["mmio_gen"] for e in drawn] == own["gen"].tolist()
        assert [e["seq"] for e in drawn] == own["seq"].tolist()
        assert [e["ts"] for e in drawn] == own["ts"].tolist()
        note = "gva" if kind == Type.MATCH else "exit"
        assert [e[note] for e in drawn] == own["value"].tolist()
        assert [e["level"] == "L2" for e in drawn] == (own["flags"] & 1 == 1).tolist()
        assert {e["slot"] for e in drawn} == {"no slot"}
        tracks = [f"VM {e['vm']}/vCPU {e['vcpu']}" for e in own]
        assert [e["track"] for e in drawn] == tracks
    fills = rows[rows["type"] == Type.FILL]
    begins = sorted((e for e in found.events if e["type"] == BEGIN), key=_when)
    assert [e["gpa"] for e in begins] == fills["addr"].tolist()
    for vm in range(1, 5):
        for vcpu in range(4):
            own = fills[(fills["vm"] == vm) & (fills["vcpu"] == vcpu)]
            ends = [*own["ts"][1:].tolist(), int(rows["ts"].max())]
            spans = [(b, e) for b, e, _, _ in found.slices(f"VM {vm}/vCPU {vcpu}")]
            assert spans == list(zip(own["ts"].tolist(), ends, strict=True))


def _when(event: dict[str, Any]) -> int:
    return int(event["ts"])


def test_memslots_and_losses(tmp_path: Path) -> None:
    vm_event: dict[str, Any] = {"vcpu": NO_VCPU, "flags": UNKNOWN}
    found = trace(
        tmp_path,
        stream(
            [
                ev(Type.MEMSLOT, addr=RAM_GPA, value=16, gen=6, slot=3, **vm_event,
                   kind=MemslotChange.CREATED),
                ev(Type.GENERATION, addr=0, value=4, gen=6, slot=-1, **vm_event),
                ev(Type.LOSS, addr=12, slot=-1, kind=Type.MMIO, vcpu=NO_VCPU, vm=0, len=1,
                   flags=UNKNOWN),
            ]
        ),
    )  # fmt: skip
    slot, generation = found.instants("memslot")
    assert (slot["name"], slot["track"]) == ("MEMSLOT CREATED", "VM 1/memslots")
    assert (slot["base_gpa"], slot["npages"], slot["slot"]) == ("0x180000", 16, "user slot 3")
    assert (generation["name"], generation["from"], generation["to"]) == ("GENERATION", 4, 6)
    (loss,) = found.instants("loss")
    assert (loss["name"], loss["track"], loss["records"]) == ("lost: MMIO", "losses", 12)


def seen(vm: int, pid: int, name: bytes) -> dict[str, Any]:
    halves = np.frombuffer(name.ljust(16, b"\0"), "<u8").tolist()
    return ev(
        Type.LIFECYCLE, UNKNOWN, vm=vm, vcpu=NO_VCPU, slot=-1, kind=LifecycleChange.VM_SEEN,
        aux=pid, value=halves[0], gen=halves[1],
    )  # fmt: skip


def test_vms_of_one_process_stay_apart(tmp_path: Path) -> None:
    events = [seen(1, 77, b"qemu"), seen(2, 77, b"qemu"), fill(), fill(vm=2), fill(vm=3)]
    found = trace(tmp_path, stream(events))
    processes = [d.process for d in found.tracks.values() if d.HasField("process")]
    assert [p.process_name for p in processes] == ["VM 1: qemu", "VM 2: qemu", "VM 3"]
    assert [p.pid for p in processes] == [77, 1 << 30 | 2, 1 << 30 | 3]


@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3, 4, 5]])
def test_window(tmp_path: Path, cuts: Sequence[int]) -> None:
    """What is in a cache when the window opens is drawn; findings are those of all events."""
    rows = stream([fill(), fill(TSS_GPA), noslot(), ev(Type.MATCH), fill(), ev(Type.MATCH, vcpu=1)])
    parts = np.split(rows, list(cuts))
    found = trace(tmp_path, *parts, window=Window(3500, 5500))
    slices = [(b, e, gpa) for b, e, _, gpa in found.slices("VM 1/vCPU 0")]
    assert slices == [(3500, 5000, TSS_GPA), (5000, 5000, RAM_GPA)]
    assert [e["ts"] for e in found.instants("access")] == [4000]
    assert [e["name"] for e in found.instants("finding")] == ["internal-slot-hit"]
    early = trace(tmp_path, *parts, window=Window(0, 3500))
    assert [(b, e) for b, e, _, _ in early.slices("VM 1/vCPU 0")] == [(1000, 2000), (2000, 3000)]
    assert [e["name"] for e in early.instants("finding")] == ["internal-slot-fill"]


@settings(max_examples=25)
@given(st.data())
def test_any_capture_gives_a_whole_trace(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows = data.draw(any_events())
    rows["vm"] %= 3
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=2))
    found = trace(tmp_path_factory.mktemp("any"), *np.split(rows, sorted(cuts)))
    wanted = np.isin(rows["type"], (Type.FILL, Type.CACHE, Type.MATCH, Type.MMIO))
    drawn = [e for e in found.events if e["category"] in (["cache"], ["access"])]
    assert len(drawn) == wanted.sum()
    begins = sum(e["type"] == BEGIN for e in found.events)
    assert begins == sum(e["type"] == END for e in found.events)
