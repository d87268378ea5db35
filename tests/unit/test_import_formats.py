# SPDX-License-Identifier: MIT
"""The same run recorded by four tools: the same events, findings and verdict from each."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kvmprobe.analysis.run import CaptureAnalysis, analyze
from kvmprobe.errors import CaptureError, UsageError
from kvmprobe.formats.detect import open_trace
from kvmprobe.formats.importer import import_traces
from kvmprobe.formats.slots import Slot, stated
from kvmprobe.probes.schema import Flag, Type
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter
from tests.traces import SLOTS, events_of, line, path_of, translated

KINDS = ("ftrace.txt", "trace.dat", "perf.data", "perf.txt")
NAMES = {
    "ftrace.txt": "ftrace",
    "trace.dat": "trace.dat",
    "perf.data": "perf.data",
    "perf.txt": "perf script",
}


def imported(trace: Path, tmp_path: Path, slots: tuple[Slot, ...] = SLOTS) -> CaptureAnalysis:
    path = tmp_path / "x.kvmprobe"
    import_traces([trace], path, slots=slots, strict=True, force=True)
    with CaptureReader(path) as reader:
        (capture,) = analyze([reader], jit=False).captures
    return capture


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_told_by_content(kind: str) -> None:
    source = open_trace(path_of("intel-6.1", kind))
    with source.file:
        assert source.kind == NAMES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_vulnerable_kernel(kind: str, tmp_path: Path) -> None:
    capture = imported(path_of("intel-6.1", kind), tmp_path)
    fill, hit = (f for f in capture.findings if f.rule.fault == "internal-slot")
    assert (fill.rule.id, fill.level, fill.count) == ("internal-slot-fill", "L2", 1)
    assert (hit.rule.id, hit.level, hit.count) == ("internal-slot-hit", "L1", 1)
    assert (hit.gpa, hit.slot, hit.vcpu, hit.slot_confidence) == (0xFFFBD000, 32764, 0, "presumed")
    assert [Type(e["type"]).name for e in hit.evidence] == ["FILL", "MATCH", "MMIO"]
    assert capture.verdicts["internal-slot"].verdict == "vulnerable"
    assert capture.header["source"]["kind"] == "converted"
    name = capture.names.get(1).name
    assert name == "psl2"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [SLOTS, ()], ids=["stated", "well-known"])
def test_fixed_kernel(kind: str, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    capture = imported(path_of("intel-6.12", kind), tmp_path, slots)
    assert capture.findings == ()
    verdict = capture.verdicts["internal-slot"]
    assert (verdict.verdict, verdict.missing) == ("fixed", ())


@pytest.mark.parametrize("name", ["intel-6.1", "intel-6.12"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_same_events_from_every_format(name: str, kind: str) -> None:
    text, other = events_of(name, "ftrace.txt"), events_of(name, kind)
    assert len(text) == len(other) > 60
    for column in text.dtype.names or ():
        # Each file is of its own run: times, and in LIFECYCLE thread numbers, differ.
        if column != "ts":
            rows = text["type"] != Type.LIFECYCLE if column == "aux" else slice(None)
            np.testing.assert_array_equal(text[column][rows], other[column][rows], column)


@pytest.mark.parametrize("packing", ["gzip", "zstd", "two gzip members", "plain"])
@pytest.mark.parametrize("kind", ["ftrace.txt", "perf.data"])
def test_compressed_files_are_read_through(packing: str, kind: str, tmp_path: Path) -> None:
    data = lzma.decompress(path_of("intel-6.1", kind).read_bytes())
    half = len(data) // 2
    packed = {
        "plain": data,
        "gzip": gzip.compress(data),
        "zstd": pa.Codec("zstd").compress(data, asbytes=True),
        "two gzip members": gzip.compress(data[:half]) + gzip.compress(data[half:]),
    }[packing]
    (tmp_path / "x").write_bytes(packed)
    source = open_trace(tmp_path / "x")
    with source.file:
        events, tally = translated(source)
    assert events.tobytes() == events_of("intel-6.1", kind).tobytes()
    assert (tally.read, tally.unknown) == (767, 0)


@pytest.mark.parametrize("kind", ["ftrace.txt", "perf.data", "trace.dat"])
def test_cut_file_is_an_error_and_salvage_keeps_what_is_whole(kind: str, tmp_path: Path) -> None:
    whole = events_of("intel-6.1", kind)
    if kind == "trace.dat":
        data = lzma.decompress(path_of("intel-6.1", kind).read_bytes())[:-3000]
    else:
        packed = gzip.compress(lzma.decompress(path_of("intel-6.1", kind).read_bytes()))
        data = packed[: len(packed) * 3 // 4]
    cut = tmp_path / "cut"
    cut.write_bytes(data)
    with pytest.raises(CaptureError, match="byte"):
        import_traces([cut], tmp_path / "x.kvmprobe", slots=SLOTS)
    assert not (tmp_path / "x.kvmprobe").exists()
    if kind == "perf.data":
        # Its formats stand at its end: nothing can be read without them.
        with pytest.raises(CaptureError, match="nothing to salvage"):
            import_traces([cut], tmp_path / "x.kvmprobe", slots=SLOTS, salvage=True)
        return
    if kind == "trace.dat":
        with pytest.raises(CaptureError, match="nothing to salvage"):
            import_traces([cut], tmp_path / "x.kvmprobe", slots=SLOTS, salvage=True)
        return
    done = import_traces([cut], tmp_path / "x.kvmprobe", slots=SLOTS, salvage=True)
    assert 0 < done.events < len(whole)
    assert len(done.ended) == 1
    with CaptureReader(tmp_path / "x.kvmprobe") as reader:
        kept = np.concatenate([batch["addr"] for batch in reader.batches()])
        assert "cut" in reader.header["source"]["note"]
    np.testing.assert_array_equal(kept, whole["addr"][: len(kept)])


def test_strict_fails_and_names_what_was_not_understood(tmp_path: Path) -> None:
    data = lzma.decompress(path_of("intel-6.1", "ftrace.txt").read_bytes())
    (tmp_path / "x").write_bytes(data + b"what is \x1b[31mthis\n")
    with pytest.raises(CaptureError, match=r"1 lines .* what is \?\[31mthis"):
        import_traces([tmp_path / "x"], tmp_path / "y", strict=True)
    done = import_traces([tmp_path / "x"], tmp_path / "y")
    assert (done.tally.unknown, done.tally.read) == (1, 767)
    assert done.tally.samples == ["what is ?[31mthis"]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"\0" * 100, "no trace that is known"),
        (b"hello\n", "no event in it"),
        (b"\xff\xff\xff\xff1234", "capture of kvmprobe already"),
        (b"\x17\x08\x44tracing", "byte"),
        (b"PERFILE2", "byte"),
    ],
)
def test_other_files_are_refused(data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CaptureError, match=why):
        import_traces([tmp_path / "x"], tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("text", ["tss", "tss=1:1", "x=0x1000:1", "tss=0x1000:0", "tss=0x1000:99"])
def test_stated_slots_are_checked(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=GPA:PAGES"):
        stated(text)


def test_what_the_trace_does_not_tell_stays_unknown() -> None:
    events = events_of("intel-6.1", "trace.dat")
    nested = np.flatnonzero(events["type"] == Type.NESTING)[0]
    known = (events["flags"] & Flag.LEVEL_KNOWN) != 0
    assert not known[:nested].any()
    assert known[nested:].all()
    assert not (events["flags"] & (Flag.GEN_KNOWN | Flag.SLOT_KNOWN | Flag.AS_KNOWN)).any()


def test_a_touched_hole_at_a_well_known_address_leaves_the_verdict_open(tmp_path: Path) -> None:
    text = lzma.decompress(path_of("intel-6.1", "ftrace.txt").read_bytes()).decode()
    # Without L1's first access nothing shows that there is memory.
    shows = ("pfn 37f06", "37f06877")
    lines = [x for x in text.splitlines(True) if not any(word in x for word in shows)]
    (tmp_path / "x").write_text("".join(lines))
    done = import_traces([tmp_path / "x"], tmp_path / "y")
    assert [doubt[:25] for doubt in done.doubts] == ["accesses at 0xfffbd000, a"]
    with CaptureReader(tmp_path / "y") as reader:
        (capture,) = analyze([reader], jit=False).captures
    (told,) = (f for f in capture.findings if f.rule.fault == "internal-slot")
    assert (told.rule.id, told.rule.severity) == ("internal-slot-presumed", "info")
    verdict = capture.verdicts["internal-slot"]
    assert verdict.verdict == "inconclusive"
    assert "lost: 1 record of MATCH" in verdict.missing
    capture = imported(tmp_path / "x", tmp_path)
    assert capture.verdicts["internal-slot"].verdict == "vulnerable"


def test_well_known_addresses_convict_where_the_trace_shows_memory(tmp_path: Path) -> None:
    capture = imported(path_of("intel-6.1", "perf.data"), tmp_path, ())
    assert {f.rule.id for f in capture.findings} >= {"internal-slot-fill", "internal-slot-hit"}


def test_a_trace_that_names_no_vcpu_says_so(tmp_path: Path) -> None:
    text = line(1, "kvm_mmio", "mmio write len 4 gpa 0xfee000b0 val 0x0")
    (tmp_path / "x").write_text(text)
    done = import_traces([tmp_path / "x"], tmp_path / "y")
    assert (done.tally.read, done.events) == (1, 0)
    assert [doubt[:40] for doubt in done.doubts] == ["no event says which vCPU a thread runs, "]


#: A trace with one thread that names its vCPU, and what another one does that names none.
NAMED = line(1, "kvm_entry", "vcpu 0, rip 0x0", task="CPU 0/KVM-4001")
UNNAMED = "".join(
    line(i, name, text, task="CPU 1/KVM-4002")
    for i, (name, text) in enumerate(
        (
            ("mark_mmio_spte", "sptep:0xffff888000000000 gfn fee00 access 6 gen 2"),
            ("vcpu_match_mmio", "gva 0xfee000b0 gpa 0xfee000b0 Write GPA"),
            ("kvm_mmio", "mmio write len 4 gpa 0xfee000b0 val 0x0"),
        ),
        2,
    )
)


@pytest.mark.parametrize("named", ["", NAMED])
def test_events_of_threads_without_a_vcpu_are_losses(named: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(named + UNNAMED)
    verdict = imported(path, tmp_path).verdicts["internal-slot"]
    assert verdict.verdict == "inconclusive"
    assert "lost: 1 record of MATCH" in verdict.missing
    # A thread that names its vCPU later: as if the trace had begun later.
    later = line(9, "kvm_entry", "vcpu 1, rip 0x0", task="CPU 1/KVM-4002")
    path.write_text(named + UNNAMED + later)
    verdict = imported(path, tmp_path).verdicts["internal-slot"]
    assert not any("lost" in missing for missing in verdict.missing)


def test_an_old_capture_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "y"
    import_traces([path_of("intel-6.1", "perf.txt")], output)
    before = output.read_bytes()
    (tmp_path / "x").write_text("no trace\n")
    with pytest.raises(CaptureError, match="no event in it"):
        import_traces([tmp_path / "x"], output, force=True)
    with CaptureReader(output) as reader, CaptureReader(output) as same:
        header = reader.header
        with (
            pytest.raises(ZeroDivisionError),
            CaptureWriter(output, header, force=True, whole=True),
        ):
            1 / 0  # noqa: B018
        assert len(list(same.batches())) == 1
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.parametrize("packing", ["gzip", "xz", "zstd"])
def test_cut_packed_text_is_an_error_and_salvage_keeps_lines(packing: str, tmp_path: Path) -> None:
    data = lzma.decompress(path_of("intel-6.1", "ftrace.txt").read_bytes()) * 20
    if packing == "zstd":
        packed = pa.Codec("zstd").compress(data, asbytes=True)
    else:
        packed = gzip.compress(data) if packing == "gzip" else lzma.compress(data)
    (tmp_path / "x").write_bytes(packed[:-30])
    with pytest.raises(CaptureError, match="damaged or cut before byte"):
        import_traces([tmp_path / "x"], tmp_path / "y")
    done = import_traces([tmp_path / "x"], tmp_path / "y", salvage=True)
    assert done.events > 0
    assert len(done.ended) == 1
    (tmp_path / "x").write_bytes(packed[:20])
    with pytest.raises(CaptureError, match="damaged or cut before byte"):
        import_traces([tmp_path / "x"], tmp_path / "z")
