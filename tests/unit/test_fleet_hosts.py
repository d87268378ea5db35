# SPDX-License-Identifier: MIT
"""Which files are of which host, what is counted once, and what a host's result says."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvmprobe.analysis.run import analyze
from kvmprobe.cli.compact import compact
from kvmprobe.errors import KvmprobeError, UsageError
from kvmprobe.fleet import scenario
from kvmprobe.fleet.host import analyze_host
from kvmprobe.fleet.hosts import hosts_of
from kvmprobe.fleet.places import list_files
from kvmprobe.fleet.survey import Surveyed, survey
from kvmprobe.formats.export_parquet import ParquetWriter
from kvmprobe.probes.schema import EVENT, columns
from kvmprobe.store import format as fmt
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter

GOLDEN = Path(__file__).parents[1] / "data/golden"
FAULT = GOLDEN / "lab-6.1-intel.kvmprobe"
SECOND = 10**9


def header(machine: str | None = "m1", boot: int = 1) -> dict[str, Any]:
    """A recording's header; `boot` makes another recording."""
    made = fmt.new_header("live")
    made["host"] |= {"machine": machine, "kernel": f"6.1.{boot}", "parameters": {}}
    made["clock"] = {"monotonic_ns": 0, "wall_ns": boot * 1000 * SECOND}
    made["started"] = f"2026-01-0{boot}T00:00:00Z"
    with CaptureReader(FAULT) as reader:
        made["plan"] = reader.header["plan"]
    return made


def days(hits: int = 2) -> list[NDArray[Any]]:
    """A VM's rows on two days: its cache is filled on the first, and believed on the second."""
    first = scenario.seen() + scenario.filled() + scenario.armed()
    second = [row for _ in range(hits) for row in scenario.hit(write=False)]
    made = [scenario.rows(first, 1, 0, SECOND + np.arange(len(first), dtype="u8"))]
    seq = int(made[0]["seq"].max()) + 1
    times = 2 * SECOND + np.arange(len(second), dtype="u8")
    return [*made, scenario.rows(second, 1, seq, times)]


def write(path: Path, rows: NDArray[Any], head: dict[str, Any] | None = None) -> Path:
    """Write rows as a recording or as Parquet, by the path's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".kvmprobe":
        with CaptureWriter(path, head or header()) as capture:
            capture.write(rows)
    else:
        with path.open("wb") as file:
            writer = ParquetWriter(file, head or header())
            writer.write(columns(rows))
            writer.close()
    return path


def surveyed(*places: Path) -> list[Surveyed]:
    return survey([file for place in places for file in list_files(str(place))])


def results(*places: Path) -> dict[str, dict[str, Any]]:
    """The results of all hosts below some folders, by name."""
    return {host.name: analyze_host(host) | {"host": host} for host in hosts_of(surveyed(*places))}


def found(result: dict[str, Any]) -> dict[str, int]:
    return {f["rule"]: f["count"] for f in result["findings"]}


@pytest.mark.parametrize("suffix", ["parquet", "kvmprobe"])
def test_state_carries_over_the_files_of_a_recording(tmp_path: Path, suffix: str) -> None:
    first, second = days()
    # The names are not in the order of the days.
    write(tmp_path / f"in/web/b.{suffix}", first)
    write(tmp_path / f"in/web/a.{suffix}", second)
    whole = write(tmp_path / "whole.kvmprobe", np.concatenate([first, second]))
    (result,) = results(tmp_path / "in").values()
    with CaptureReader(whole) as reader:
        analysis = analyze([reader])
    assert found(result) == {f.rule.id: f.count for _, f in analysis.findings}
    assert {v["fault"]: v["verdict"] for v in result["verdicts"]} == {
        fault: v.verdict for fault, v in analysis.verdicts.items()
    }
    assert (result["events"], result["recordings"]) == (analysis.events, 1)
    (hit,) = [f for f in result["findings"] if f["rule"] == "internal-slot-hit"]
    assert (hit["cause"], hit["count"]) == ("internal-slot-fill", 2)
    assert hit["file"].endswith(f"a.{suffix}")
    assert result["problems"] == result["notes"] == []
    assert (result["first_ns"], hit["first_ns"]) == (1001 * SECOND, 1002 * SECOND + 1)


def test_copies_are_counted_once(tmp_path: Path) -> None:
    first, second = days()
    write(tmp_path / "in/web/1.kvmprobe", first)
    write(tmp_path / "in/web/2.kvmprobe", second)
    compact([tmp_path / "in/web/1.kvmprobe"], directory=tmp_path / "in/web")
    shutil.copy(tmp_path / "in/web/2.kvmprobe", tmp_path / "in/web/again.kvmprobe")
    write(tmp_path / "in/web/part.parquet", second[:4])
    (result,) = results(tmp_path / "in").values()
    assert result["events"] == len(first) + len(second)
    assert found(result)["internal-slot-hit"] == 2
    assert result["problems"] == []
    assert len(result["notes"]) == 3
    assert [n for n in result["notes"] if "part.parquet is a copy of a part of" in n]
    assert result["verdict"] == "vulnerable"


def test_one_machine_under_two_names_is_one_host(tmp_path: Path) -> None:
    first, second = days()
    write(tmp_path / "in/web/1.parquet", first)
    write(tmp_path / "in/web-old/1.parquet", first)
    write(tmp_path / "in/web-old/2.parquet", second)
    (result,) = results(tmp_path / "in").values()
    assert result["host"].notes == ("one machine has files under 2 names: web, web-old",)
    assert found(result)["internal-slot-hit"] == 2
    assert result["events"] == len(first) + len(second)


def test_two_machines_of_one_name_are_two_hosts(tmp_path: Path) -> None:
    first, second = days()
    write(tmp_path / "a/web/1.parquet", first)
    write(tmp_path / "b/web/1.parquet", second, header("m2"))
    made = results(tmp_path / "a", tmp_path / "b")
    assert sorted(made) == ["web (m1)", "web (m2)"]
    for result in made.values():
        assert result["host"].notes == (
            "2 machines are called web: they are told apart by their id",
        )
    assert len({result["id"] for result in made.values()}) == 2


def test_files_without_a_machine_go_by_their_folder(tmp_path: Path) -> None:
    first, second = days()
    for place in ("a", "b"):
        head = header(None, boot=1 if place == "a" else 2)
        write(tmp_path / place / "web/1.parquet", first if place == "a" else second, head)
    (result,) = results(tmp_path / "a", tmp_path / "b").values()
    assert "2 places" in result["host"].notes[0]
    assert (result["machine"], result["recordings"]) == (None, 2)


def test_recordings_number_their_vms_anew(tmp_path: Path) -> None:
    """What one recording's VM 1 did says nothing of another's: the hit has no cause there."""
    first, second = days()
    write(tmp_path / "in/web/1.parquet", first)
    write(tmp_path / "in/web/2.parquet", second, header(boot=2))
    (result,) = results(tmp_path / "in").values()
    (hit,) = [f for f in result["findings"] if f["rule"] == "internal-slot-hit"]
    assert (hit["cause"], hit["kernel"], result["recordings"]) == (None, "6.1.2", 2)
    assert result["kernels"] == ["6.1.1", "6.1.2"]


def test_damage_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    calm = scenario.rows(scenario.seen(), 1, 0, SECOND + np.arange(6, dtype="u8"))
    good = write(tmp_path / "in/web/1.parquet", calm)
    bad = write(tmp_path / "in/web/2.parquet", calm, header(boot=2))
    bad.write_bytes(bad.read_bytes()[:-100])
    (tmp_path / "in/web/3.kvmprobe").write_bytes(b"")
    (tmp_path / "in/web/.kvmprobe-1.parquet").write_bytes(b"not whole yet")
    (result,) = results(tmp_path / "in").values()
    assert result["verdict"] == "inconclusive"
    assert len(result["problems"]) == 2
    assert [p for p in result["problems"] if str(bad) in p]
    assert result["events"] == len(calm)
    assert result["recordings"] == 1
    # Proof outranks what can't be read.
    write(good, np.concatenate(days()))
    (result,) = results(tmp_path / "in").values()
    assert result["verdict"] == "vulnerable"
    verdicts = {v["fault"]: v for v in result["verdicts"]}
    assert verdicts["spte-overwrite"]["verdict"] == "inconclusive"
    assert "refused: 2 file(s)" in verdicts["spte-overwrite"]["missing"]


def test_a_file_that_changes_between_two_looks_is_not_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "in/web/1.parquet", days()[0])
    (host,) = hosts_of(surveyed(tmp_path / "in"))
    write(path, days()[0], header(boot=2))
    result = analyze_host(host)
    assert "it changed while it was read" in result["problems"][0]
    assert (result["verdict"], result["events"]) == ("inconclusive", 0)


def test_schema_versions_are_told(tmp_path: Path) -> None:
    write(tmp_path / "in/web/1.parquet", days()[0], header(None))
    shutil.copy(GOLDEN / "schema-1.0.kvmprobe", tmp_path / "in/web")
    (host,) = hosts_of(surveyed(tmp_path / "in"))
    assert host.notes == ("files of 2 schema versions: 1.0, 1.1",)


def test_newer_versions_are_named(tmp_path: Path) -> None:
    head = header()
    head["schema"] = {"major": 2, "minor": 0}
    write(tmp_path / "in/web/1.parquet", np.zeros(1, EVENT), head)
    (result,) = results(tmp_path / "in").values()
    assert "written by a newer kvmprobe (schema 2.0)" in result["problems"][0]


def names(files: Sequence[Any]) -> list[tuple[str, str]]:
    return [(file.host, file.url.rpartition("/")[2]) for file in files]


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = days()[0]
    for name in ("web/2026-01-01.parquet", "web/deep/er.parquet", "x::file/1.parquet", "0.parquet"):
        write(tmp_path / "in" / name, rows)
    (tmp_path / "in/truth.json").write_text("{}")
    wanted = [
        ("in", "0.parquet"), ("web", "2026-01-01.parquet"), ("web", "er.parquet"),
        ("x::file", "1.parquet"),
    ]  # fmt: skip
    assert names(list_files(str(tmp_path / "in"))) == wanted
    assert names(list_files(f"file://{tmp_path}/in/")) == wanted
    monkeypatch.chdir(tmp_path / "in")
    assert names(list_files(".")) == wanted
    assert names(list_files("web")) == [("web", "2026-01-01.parquet"), ("deep", "er.parquet")]
    assert names(list_files("web/2026-01-01.parquet")) == [("web", "2026-01-01.parquet")]
    # A name of a folder is never another file system.
    assert [s.facts.problem for s in surveyed(tmp_path / "in")] == [None] * 4


@pytest.mark.parametrize(
    ("place", "says", "kind"),
    [
        ("/nowhere/at/all", "can't list /nowhere/at/all: there is no such folder", KvmprobeError),
        ("nothing://at/all", "can't open nothing://at/all: Protocol not known", UsageError),
        ("empty", "has no capture: nothing ends in .kvmprobe or .parquet", KvmprobeError),
    ],
)
def test_bad_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, says: str, kind: type[Exception]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(kind, match=says):
        list_files(place)
