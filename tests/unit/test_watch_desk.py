# SPDX-License-Identifier: MIT
"""What the desk makes of real captures: latched findings, log, journal, evidence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvmprobe.analysis.run import analyze
from kvmprobe.cli.main import main
from kvmprobe.probes import schema
from kvmprobe.probes.schema import EVENT, LossCause, Type
from kvmprobe.store.reader import CaptureReader
from kvmprobe.watch.config import Config, Evidence, Ignore, Loss, today
from kvmprobe.watch.desk import Desk
from kvmprobe.watch.evidence import RECENT_EVENTS, Recent, gather
from kvmprobe.watch.latch import MAX_LATCHED, Latches, VmKey, latch_id
from kvmprobe.watch.output import Journal
from kvmprobe.watch.status import boot_id

GOLDEN = Path(__file__).parents[1] / "data/golden"
FAULTY = GOLDEN / "lab-6.1-intel.kvmprobe"
NOTHING = np.zeros(0, EVENT)
HOSTILE = b'\x1b]0;"\\,\n{}'


def capture(path: Path) -> tuple[dict[str, Any], NDArray[Any]]:
    with CaptureReader(path) as reader:
        return reader.header, np.concatenate([schema.rows(batch) for batch in reader.batches()])


class Watched:
    """A desk with its own directory, fed with a capture."""

    def __init__(self, directory: Path, boot: str = "boot", **config: Any) -> None:  # noqa: ANN401
        self.directory = directory
        self.config = Config(state_directory=directory, **config)
        self.desk = Desk(self.config, boot, Journal(native=False))

    def feed(self, path: Path = FAULTY, change: Callable[[Any], None] = lambda rows: None) -> None:
        header, rows = capture(path)
        change(rows)
        self.desk.begin(header)
        self.desk.feed(rows)

    def look(self, now: float = 0.0) -> None:
        """Look, and wait until all is written that follows from it."""
        self.desk.look(now, lambda: NOTHING)
        self.wait()
        self.desk.look(now, lambda: NOTHING)
        self.wait()

    def wait(self) -> None:
        done = threading.Event()
        assert self.desk.keeper.do("test", done.set)
        assert done.wait(20)

    def log(self) -> list[dict[str, Any]]:
        path = self.directory / "findings.ndjson"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


Make = Callable[..., Watched]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Watched] = []

    def new(**config: Any) -> Watched:  # noqa: ANN401
        made.append(Watched(tmp_path, **config))
        return made[-1]

    yield new
    for each in made:
        each.desk.keeper.close(20)


def test_one_finding_a_fault_and_vm_with_its_evidence(
    make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    watched = make()
    watched.feed()
    watched.look()
    (latched,) = watched.desk.latched()
    assert (latched.fault, latched.severity) == ("internal-slot", "critical")
    assert latched.rules == {
        "internal-slot-fill": 1,
        "internal-slot-armed": 1,
        "internal-slot-hit": 2,
    }
    assert (latched.count, latched.vm, latched.pid) == (4, "python3", 146)
    assert watched.desk.found == latched.rules
    assert [line["what"] for line in watched.log()] == ["found", "evidence"]
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"kvmprobe: critical finding {latched.id}: internal-slot-hit: ")
    assert latched.capture is not None
    with CaptureReader(latched.capture) as reader:
        shown = analyze([reader])
    assert {f.rule.id: f.count for _, f in shown.findings} == latched.rules
    assert shown.verdict == "vulnerable"
    assert shown.captures[0].names.get(1).name == "python3"


def test_a_fixed_kernel_has_no_finding(make: Make) -> None:
    watched = make()
    watched.feed(GOLDEN / "lab-6.12-intel.kvmprobe")
    watched.look()
    assert list(watched.desk.latched()) == []
    assert watched.log() == []
    assert not (watched.directory / "evidence").exists()


def test_findings_outlive_the_process_but_not_the_boot(make: Make) -> None:
    first = make()
    first.feed()
    first.look()
    again = make()
    assert list(again.desk.latched()) == list(first.desk.latched())
    again.look()
    assert [line["what"] for line in again.log()] == ["found", "evidence"]
    again.feed()
    again.look(now=1000.0)
    (latched,) = again.desk.latched()
    assert latched.count == 8
    assert again.log()[-1]["what"] == "again"
    assert list(make(boot="another").desk.latched()) == []


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema": "kvmprobe.latched/1"}', "\xff", "[" * 9999]
)
def test_damaged_findings_are_told_and_forgotten(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "latched.json").write_text(text)
    assert list(make().desk.latched()) == []
    assert "is damaged" in capfd.readouterr().err


def test_an_acknowledged_finding_is_gone_until_it_comes_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = make(boot=boot_id())
    watched.feed()
    watched.look()
    (latched,) = watched.desk.latched()
    listing = ack(monkeypatch, capsys, watched.directory)
    assert latched.id in listing[1]
    assert "critical" in listing[1]
    assert "internal-slot-hit" in listing[1]
    command = [sys.executable, "-m", "kvmprobe", "ack", latched.id, "--reason", "it is\nsettled"]
    run = subprocess.Popen(
        [*command, "--state-directory", str(watched.directory)],
        cwd=GOLDEN.parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    while run.poll() is None:
        watched.look()
    assert run.stdout is not None
    assert run.stdout.read() == f"{latched.id}: acknowledged\n"
    assert run.returncode == 0
    assert list(watched.desk.latched()) == []
    line = watched.log()[-1]
    assert (line["what"], line["id"], line["reason"]) == (
        "acknowledged",
        latched.id,
        "it is\nsettled",
    )
    assert list(watched.directory.glob("ack-*")) == []
    assert "no finding" in ack(monkeypatch, capsys, watched.directory)[1]
    watched.feed()
    watched.look()
    (again,) = watched.desk.latched()
    assert (again.id, again.count) == (latched.id, 4)


def ack(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    directory: Path,
    *arguments: str,
) -> tuple[int, str, str]:
    capsys.readouterr()
    argv = ["kvmprobe", "ack", "--state-directory", str(directory), *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["0123456789", "--reason", "x"], 2, "no finding has the id 0123456789"),
        (["0123456789"], 2, "say --reason"),
        (["0123456789", "--reason", " "], 2, "say --reason"),
        (["../../etc", "--reason", "x"], 2, "'../../etc' is no id"),
        (["--reason", "x"], 2, "--reason needs the ID"),
    ],
    ids=str,
)
def test_acks_that_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    status: int,
    says: str,
) -> None:
    got, out, err = ack(monkeypatch, capsys, tmp_path, *arguments)
    assert (got, out) == (status, "")
    assert says in err
    assert err.count("\n") == 1
    got, _, err = ack(monkeypatch, capsys, tmp_path / "none")
    assert got == 1
    assert "no kvmprobe watch has run" in err


def test_files_that_are_no_acknowledgements_are_removed(make: Make, tmp_path: Path) -> None:
    (tmp_path / "ack-x.json").write_text("{}")
    make().look()
    assert list(tmp_path.glob("ack-*")) == []


def test_an_ignored_finding_raises_its_alarm_when_the_entry_expires(
    make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    rules = ["internal-slot-fill", "internal-slot-armed", "internal-slot-hit"]
    tomorrow = today() + timedelta(days=1)
    ignores = tuple(Ignore(rule=r, vm="python3", reason="known", expires=tomorrow) for r in rules)
    watched = make(ignore=ignores)
    watched.feed()
    watched.look()
    (latched,) = watched.desk.latched()
    assert latched.ignored == "known"
    assert capfd.readouterr().err.rstrip().endswith("; ignored: known")
    # One of its rules alone is not covered any more.
    watched.desk.configure(watched.config.model_copy(update={"ignore": ignores[:2]}))
    watched.look()
    (latched,) = watched.desk.latched()
    assert latched.ignored is None
    assert "ignored" not in capfd.readouterr().err
    assert [line["what"] for line in watched.log()] == ["found", "evidence", "changed"]


def test_names_that_guests_choose_stay_in_their_place(
    make: Make, capfd: pytest.CaptureFixture[str]
) -> None:
    def rename(rows: NDArray[Any]) -> None:
        rows["value"][rows["type"] == Type.LIFECYCLE] = int.from_bytes(HOSTILE[:8], "little")
        rows["gen"][rows["type"] == Type.LIFECYCLE] = int.from_bytes(HOSTILE[8:], "little")

    watched = make()
    watched.feed(change=rename)
    watched.look()
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()
    (latched,) = watched.desk.latched()
    assert latched.vm is not None
    assert latched.vm.isprintable()
    assert {line["vm"] for line in watched.log()} == {latched.vm}
    written = [*watched.directory.rglob("*")]
    assert all(path.name.replace(".", "").replace("-", "").isalnum() for path in written)


def test_a_loss_degrades_the_verdict_for_a_while(make: Make) -> None:
    watched = make(loss=Loss(degrades=60))
    header, rows = capture(GOLDEN / "lab-6.12-intel.kvmprobe")
    loss = np.zeros(1, EVENT)
    loss["type"], loss["kind"], loss["len"] = Type.LOSS, Type.FILL, LossCause.RING
    loss["addr"], loss["vcpu"], loss["slot"] = 7, schema.NO_VCPU, -1
    desk = watched.desk
    desk.begin(header)
    desk.feed(np.concatenate([rows, loss]))
    assert desk.lost == {"FILL": 7}

    def verdict() -> str:
        assert desk.judge is not None
        return desk.judge.report().verdicts["internal-slot"].verdict

    watched.look(now=1000.0)
    assert verdict() == "inconclusive"
    watched.look(now=1059.0)
    assert verdict() == "inconclusive"
    watched.look(now=1060.0)
    assert verdict() == "fixed"
    assert desk.lost == {"FILL": 7}


def test_vms_without_end_keep_the_memory_bounded(make: Make) -> None:
    watched = make()
    header, rows = capture(FAULTY)
    desk = watched.desk
    desk.begin(header)
    for number in range(1, 40):
        rows["vm"][rows["vm"] > 0] = number
        desk.feed(rows)
    assert desk.vms_seen == 39
    # The processes of the capture are not of this host, so they are seen to be gone.
    desk.look(1e6, lambda: NOTHING)
    assert desk.vms == {}
    assert desk.found["internal-slot-hit"] == 78


def test_latched_findings_are_bounded(tmp_path: Path) -> None:
    latches = Latches(tmp_path, "boot")
    for pid in range(MAX_LATCHED + 5):
        latches.add("internal-slot-hit", 2, VmKey(pid, 1), None, "1", "2")
    assert len(latches.kept) == MAX_LATCHED
    assert latches.left_out == 10
    latches.path.write_bytes(latches.data())
    again = Latches(tmp_path, "boot")
    assert (again.kept, again.left_out) == (latches.kept, 10)


def test_an_id_is_of_boot_fault_and_process() -> None:
    vm = VmKey(1, 2)
    ids = {
        latch_id("a", "x", vm),
        latch_id("b", "x", vm),
        latch_id("a", "y", vm),
        latch_id("a", "x", VmKey(2, 2)),
        latch_id("a", "x", VmKey(1, 3)),
    }
    assert len(ids) == 5
    assert latch_id("a", "x", vm) in ids


def test_evidence_makes_room_only_by_what_was_acknowledged(make: Make) -> None:
    watched = make(evidence=Evidence(files=1))
    watched.feed()
    watched.look()

    def other(rows: NDArray[Any]) -> None:
        rows["aux"][(rows["type"] == Type.LIFECYCLE) & (rows["vcpu"] == schema.NO_VCPU)] = 4711

    watched.feed(change=other)
    watched.look()
    first, second = watched.desk.latched()
    assert (first.pid, second.pid) == (146, 4711)
    assert first.capture is not None
    assert second.capture is None
    watched.desk.latches.drop(first.id)
    watched.feed(change=other)
    watched.look()
    (second,) = watched.desk.latched()
    assert second.capture is not None
    assert [p.stem for p in (watched.directory / "evidence").iterdir()] == [second.id]


def test_the_last_events_of_a_vm_are_kept_in_order() -> None:
    recent = Recent()
    rows = np.zeros(RECENT_EVENTS + 1000, EVENT)
    rows["ts"] = np.arange(len(rows))
    rows["vm"] = rows["ts"] % 2
    for part in np.array_split(rows, 7):
        recent.add(part)
    kept = rows[1000:]
    assert (recent.of(1) == kept[kept["vm"] == 1]).all()
    recent.add(rows)
    assert (recent.of(0) == kept[kept["vm"] == 0]).all()


def test_gathered_events_are_each_there_once() -> None:
    _, rows = capture(FAULTY)
    own = rows[rows["vm"] == 1]
    gathered = gather(own[30:], own[:50], own)
    assert len(gathered) == len(own)
    assert (
        gathered["seq"][gathered["vcpu"] == 0] == np.arange(1, 1 + np.sum(own["vcpu"] == 0))
    ).all()
    assert (np.diff(gathered["ts"].astype(np.int64)) >= 0).all()


def test_a_full_disk_is_told_once_and_overcome(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        (disk / "filler").write_bytes(bytes(64 << 10))
        watched = Watched(disk)
        watched.feed()
        watched.look()
        watched.look()
        assert {"state", "log", "evidence"} <= set(watched.desk.keeper.errors)
        assert watched.log() == []
        said = capfd.readouterr().err
        assert said.count("can't write the state: No space left on device") == 1
        assert said.count("finding") == 1
        (disk / "filler").unlink()
        watched.look()
        (latched,) = Latches(disk, "boot").kept.values()
        assert latched.count == 4
        watched.desk.keeper.close(20)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
