# SPDX-License-Identifier: MIT
"""`kvmprobe export --anonymize`: what happened stays, and who and where is gone from the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmprobe.formats.anonymize import Anonymizer
from kvmprobe.formats.export import FORMATS, Summary, export_file
from kvmprobe.formats.export_window import Window
from kvmprobe.probes.schema import NO_VCPU, Flag, LifecycleChange, Type, columns
from kvmprobe.store.format import check_header
from kvmprobe.store.reader import CaptureReader
from tests.exports import START, any_events, events_of, header, header_of, told, write
from tests.streams import L1, L2, UNKNOWN, ev, interleave, noslot, stream, vcpu_streams

GOLDEN = sorted((Path(__file__).parents[1] / "data/golden").glob("intel-*.kvmprobe"))

#: Names and ids of a host that must not get out; each stands in a capture made below.
WORDS = (
    "boot-7c2e", "machine-91ab", "acmekernel", "acmevendor", "kvm_acme", "acmeparam", "acmevalue",
    "buildid4711", "acmenote", "acmevm", "acmecmd", "acmearg", "acmesecretvm", "acmethread",
    "acmefield", "acmelayout", "acmeplan", "acmereason", "acmetool",
)  # fmt: skip
PIDS = (2718281, 3141592)
GVAS = (0x7FAB12345678, 0x7FCD87654321)
RIP, OPCODE, BORN = 0xFFFFFFFF81ABCDEF, 0x8B48D1E5, 123456789012345


def export(capture: Path, path: Path, **options: Any) -> Summary:  # noqa: ANN401
    path.unlink(missing_ok=True)
    with CaptureReader(capture) as reader:
        return export_file(reader, path, options.pop("form", "capture"), anonymize=True, **options)


def _halves(name: str) -> dict[str, int]:
    first, second = np.frombuffer(name.encode().ljust(16, b"\0"), "<u8").tolist()
    return {"value": first, "gen": second}


def telling(path: Path) -> Path:
    """A capture full of names."""
    made = header()
    made["tool"] = {"name": "acmetool", "version": "acmetool"}
    made["source"]["note"] = "acmenote"
    made["host"] = {
        "boot_id": "boot-7c2e", "machine": "machine-91ab", "kernel": "6.1.0-acmekernel",
        "vendor": "acmevendor", "modules": {"kvm": "buildid4711", "kvm_acme": None},
        "parameters": {"kvm.ept": "Y", "kvm.acmeparam": "acmevalue", "kvm_acme.x": "1"},
    }  # fmt: skip
    made["layout"] = {"acmelayout": 7}
    made["plan"] = [
        {"observation": "MATCH", "site": "MATCH_MMIO", "attachment": "tracepoint:kvm_mmio/acmeplan",
         "attached": True, "reason": "acmereason"},
        {"observation": "acmeplan", "site": None, "attachment": None, "attached": True,
         "reason": None},
    ]  # fmt: skip
    made["filters"] = {"pid": PIDS[0], "vm": "acmevm", "vcpu": 0}
    made["command"] = ["/opt/acmecmd", "--vm", "acmearg"]
    made["acmefield"] = "acmefield"
    life = {"slot": -1, "addr": BORN}
    events = [
        ev(Type.LIFECYCLE, UNKNOWN, **life, vcpu=NO_VCPU, kind=LifecycleChange.VM_SEEN,
           aux=PIDS[0], **_halves("acmesecretvm")),
        ev(Type.LIFECYCLE, UNKNOWN, **life, kind=LifecycleChange.VCPU_SEEN, aux=PIDS[1],
           **_halves("acmethread")),
        ev(Type.FILL, L2, value=GVAS[0]),
        ev(Type.CACHE, L1, value=GVAS[0]),
        ev(Type.MATCH, L1, addr=0xFFFBD123, value=GVAS[1]),
        ev(Type.FAULT, L1, addr=GVAS[1], slot=-1),
        ev(Type.EMULATE, L1, addr=RIP, value=OPCODE, slot=-1),
    ]  # fmt: skip
    return write(path, stream(events), **made)


@pytest.mark.parametrize("form", FORMATS)
def test_no_name_is_in_the_bytes(tmp_path: Path, form: str) -> None:
    capture = telling(tmp_path / "c")
    export(capture, tmp_path / "out", form=form)
    data = (tmp_path / "out").read_bytes()
    numbers: list[bytes] = []
    if form == "capture":
        numbers = [events_of(tmp_path / "out")[name].tobytes() for name in ("addr", "value", "aux")]
    elif form == "parquet":
        table = pq.read_table(tmp_path / "out")
        numbers = [table[name].to_numpy().tobytes() for name in ("addr", "value", "aux")]
    everything = b"\n".join([data, *numbers])
    for word in WORDS:
        assert word.encode() not in everything, word
        for half in (word[:8], word[8:16]):
            number = int.from_bytes(half.encode(), "little")
            assert len(half) < 8 or f"{number:x}".encode() not in everything
    for number in (*PIDS, *GVAS, RIP, OPCODE, BORN, 0x123 | 0xFFFBD000):
        for text in (f"{number}", f"{number:x}"):
            assert len(text) < 7 or text.encode() not in data
        size = 4 if number < 1 << 32 else 8
        assert number.to_bytes(size, "little") not in everything
    assert b"2026-11-22" not in everything


def test_the_original_tells_all_of_it(tmp_path: Path) -> None:
    """The search above would find what it looks for."""
    capture = telling(tmp_path / "c")
    with CaptureReader(capture) as reader:
        export_file(reader, tmp_path / "c.ndjson", "ndjson")
    data = (tmp_path / "c.ndjson").read_text() + events_of(capture).tobytes().decode("latin-1")
    assert [word for word in WORDS if word not in data] == []
    for number in (*PIDS, *GVAS, RIP, OPCODE, BORN):
        assert f"{number}" in data or f"{number:x}" in data


def test_what_is_harmless_stays(tmp_path: Path) -> None:
    export(telling(tmp_path / "c"), tmp_path / "out")
    made = header_of(tmp_path / "out")
    assert made["host"]["kernel"] == "6.1.0"
    assert made["host"]["parameters"] == {"kvm.ept": "Y"}
    assert [(row["observation"], row["attached"]) for row in made["plan"]] == [("MATCH", True)]
    assert made["filters"]["vcpu"] == 0
    assert (made["started"], made["clock"]["wall_ns"]) == (None, None)
    assert made["source"]["note"].startswith("anonymized")
    old, new = events_of(tmp_path / "c"), events_of(tmp_path / "out")
    for name in ("vm", "vcpu", "seq", "type", "site", "flags", "slot", "kind", "len"):
        assert np.array_equal(old[name], new[name])
    assert new["addr"].tolist() == [0, 0, 0xFFFBD000, 0xFFFBD000, 0xFFFBD000, 0, 0]
    assert np.array_equal(np.diff(old["ts"]), np.diff(new["ts"]))


def test_pseudonyms_agree_in_one_export_and_differ_between_two(tmp_path: Path) -> None:
    capture = telling(tmp_path / "c")
    pids, names, boots = set(), set(), set()
    for n in range(2):
        export(capture, tmp_path / f"out{n}")
        made, events = header_of(tmp_path / f"out{n}"), events_of(tmp_path / f"out{n}")
        assert made["filters"]["pid"] == events["aux"][0] != events["aux"][1]
        pids.add(int(events["aux"][0]))
        names.add(int(events["gen"][0]))
        boots.add(made["host"]["boot_id"])
    assert [len(each) for each in (pids, names, boots)] == [2, 2, 2]


@pytest.mark.parametrize("capture", GOLDEN, ids=lambda path: path.stem)
def test_golden_captures_say_the_same(tmp_path: Path, capture: Path) -> None:
    export(capture, tmp_path / "out")
    assert told(tmp_path / "out") == told(capture)
    assert told(tmp_path / "out")[2] in ("vulnerable", "inconclusive")


@settings(max_examples=20)
@given(vcpu_streams(), st.integers(0, 1000))
def test_findings_and_verdicts_stay(
    tmp_path_factory: pytest.TempPathFactory, streams: list[list[dict[str, Any]]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("same")
    plan = [
        {"observation": kind.name, "site": None, "attachment": None, "attached": True,
         "reason": None}
        for kind in Type
    ]  # fmt: skip
    rows = stream(interleave(streams, seed), start=START)
    capture = write(folder / "c", rows[: len(rows) // 2], rows[len(rows) // 2 :], plan=plan)
    export(capture, folder / "out")
    assert told(folder / "out") == told(capture)


@settings(max_examples=40)
@given(any_events())
def test_any_event_loses_its_addresses(rows: np.ndarray[Any, Any]) -> None:
    anonymizer = Anonymizer()
    check_header(anonymizer.header(header()))
    before = rows.tobytes()
    out = anonymizer.batch(columns(rows))
    assert rows.tobytes() == before
    kinds = rows["type"]
    physical = np.isin(
        kinds, (Type.FAULTIN, Type.FILL, Type.CACHE, Type.MATCH, Type.MMIO, Type.SPTE)
    )
    assert np.array_equal(out["addr"][physical], rows["addr"][physical] >> 12 << 12)
    assert not out["value"][np.isin(kinds, (Type.FILL, Type.CACHE, Type.MATCH))].any()
    emulate = kinds == Type.EMULATE
    assert not out["addr"][emulate].any()
    assert not out["value"][emulate].any()
    shadow = (kinds == Type.FAULT) & (rows["flags"] & (Flag.DIRECT | Flag.NESTED_MMU) == 0)
    assert not out["addr"][shadow | (kinds == Type.LIFECYCLE)].any()


def test_window_is_the_original_one(tmp_path: Path) -> None:
    capture = write(tmp_path / "c", stream([noslot() for _ in range(9)], start=START))
    window = Window(START + 2000, START + 5000)
    assert export(capture, tmp_path / "out", window=window).events == 3
    assert events_of(tmp_path / "out")["seq"].tolist() == [2, 3, 4]
