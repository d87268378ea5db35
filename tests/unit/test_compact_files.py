# SPDX-License-Identifier: MIT
"""`kvmprobe compact`: what a Parquet file says is what the recording says, and bad files."""

from __future__ import annotations

import json
import resource
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmprobe
from kvmprobe.analysis.detector import STEPPED
from kvmprobe.analysis.judge import COLUMNS, further
from kvmprobe.analysis.run import Screening, analyze
from kvmprobe.cli.compact import compact
from kvmprobe.errors import CaptureError
from kvmprobe.probes.schema import EVENT, NO_VCPU, Type, rows
from kvmprobe.store.reader import CaptureReader
from tests.bench.events import stream
from tests.commands import Call
from tests.exports import any_events, events_of, header_of, write

ROOT = Path(__file__).parents[2]
GOLDENS = sorted((ROOT / "tests/data/golden").glob("*.kvmprobe"))
GOLDEN = ROOT / "tests/data/golden/lab-6.1-intel.kvmprobe"


def document(path: Path) -> dict[str, Any]:
    """The analysis of a capture as a document, without the capture's path."""
    with CaptureReader(path) as reader:
        made = analyze([reader], jit=False).to_document()
    text = json.dumps(made).replace(json.dumps(str(path))[1:-1], "PATH")
    return dict(json.loads(text))


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_the_same_of_both(call: Call, tmp_path: Path, path: Path) -> None:
    made = tmp_path / "c.parquet"
    assert call("compact", path, "-o", made)[0] == 0
    assert events_of(made).tobytes() == events_of(path).tobytes()
    assert header_of(made) == header_of(path)
    assert document(made) == document(path)


def test_every_command_reads_both(call: Call, tmp_path: Path) -> None:
    made = tmp_path / "c.parquet"
    assert call("compact", GOLDEN, "-o", made)[0] == 0
    for arguments in (["info", "--json"], ["stat"], ["analyze"]):
        before, after = (
            call(arguments[0], path, *arguments[1:])[1].replace(str(path), "PATH")
            for path in (GOLDEN, made)
        )
        assert after
        if arguments[0] == "info":
            said = [json.loads(text) for text in (before, after)]
            assert said[1] == said[0] | {"batches": 1}
        else:
            # The length of a path decides where a line is broken.
            assert after.split() == before.split()
    assert call("report", made, "-o", tmp_path / "c.html")[0] == 0
    assert call("export", made, "-o", tmp_path / "c.kvmprobe")[0] == 0
    assert events_of(tmp_path / "c.kvmprobe").tobytes() == events_of(GOLDEN).tobytes()
    with kvmprobe.open(made) as capture:
        assert capture.count() == len(events_of(GOLDEN))


@settings(max_examples=8)
@given(any_events())
def test_any_events_come_back(tmp_path_factory: pytest.TempPathFactory, made: np.ndarray) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = write(folder / "c", made)
    assert call_compact(path, folder / "c.parquet") == 0
    assert events_of(folder / "c.parquet").tobytes() == events_of(path).tobytes()
    assert document(folder / "c.parquet") == document(path)


def call_compact(capture: Path, target: Path) -> int:
    return compact([capture], target, None)


def test_damage_stays_known(call: Call, tmp_path: Path) -> None:
    path = write(tmp_path / "c", *(stream(1000, seed) for seed in range(4)))
    with CaptureReader(path) as reader:
        infos = list(reader.infos())
    data = bytearray(path.read_bytes())
    data[infos[1].offset + infos[1].size // 2] ^= 1
    path.write_bytes(data[: infos[3].offset + 100])
    made = tmp_path / "c.parquet"
    status, _, err = call("compact", path, "-o", made)
    assert status == 1
    assert "batch 1 is damaged" in err
    with CaptureReader(path) as old, CaptureReader(made) as new:
        assert sum(len(batch["ts"]) for batch in old.batches()) == 2000
        assert sum(len(batch["ts"]) for batch in new.batches()) == 2000
        assert (new.damaged, new.truncated) == (old.damaged, old.truncated)
    assert document(made) == document(path)


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (None, COLUMNS),
        (Type.GENERATION, (*COLUMNS, *STEPPED)),
        (Type.LOSS, EVENT.names),
    ],
)
def test_only_what_the_rules_need_is_read(
    call: Call, tmp_path: Path, kind: Type | None, read: tuple[str, ...]
) -> None:
    events = stream(1000)
    events = events[events["type"] != Type.GENERATION]
    if kind is not None:
        told = {"type": kind, "vcpu": NO_VCPU, "kind": Type.MMIO, "addr": 7}
        for name, value in told.items():
            events[name][-1] = value
    made = tmp_path / "c.parquet"
    assert call("compact", write(tmp_path / "c", events), "-o", made)[0] == 0
    with CaptureReader(made) as reader:
        assert isinstance(reader, Screening)
        (batch,) = reader.screened(COLUMNS, further)
        assert set(batch) == set(read)
        # The others come when they are asked for.
        assert rows({name: batch[name] for name in EVENT.names or ()}).tobytes() == events.tobytes()
    with CaptureReader(made) as reader:
        assert analyze([reader], jit=False).lost == (7 if kind == Type.LOSS else 0)


def test_evidence_that_was_not_read_ahead(call: Call, tmp_path: Path) -> None:
    events = np.zeros(1000, EVENT)
    events["ts"] = 10**12 + np.arange(1000) * 8_000_000
    events["vm"], events["vcpu"], events["slot"] = 1, NO_VCPU, -1
    events["type"], events["value"] = Type.GENERATION, np.arange(1000)
    made = tmp_path / "c.parquet"
    assert call("compact", write(tmp_path / "c", events), "-o", made)[0] == 0
    with CaptureReader(made) as reader:
        (finding,) = analyze([reader], jit=False).captures[0].findings
    assert finding.rule.id == "stale-spte-storm"
    assert set(finding.evidence["value"].tolist()) <= set(range(1000)) - {0}

    data = bytearray(made.read_bytes())
    chunk = pq.read_metadata(made).row_group(0).column(list(EVENT.names or ()).index("value"))
    data[chunk.data_page_offset + chunk.total_compressed_size - 10] ^= 1
    made.write_bytes(data)
    with CaptureReader(made) as reader:
        (capture,) = analyze([reader], jit=False).captures
        assert [damage.batch_index for damage in reader.damaged] == [0]
    assert not capture.findings[0].evidence["value"].any()
    assert capture.coverage.damaged == 1


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
    st.none() | st.floats(0, 1, exclude_max=True),
)
def test_bad_bytes(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[float, int]], cut: float | None
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    good = folder / "good"
    assert call_compact(GOLDEN, good) == 0
    data = bytearray(good.read_bytes())
    for at, mask in flips:
        data[4 + int(at * (len(data) - 4))] ^= mask
    if cut is not None:
        del data[4 + int(cut * (len(data) - 4)) :]
    (folder / "bad").write_bytes(data)
    try:
        reader = CaptureReader(folder / "bad")
    except CaptureError:
        return
    with reader:
        found = b"".join(rows(batch).tobytes() for batch in reader.batches())
    assert reader.damaged or found == events_of(GOLDEN).tobytes()


def test_what_is_no_capture(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign")
    with pytest.raises(CaptureError, match="a Parquet file, but not a kvmprobe capture"):
        CaptureReader(tmp_path / "foreign")
    (tmp_path / "short").write_bytes(b"PAR1")
    with pytest.raises(CaptureError, match="index"):
        CaptureReader(tmp_path / "short")
    assert call_compact(GOLDEN, tmp_path / "cut") == 0
    data = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-100])
    with pytest.raises(CaptureError, match="cut or damaged at its end"):
        CaptureReader(tmp_path / "cut")


def test_places(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert call("compact", GOLDEN, GOLDENS[0], "-d", "out")[0] == 0
    names = {f"{path.stem}.parquet" for path in (GOLDEN, GOLDENS[0])}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o600}
    for arguments, status, said in (
        ([GOLDEN, "-d", "out"], 1, "pass --force"),
        ([GOLDEN, GOLDEN, "-d", "out"], 2, "one name"),
        ([GOLDEN, GOLDENS[0], "-o", "x"], 2, "--directory"),
        ([GOLDEN, "-o", "x", "-d", "out"], 2, "exclude each other"),
        (["/dev/null", "-o", "x"], 1, "not a regular file"),
        ([GOLDEN, "-d", "nowhere"], 1, "can't write"),
    ):
        got, _, err = call("compact", *arguments)
        assert (got, err.count("\n")) == (status, 1), err
        assert said in err
    (tmp_path / "empty").touch()
    assert "is empty" in call("compact", "empty", "-o", "x")[2]
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_nothing(call: Call, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        status, _, err = call("compact", GOLDEN, "-o", tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, err.count("\n")) == (1, 1)
    assert "ulimit" in err
    assert not list(tmp_path.iterdir())
