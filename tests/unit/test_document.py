# SPDX-License-Identifier: MIT
"""The public document, the text and the frame of an analysis."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.analysis.document import json_schema
from kvmprobe.analysis.run import Analysis, analyze
from kvmprobe.analysis.text import duration, render, slot_name
from kvmprobe.probes.schema import (
    EVENT,
    NO_VCPU,
    SLOT_APIC,
    SLOT_IDENTITY,
    SLOT_TSS,
    Columns,
    Flag,
    LifecycleChange,
    Type,
    columns,
)
from kvmprobe.store.format import new_header
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter
from tests import rule_cases
from tests.streams import L1, L2, LIVE, RAM_GPA, ev, interleave, kept, noslot, stream, vcpu_streams
from tests.traces import GOLDEN

FULL = (
    ("FAULTIN", "FAULTIN"),
    ("FILL", "NOSLOT"),
    ("CACHE", "ENTRY"),
    ("MATCH", "MATCH_MMIO"),
    ("MMIO", "MMIO"),
)
START = 10**12


class Memory:
    """A capture that isn't a file."""

    def __init__(self, rows: NDArray[Any], path: str = "memory", **host: str) -> None:
        self.path = path
        self.rows = rows
        self.truncated: str | None = None
        self.damaged: Sequence[object] = []
        self.unknown_events: dict[int, int] = {}
        self.header = new_header("live")
        self.header["started"] = "2026-11-22T15:51:37.000001Z"
        self.header["clock"] = {"monotonic_ns": START, "wall_ns": 5}
        self.header["host"] |= {"kernel": "6.1.0", "boot_id": "b", "modules": {"kvm": "ab"}} | host
        self.header["plan"] = [
            {"observation": o, "site": s, "attachment": "a", "attached": True, "reason": ""}
            for o, s in FULL
        ]

    def batches(self, wanted: Sequence[str] | None = None) -> Iterator[Columns]:
        for part in np.array_split(self.rows, 3):
            yield columns(part)


def _seen(comm: bytes, vm: int = 1) -> dict[str, Any]:
    halves = np.frombuffer(comm.ljust(16, b"\0")[:16], "<u8").tolist()
    fields: dict[str, Any] = {"value": halves[0], "gen": halves[1], "aux": 4711}
    kind = LifecycleChange.VM_SEEN
    return ev(Type.LIFECYCLE, slot=-1, vm=vm, vcpu=NO_VCPU, kind=kind, **fields)


def _analyze(*events: dict[str, Any]) -> Analysis:
    return analyze([Memory(stream(events, START + 1000))], jit=False)


def _document(analysis: Analysis) -> dict[str, Any]:
    """The document as a program would read it, checked."""
    read: dict[str, Any] = json.loads(json.dumps(analysis.to_document(), allow_nan=False))
    validator = jsonschema.Draft202012Validator(
        json_schema(), format_checker=jsonschema.FormatChecker()
    )
    validator.validate(read)
    return read


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_a_finding_in_full() -> None:
    analysis = _analyze(
        _seen(b"qemu-kvm"), noslot(), ev(Type.FILL, L2), ev(Type.MATCH, addr=0xFFFBD00C)
    )
    document = _document(analysis)
    assert document["schema"] == "kvmprobe.analysis/1"
    assert document["host"] == {
        "boot_id": "b", "kernel": "6.1.0", "modules": {"kvm": "ab"}, "parameters": {},
    }  # fmt: skip
    assert document["captures"][0]["started"] == "2026-11-22T15:51:37.000001Z"
    assert (document["events"], document["lost"], document["verdict"]) == (4, 0, "vulnerable")
    assert document["observations"] == {"FAULTIN": 1, "FILL": 1, "MATCH": 1, "LIFECYCLE": 1}
    assert list(document["verdicts"]) == [
        "internal-slot", "cache-hits-memory", "address-space", "spte-overwrite",
    ]  # fmt: skip
    fill, hit = document["findings"]
    evidence = hit.pop("evidence")
    assert hit == {
        "rule": "internal-slot-hit", "fault": "internal-slot", "severity": "critical",
        "capture": 0, "vm": {"id": 1, "name": "qemu-kvm", "pid": 4711}, "vcpu": 0,
        "thread": None, "level": "L1",
        "gpa": "0xfffbd00c", "slot": SLOT_TSS, "slot_confidence": "observed", "first_ns": 4000,
        "last_ns": 4000, "count": 1, "per_second": None,
        "cause": {"rule": "internal-slot-fill", "age_ns": 1000, "count": 1},
    }  # fmt: skip
    assert evidence["total"] == 2
    assert [e["observation"] for e in evidence["events"]] == ["FILL", "MATCH"]
    assert fill["cause"] is None


def test_64_bit_values_are_exact() -> None:
    big = (1 << 63) + (1 << 53) + 1
    document = _document(_analyze(ev(Type.MATCH, addr=big, value=big + 1, gen=big + 2)))
    (finding,) = document["findings"]
    (event,) = finding["evidence"]["events"]
    assert finding["gpa"] == f"0x{big:x}"
    assert (event["value"], event["gen"]) == (f"0x{big + 1:x}", f"0x{big + 2:x}")


def test_evidence_is_bounded() -> None:
    (finding,) = _document(_analyze(*[ev(Type.MATCH)] * 150))["findings"]
    assert (finding["evidence"]["total"], len(finding["evidence"]["events"])) == (150, 100)
    assert finding["per_second"] == pytest.approx(1e6)


def test_losses_are_told() -> None:
    fields: dict[str, Any] = {"kind": Type.FILL, "aux": 3, "len": 1}
    lost = ev(Type.LOSS, vm=0, vcpu=NO_VCPU, addr=7, slot=0, **fields)
    document = _document(_analyze(kept(), lost))
    assert (document["lost"], document["verdict"]) == (7, "inconclusive")
    (loss,) = document["captures"][0]["losses"]
    assert loss == {"observation": "FILL", "cpu": 3, "cause": "RING", "records": 7, "vm": None}
    assert document["observations"] == {"FAULTIN": 1}


@pytest.mark.parametrize(
    ("kind", "events"),
    [
        ("repeats", [ev(Type.MATCH, seq=5), ev(Type.MATCH, seq=5)]),
        ("goes back", [ev(Type.EMULATE, seq=5), ev(Type.MATCH, seq=3)]),
        ("L2 without a known level", [ev(Type.MATCH), ev(Type.MMIO, Flag.L2, kind=0)]),
        ("belongs to no VM", [ev(Type.MATCH, vm=0)]),
    ],
)
def test_events_that_no_kernel_makes_are_named_and_find_nothing(
    kind: str, events: list[dict[str, Any]]
) -> None:
    analysis = _analyze(*events, ev(Type.MATCH, vcpu=7))
    document = _document(analysis)
    assert [f["vcpu"] for f in document["findings"]] == [7]
    assert document["captures"][0]["anomalies"] == {kind: 1}
    assert f"events that no kernel makes: {kind} (1)" in render(analysis)
    assert _document(_analyze(*events))["verdict"] == "inconclusive"


def test_time_going_back_between_cpus_and_new_vcpus_are_normal() -> None:
    events = [ev(Type.MATCH, vcpu=1, ts=9000, seq=77), ev(Type.MATCH, vcpu=2, ts=8000, seq=3)]
    document = _document(_analyze(*events))
    assert document["captures"][0]["anomalies"] == {}
    assert [f["vcpu"] for f in document["findings"]] == [2, 1]


def test_a_finding_of_a_vm_itself() -> None:
    analysis = _analyze(*rule_cases.storm(100, 6, start=START))
    (finding,) = _document(analysis)["findings"]
    assert (finding["rule"], finding["gpa"], finding["slot"]) == ("stale-spte-storm", None, None)
    assert finding["vcpu"] == NO_VCPU
    text = render(analysis)
    assert "where   VM 1\n" in text
    assert "2 times within 1.000 s" in text


def test_a_symptom_gets_no_verdict() -> None:
    document = _document(_analyze(ev(Type.MMIO, addr=RAM_GPA, slot=3, kind=0)))
    assert [f["rule"] for f in document["findings"]] == ["unexplained-mmio"]
    assert "vulnerable" not in [v["verdict"] for v in document["verdicts"].values()]


def test_unknown_numbers_keep_their_number() -> None:
    document = _document(_analyze(ev(Type.MATCH, site=99), ev(Type.FAULT, type=77)))
    assert document["findings"][0]["evidence"]["events"][0]["site"] == "site-99"
    assert document["observations"] == {"MATCH": 1, "type-77": 1}


def test_several_captures() -> None:
    one = Memory(stream([kept()]), "one")
    two = Memory(stream([ev(Type.MATCH)]), "two", kernel="6.12.0")
    document = _document(analyze([one, two], jit=False))
    assert [c["file"] for c in document["captures"]] == ["one", "two"]
    assert document["host"]["kernel"] is None
    assert document["host"]["boot_id"] == "b"
    assert [f["capture"] for f in document["findings"]] == [1]
    assert (document["events"], document["verdict"]) == (2, "vulnerable")


def test_no_capture_at_all() -> None:
    document = _document(analyze([], jit=False))
    assert (document["events"], document["findings"]) == (0, [])


def test_a_written_capture(tmp_path: Path) -> None:
    rows = stream([_seen(b"vmm"), noslot(), ev(Type.FILL, L2), ev(Type.MATCH)], START)
    path = tmp_path / "a.kvmprobe"
    with CaptureWriter(path, Memory(rows).header) as writer:
        writer.write(rows[:2])
        writer.write(rows[2:])
    with CaptureReader(path) as reader:
        document = _document(analyze([reader]))
    assert [f["rule"] for f in document["findings"]] == ["internal-slot-fill", "internal-slot-hit"]
    path.write_bytes(path.read_bytes()[:-100])
    with CaptureReader(path) as reader:
        cut = _document(analyze([reader]))
    assert [f["rule"] for f in cut["findings"]] == ["internal-slot-fill"]
    assert cut["captures"][0]["truncated"]


@pytest.mark.parametrize("name", ["intel-6.1-tss", "intel-6.12-tss"])
@pytest.mark.parametrize("width", [80, 100, 500])
def test_golden_captures_in_words(name: str, width: int) -> None:
    with CaptureReader(GOLDEN / f"{name}.kvmprobe") as reader:
        analysis = analyze([reader], jit=False)
    _document(analysis)
    lines = render(analysis, width).splitlines()
    assert lines[0] == f"Verdict: {analysis.verdict}"
    text = " ".join(" ".join(lines).split())
    assert "presumed at 0xfffbd000" in text
    assert all(len(line) <= min(width, 100) for line in lines if "/" not in line)
    if name == "intel-6.1-tss":
        assert "gpa 0xfffbd000 (TSS, presumed), VM 1 (psl2, pid 121), vCPU 0, L1" in text
        assert "the newest internal-slot-fill on this vCPU, 298.000 us before; 1 in all" in text
        assert text.index("internal-slot: vulnerable") < text.index("2 findings:")
        assert text.count("What to do:") == 2
    else:
        assert "internal-slot: fixed" in text
        assert text.endswith("0 findings.")


def test_text_of_many_occurrences() -> None:
    text = render(_analyze(*[ev(Type.MATCH, addr=RAM_GPA, slot=7)] * 200))
    flat = " ".join(text.split())
    assert "user slot 7" in flat
    assert "200 times within 199.000 us (1,000,000.0 a second)" in flat
    assert "200 events, the first 100 kept" in flat
    assert "VM 1, vCPU 0" in flat


def test_names_of_others_cannot_command_a_terminal() -> None:
    analysis = _analyze(_seen(b"\x1b[31mred\n\xff\x07"), ev(Type.MATCH))
    analysis.captures[0].header["source"]["note"] = "note \x1b]0;title\x07"
    text = render(analysis)
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "\\x1b[31mred\\n" in text
    assert _document(analysis)["findings"][0]["vm"]["name"].isprintable()


@given(vcpu_streams(), st.integers(0, 2**32 - 1))
def test_every_stream_has_a_document_and_a_text(
    streams: list[list[dict[str, Any]]], seed: int
) -> None:
    analysis = _analyze(*interleave(streams, seed))
    document = _document(analysis)
    assert len(document["findings"]) == len(analysis.findings)
    assert all(len(line) <= 80 for line in render(analysis).splitlines())


def test_frame() -> None:
    big = (1 << 63) + (1 << 53) + 1
    analysis = _analyze(_seen(b"vmm"), ev(Type.CACHE, L1 | LIVE, addr=big), *[ev(Type.MATCH)] * 3)
    frame = analysis.to_frame()
    assert frame["rule"].tolist() == ["internal-slot-armed", "internal-slot-hit"]
    assert frame["gpa"].dtype == np.dtype("u8")
    assert frame["gpa"][0] == big
    assert frame["vm_name"].tolist() == ["vmm", "vmm"]
    assert frame["pid"].tolist() == [4711, 4711]
    assert frame["count"].tolist() == [1, 3]
    assert frame["first_ns"].tolist() == [2000, 3000]
    empty = _analyze(kept()).to_frame()
    assert len(empty) == 0
    assert empty.dtypes.equals(frame.dtypes)


def test_frame_of_impossible_times() -> None:
    frame = analyze([Memory(stream([ev(Type.MATCH, ts=2**64 - 1)]))], jit=False).to_frame()
    assert frame["last_ns"].tolist() == [2**63 - 1]


def test_small_words() -> None:
    assert [slot_name(s) for s in (SLOT_TSS, SLOT_APIC, SLOT_IDENTITY, 4, None)] == [
        "TSS", "APIC access page", "identity map", "user slot 4", "no slot",
    ]  # fmt: skip
    assert [duration(n) for n in (5, 1500, -2_500_000, 3 * 10**9)] == [
        "5 ns", "1.500 us", "-2.500 ms", "3.000 s",
    ]  # fmt: skip


def test_events_have_every_field() -> None:
    (finding,) = _document(_analyze(ev(Type.MATCH)))["findings"]
    (event,) = finding["evidence"]["events"]
    renamed = {"ts": "ns", "type": "observation"}
    fields = {renamed.get(name, name) for name in EVENT.names or ()} - {"vm", "vcpu"}
    assert set(event) == fields | {"level"}
