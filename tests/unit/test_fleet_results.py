# SPDX-License-Identifier: MIT
"""What is kept of a fleet's analysis, what its summary says, and how long it still takes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.cli.fleet import analyze as analyze_command
from kvmprobe.errors import CaptureError, KvmprobeError, UsageError
from kvmprobe.fleet.host import Host, analyze_host, empty_result
from kvmprobe.fleet.hosts import hosts_of
from kvmprobe.fleet.page import render as render_page
from kvmprobe.fleet.places import File, list_files
from kvmprobe.fleet.progress import Estimate, spoken
from kvmprobe.fleet.results import Results, read_summary
from kvmprobe.fleet.simulate import Fleet, simulate_host
from kvmprobe.fleet.survey import Facts, Surveyed, survey
from kvmprobe.fleet.tables import COLUMNS
from kvmprobe.fleet.text import render
from tests.fleet_truth import differences, rows


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small fleet with the truth about it, made without processes."""
    folder = tmp_path_factory.mktemp("fleet")
    wanted = Fleet(hosts=12, days=2, events=12_000, vulnerable=0.5, hit=0.3, lossy=0.1)
    truth = [simulate_host(wanted, folder, number) for number in range(12)]
    (folder / "truth.json").write_text(json.dumps({"hosts": truth}))
    return folder


@pytest.fixture(scope="module")
def hosts(fleet: Path) -> list[Host]:
    return hosts_of(survey(list_files(str(fleet))))


@pytest.fixture(scope="module")
def result(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result") / "of"
    with Results(folder) as results:
        for host in hosts:
            results.keep(analyze_host(host))
        results.finish(hosts, {})
    return folder


def test_found_is_truth(fleet: Path, result: Path) -> None:
    assert differences(fleet, result) == []
    kinds = {h["kind"] for h in json.loads((fleet / "truth.json").read_text())["hosts"]}
    assert kinds == {"hit", "filled", "lossy", "fixed", "calm"}


def test_truth_is_compared(fleet: Path, result: Path, tmp_path: Path) -> None:
    """The comparison itself sees what is missing, too much or different."""
    truth = json.loads((fleet / "truth.json").read_text())
    hit = next(host for host in truth["hosts"] if host["kind"] == "hit")
    hit["findings"][0]["count"] += 1
    truth["hosts"][-1]["host"] = "another"
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert len(differences(tmp_path, result)) == 3


def test_tables(result: Path) -> None:
    for name, columns in COLUMNS.items():
        assert pq.read_schema(result / f"{name}.parquet").names == list(columns)
        assert (result / f"{name}.parquet").stat().st_mode & 0o777 == 0o600
    ids = {host["id"] for host in rows(result, "hosts")}
    for name in ("verdicts", "findings", "losses"):
        assert {row["id"] for row in rows(result, name)} <= ids


def test_summary(fleet: Path, result: Path) -> None:
    summary = read_summary(result)
    truth = json.loads((fleet / "truth.json").read_text())["hosts"]
    found = [f for host in truth for f in host["findings"]]
    assert summary["hosts"] == summary["done"] == 12
    assert summary["verdicts"]["vulnerable"] == 6
    assert summary["events"] == sum(host["events"] for host in truth)
    assert summary["began"]["ns"] == min(f["first_ns"] for f in found)
    assert sum(summary["hosts_began_by_day"].values()) == 6
    unfixed = [k for k in summary["kernels"] if k["hosts_with_findings"]]
    assert {k["kernel"] for k in unfixed} == {f["kernel"] for f in found}
    assert summary["rules"]["internal-slot-hit"]["hosts"] == 4
    text = render(summary)
    assert text.startswith("12 hosts, ")
    assert "It began 2026-01-0" in text
    assert max(map(len, text.splitlines())) <= 100


def test_what_is_done_is_not_done_again(hosts: list[Host], result: Path, tmp_path: Path) -> None:
    host = hosts[0]
    with Results(tmp_path / "r") as results:
        assert results.done(host) is None
        made = analyze_host(host)
        results.keep(made)
        assert results.done(host) == json.loads(json.dumps(made))
        first = host.files[0]
        for changed in (
            replace(first, file=replace(first.file, size=1)),
            replace(first, file=replace(first.file, version="later")),
            replace(first, facts=replace(first.facts, kernel="another")),
        ):
            assert results.done(replace(host, files=(changed, *host.files[1:]))) is None
        assert results.done(replace(host, files=host.files[1:])) is None
        path = tmp_path / "r/hosts" / f"{host.id}.json"
        path.write_text(path.read_text()[:-10])
        assert results.done(host) is None
        path.write_text(json.dumps(made | {"version": "0.0"}))
        assert results.done(host) is None
        assert list(results.all()) == []


def test_a_host_that_failed_is_inconclusive(hosts: list[Host], tmp_path: Path) -> None:
    with Results(tmp_path / "r") as results:
        summary = results.finish(hosts[:2], {hosts[0].id: "the analysis failed: MemoryError"})
    assert summary["verdicts"]["inconclusive"] == 2
    assert (summary["done"], summary["with_problems"]) == (0, 2)
    problems = {row["id"]: row["problems"] for row in rows(tmp_path / "r", "hosts")}
    assert problems[hosts[0].id] == ["the analysis failed: MemoryError"]
    assert problems[hosts[1].id] == ["it was not analysed"]


def test_a_folder_that_is_no_result_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(KvmprobeError, match="is no result of kvmprobe fleet"):
        Results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        Results(tmp_path / "r"),
        pytest.raises(KvmprobeError, match="another kvmprobe fleet writes to"),
    ):
        Results(tmp_path / "r")
    with Results(tmp_path / "r"):
        pass


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KvmprobeError, match="can't use the folder"):
        Results(tmp_path / "file/below")


def test_tables_are_whole_or_as_before(
    hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r"
    with Results(folder) as results:
        results.finish(hosts[:1], {})
        before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
        results.keep(analyze_host(hosts[0]) | {"events": "no number"})
        with pytest.raises(Exception, match="no number"):
            results.finish(hosts[:1], {})
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"we\xffb\n\x1b[31m")
    facts = Facts(machine="m", recording="r")
    file = File(f"/x/{name}/1.parquet", name, 5, "1")
    (host,) = hosts_of([Surveyed(file, facts)])
    with Results(tmp_path / "r") as results:
        results.keep(empty_result(host) | {"done": True})
        assert results.done(host) is not None
        results.finish([host], {})
    (row,) = rows(tmp_path / "r", "hosts")
    assert row["host"] == "we\\udcffb\n\x1b[31m"
    text = render(read_summary(tmp_path / "r"))
    page = "".join(render_page(tmp_path / "r"))
    assert "\x1b" not in text + page


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no finished result"),
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ('{"schema": "kvmprobe.fleet/9"}', "was made by another kvmprobe"),
    ],
)
def test_a_result_that_is_none(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "fleet.json").write_text(content)
    with pytest.raises(CaptureError, match=says):
        read_summary(tmp_path)


def test_a_result_without_its_tables(result: Path, tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_bytes((result / "fleet.json").read_bytes())
    with pytest.raises(CaptureError, match=r"hosts\.parquet can't be read"):
        render_page(tmp_path)


def test_workers_are_of_this_machine(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a scheduler has its own"):
        analyze_command([str(tmp_path)], tmp_path / "r", scheduler="tcp://x:1", workers=2)


@given(sizes=st.lists(st.integers(1, 1000), min_size=4, max_size=50), pace=st.floats(0.1, 100))
def test_at_an_even_pace_the_estimate_is_right(sizes: list[int], pace: float) -> None:
    estimate = Estimate(sum(sizes), len(sizes), 0.0)
    now = 0.0
    for done, size in enumerate(sizes, 1):
        now += size / pace
        estimate.add(size, now)
        left = estimate.left(now)
        if left is None:
            assert done < 3 or estimate.done < 0.02 * estimate.total
        else:
            assert left == pytest.approx(((estimate.total - estimate.done) / pace,) * 2)


def test_an_estimate_tells_what_it_does_not_know() -> None:
    estimate = Estimate(1000, 100, 0.0)
    assert "time left not known yet" in estimate.text(5.0)
    for second in range(1, 11):
        estimate.add(10, float(second))
    assert estimate.text(10.0).endswith("10 of 100 hosts, 10% of the bytes, about 90 s left")
    for second in range(1, 11):  # ten times slower, for longer than a minute
        estimate.add(10, 10.0 + 10 * second)
    assert estimate.text(110.0).endswith("about 7 min to 13 min left")


@pytest.mark.parametrize(
    ("seconds", "says"), [(0, "5 s"), (42, "40 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_a_time_is_said_coarsely(seconds: float, says: str) -> None:
    assert spoken(seconds) == says


def test_json_gives_back_what_was_surveyed(hosts: list[Host]) -> None:
    for each in hosts[0].files:
        said: dict[str, Any] = json.loads(json.dumps(each.to_json()))
        assert Surveyed.from_json(said) == each
