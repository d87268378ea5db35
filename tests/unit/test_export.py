# SPDX-License-Identifier: MIT
"""`kvmprobe export` from the command line: formats, places, parts of a capture, bad input."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from kvmprobe.formats.export import FORMATS, export_stream
from kvmprobe.probes.schema import EVENT, NO_VCPU, Flag, LossCause, Site, Type
from kvmprobe.store.reader import CaptureReader
from tests.bench.events import stream
from tests.commands import Call
from tests.exports import START, analysis_of, any_events, events_of, header_of, write

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/golden/intel-6.1-tss.kvmprobe"
ENDINGS = {name: endings[0] for name, endings in FORMATS.items()}
KVMPROBE = (sys.executable, "-m", "kvmprobe")


@pytest.fixture
def call(call: Call) -> Call:
    """Run `kvmprobe export`."""
    return partial(call, "export")


def as_said(event: np.void, start: int) -> dict[str, Any]:
    """An event as the page of the format says it is written, made one by one."""
    flags = int(event["flags"])
    level = "unknown" if not flags & Flag.LEVEL_KNOWN else "L2" if flags & Flag.L2 else "L1"
    ns = (int(event["ts"]) - start) % (1 << 64)
    site, vcpu = int(event["site"]), int(event["vcpu"])
    return {
        "ns": ns - (ns >> 63 << 64),
        "vm": int(event["vm"]),
        "vcpu": None if vcpu == NO_VCPU else vcpu,
        "seq": int(event["seq"]),
        "observation": Type(event["type"]).name,
        "site": Site(site).name if site in set(Site) else f"site-{site}",
        "level": level,
        "flags": [flag.name for flag in Flag if flags & flag],
        **{name: hex(int(event[name])) for name in ("addr", "value", "gen")},
        **{name: int(event[name]) for name in ("aux", "slot", "kind", "len")},
    }


def lines_of(capture: Path, form: str) -> bytes:
    with CaptureReader(capture) as reader:
        out = io.BytesIO()
        export_stream(reader, out, form)
    return out.getvalue()


@settings(max_examples=25)
@given(any_events())
def test_text_says_each_event(tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray) -> None:
    capture = write(tmp_path_factory.mktemp("text") / "c", rows)
    wanted = [as_said(row, START) for row in rows]
    first, *lines = lines_of(capture, "ndjson").decode().splitlines()
    assert json.loads(first)["schema"] == "kvmprobe.events/1"
    assert json.loads(first)["capture"] == header_of(capture)
    told = [json.loads(line) for line in lines]
    assert [{k: v for k, v in each.items() if k != "kind_name"} for each in told] == wanted
    table = list(csv.DictReader(io.StringIO(lines_of(capture, "csv").decode())))
    for line, each in zip(table, told, strict=True):
        texts = {name: "" if v is None else str(v) for name, v in each.items()}
        assert line == texts | {"flags": "|".join(each["flags"])}


def test_kinds_are_named_by_their_observation() -> None:
    told = [json.loads(line) for line in lines_of(GOLDEN, "ndjson").splitlines()[1:]]
    assert {(e["observation"], e["kind"], e["kind_name"]) for e in told} >= {
        ("LIFECYCLE", 1, "VM_SEEN"),
        ("FAULTIN", 2, "NOSLOT"),
        ("SPTE", 1, "MARKED"),
        ("MMIO", 0, "UNSATISFIED_READ"),
        ("MATCH", 0, None),
    }


def test_parquet_holds_the_columns(call: Call, tmp_path: Path) -> None:
    rows = stream(600_000)
    capture = write(tmp_path / "c", rows)
    assert call(capture, "-o", tmp_path / "c.parquet")[0] == 0
    file = pq.ParquetFile(tmp_path / "c.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [
        1 << 19,
        600_000 - (1 << 19),
    ]
    table = file.read()
    assert json.loads(table.schema.metadata[b"kvmprobe"]) == header_of(capture)
    assert table.schema.names == list(EVENT.names or ())
    for name in table.schema.names:
        assert not table.schema.field(name).nullable
        assert np.array_equal(table[name].to_numpy(), rows[name])
    encodings = {
        column.path_in_schema: (set(column.encodings), column.compression)
        for column in map(file.metadata.row_group(0).column, range(len(table.schema.names)))
    }
    assert all("BYTE_STREAM_SPLIT" in encoding for encoding, _ in encodings.values())
    assert {compression for _, compression in encodings.values()} == {"LZ4"}


def test_capture_is_the_same_again(call: Call, tmp_path: Path) -> None:
    status, out, err = call(GOLDEN, "-o", tmp_path / "again.kvmprobe")
    assert (status, out, err.count("\n")) == (0, "", 1)
    assert events_of(tmp_path / "again.kvmprobe").tobytes() == events_of(GOLDEN).tobytes()
    assert header_of(tmp_path / "again.kvmprobe") == header_of(GOLDEN)


@pytest.mark.parametrize("form", FORMATS)
def test_output_is_private_and_new(call: Call, tmp_path: Path, form: str) -> None:
    path = tmp_path / f"out{ENDINGS[form]}"
    assert call(GOLDEN, "-o", path)[0] == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    status, out, err = call(GOLDEN, "-o", path)
    assert (status, out, err) == (1, "", f"kvmprobe: {path} exists; pass --force to replace it\n")
    assert path.read_bytes() == before
    assert call(GOLDEN, "-o", path, "--to", "csv", "--force")[0] == 0
    assert path.read_bytes().startswith(b"ns,vm,")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("form", ["csv", "ndjson"])
def test_text_to_a_pipe(call: Call, form: str) -> None:
    status, out, err = call(GOLDEN, "-o", "-", "--to", form)
    assert (status, err) == (0, "")
    assert out.encode() == lines_of(GOLDEN, form)


WHEN = (
    ("0", 0), ("3us", 3), ("0.000004", 4), ("5000ns", 5), ("2026-11-22T17:00:00.000006Z", 6),
    ("2026-11-22T18:00:00.000007+01:00", 7), ("2026-11-22T17:00:00.000008", 8), ("1h", 20),
)  # fmt: skip


@pytest.mark.parametrize(("text", "first"), WHEN)
@pytest.mark.parametrize(
    ("form", "anonymize"), [("csv", []), ("parquet", []), ("capture", ["--anonymize"])]
)
def test_part_of_a_capture(
    call: Call, tmp_path: Path, text: str, first: int, form: str, anonymize: list[str]
) -> None:
    rows = np.zeros(20, EVENT)
    rows["ts"], rows["seq"], rows["type"] = START + 1000 * np.arange(20), range(20), Type.MATCH
    capture = write(tmp_path / "c", rows)
    out = tmp_path / f"out{ENDINGS[form]}"
    for option, wanted in (("--since", rows["seq"][first:]), ("--until", rows["seq"][:first])):
        assert call(capture, "-o", out, option, text, "-f", *anonymize)[0] == 0
        if form == "csv":
            got = [int(line["seq"]) for line in csv.DictReader(io.StringIO(out.read_text()))]
        elif form == "parquet":
            got = pq.read_table(out)["seq"].to_pylist()
        else:
            got = events_of(out)["seq"].tolist()
            assert "cut by time" in header_of(out)["source"]["note"]
        assert got == wanted.tolist()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "x.txt"], "x.txt doesn't say the format: add --to perfetto|parquet|csv|ndjson"),
        (["-o", "-"], "-o - needs --to csv or --to ndjson"),
        (["-o", "-", "--to", "parquet"], "-o - needs --to csv or --to ndjson"),
        (["-o", "x.csv", "--to", "xml"], "--to is one of perfetto, parquet, csv, ndjson, capture"),
        (["-o", "x.csv", "--since", "soon"], "--since: 'soon' is no time"),
        (["-o", "x.csv", "--until", "-1"], "--until: '-1' is no time"),
        (["-o", "x.csv", "--until", "1e3"], "--until: '1e3' is no time"),
        (["-o", "x.csv", "--since", "2", "--until", "2"], "--since is not before --until"),
        (["-o", "x.csv", "--since", "2026-11-22"], "doesn't know when it was recorded"),
        (["--to", "csv"], "Missing option '--output'"),
        (["-o", "x.csv", "more"], "unexpected extra argument"),
    ],
    ids=str,
)
def test_wrong_usage(call: Call, tmp_path: Path, arguments: list[str], says: str) -> None:
    blind = write(tmp_path / "c", clock={"monotonic_ns": None, "wall_ns": None}, started=None)
    status, out, err = call(blind, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not (ROOT / "x.csv").exists()


def test_what_is_no_capture(call: Call, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no capture")
    for name, says in (("none", "does not exist"), ("text", "is not a kvmprobe capture")):
        status, out, err = call(tmp_path / name, "-o", tmp_path / "x.csv")
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert says in err
    assert not (tmp_path / "x.csv").exists()


def test_places_that_are_no_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "x.csv")
    for place, says in (
        (tmp_path, "doesn't say the format"),
        (tmp_path / "link.csv", "is a symbolic link"),
        (tmp_path / "no/such.csv", "No such file or directory"),
    ):
        status, _, err = call(GOLDEN, "-o", place)
        assert (status, err.count("\n")) == (2 if place == tmp_path else 1, 1)
        assert says in err
    capture = write(tmp_path / "c.kvmprobe", stream(100))
    for arguments in (["--to", "csv"], ["--anonymize"]):
        status, _, err = call(capture, "-o", capture, "-f", *arguments)
        assert (status, err) == (
            1,
            f"kvmprobe: {capture} is the capture itself; choose another -o\n",
        )
    assert len(events_of(capture)) == 100


@pytest.mark.parametrize("form", FORMATS)
def test_full_disk_leaves_nothing(tmp_path: Path, form: str) -> None:
    capture = write(tmp_path / "c", *(stream(60_000, seed) for seed in range(2)))
    path = tmp_path / f"out{ENDINGS[form]}"
    run = subprocess.run(
        [*KVMPROBE, "export", capture, "-o", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == (
        f"kvmprobe: can't write {path}: the file would exceed the size limit; "
        "raise `ulimit -f` or record less\n"
    )
    assert list(tmp_path.iterdir()) == [capture]


@pytest.mark.parametrize("form", ["csv", "ndjson"])
@pytest.mark.parametrize("events", [10, 20_000])
def test_full_standard_output(tmp_path: Path, form: str, events: int) -> None:
    capture = write(tmp_path / "c", stream(events))
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            [*KVMPROBE, "export", capture, "-o", "-", "--to", form],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert run.returncode == 1
    assert run.stderr == "kvmprobe: can't write the output: No space left on device\n"


def test_reader_that_goes_early(tmp_path: Path) -> None:
    capture = write(tmp_path / "c", stream(20_000))
    command = f"{' '.join(KVMPROBE)} export {capture} -o - --to csv | head -1"
    run = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines()[1:] == ["0"]
    assert run.stderr == ""


@pytest.mark.parametrize("form", FORMATS)
def test_damage_is_told(call: Call, tmp_path: Path, form: str) -> None:
    capture = write(tmp_path / "c", *(stream(100, seed) for seed in range(3)))
    with CaptureReader(capture) as reader:
        last = list(reader.infos())[2]
    data = bytearray(capture.read_bytes())
    data[last.offset + last.size - 40] ^= 1
    capture.write_bytes(data)
    path = tmp_path / f"out{ENDINGS[form]}"
    status, out, err = call(capture, "-o", path)
    assert (status, out, err.count("\n")) == (1, "", 2)
    warning, summary = err.splitlines()
    assert warning.startswith(f"kvmprobe: {capture}: what could be read is exported: batch 2 is")
    assert summary.startswith(f"{path}: ")
    if form == "capture":
        events = events_of(path)
        loss = events[200]
        assert len(events) == 201
        assert (loss["type"], loss["addr"], loss["len"]) == (Type.LOSS, 100, LossCause.READ)
        assert analysis_of(path).verdict == "inconclusive"


def test_capture_that_ends_early(call: Call, tmp_path: Path) -> None:
    capture = write(tmp_path / "c", *(stream(100, seed) for seed in range(3)))
    os.truncate(capture, capture.stat().st_size - 30)
    out = tmp_path / "out.kvmprobe"
    status, _, err = call(capture, "-o", out)
    assert status == 0
    assert "what could be read is exported: " in err
    assert len(events_of(out)) == 200
    assert header_of(out)["source"]["note"] == "the capture it was made of ends early"


def test_capture_without_events(call: Call, tmp_path: Path) -> None:
    capture = write(tmp_path / "c")
    for form, ending in ENDINGS.items():
        assert call(capture, "-o", tmp_path / f"x{ending}")[0] == 0, form
    assert (tmp_path / "x.csv").read_text().count("\n") == 1
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 0
