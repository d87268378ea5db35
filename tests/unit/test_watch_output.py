# SPDX-License-Identifier: MIT
"""The log, the journal, the service manager and the metrics: what goes out, and what may not."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from shutil import which

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmprobe.analysis.rules import FAULTS, RULES
from kvmprobe.capture.descriptors import NEEDED
from kvmprobe.capture.plan import Row
from kvmprobe.errors import HostError
from kvmprobe.watch import status as statuses
from kvmprobe.watch.config import Config
from kvmprobe.watch.host import ended, kvm_modules
from kvmprobe.watch.metrics import MetricsServer, Numbers
from kvmprobe.watch.output import WARNING, Journal, Log, Notify, entry, wall
from kvmprobe.watch.snapshot import fault_verdicts
from kvmprobe.watch.status import Latched, Status, WatchedVm

PACKAGING = Path(__file__).parents[2] / "packaging"
HOSTILE = 'a"b}\n# TYPE x counter\nkvmprobe_attached 0\x1b[2J\u202e'


def lines(path: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_is_rotated_and_bounded(tmp_path: Path) -> None:
    log = Log(tmp_path, 4, 3)
    for n in range(200):
        log.write({"n": n, "x": 100 * "x"})
    paths = [log.path, *(tmp_path / f"findings.ndjson.{n}" for n in (1, 2))]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert all(path.stat().st_size <= 4096 for path in paths)
    kept = [line["n"] for path in reversed(paths) for line in lines(path)]
    assert kept == list(range(kept[0], 200))
    log.configure(4, 1)
    for n in range(40):
        log.write({"n": n, "x": 100 * "x"})
    assert list(tmp_path.iterdir()) == [log.path]


def test_the_log_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "findings.ndjson").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        Log(tmp_path, 4, 3).write({})
    assert not (tmp_path / "other").exists()


def test_the_log_may_be_taken_away(tmp_path: Path) -> None:
    log = Log(tmp_path, 4, 3)
    log.write({"n": 1})
    log.path.rename(tmp_path / "elsewhere")
    log.write({"n": 2})
    assert lines(log.path) == [{"n": 2}]


def test_the_journal_gets_fields(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(str(tmp_path / "socket"))
        journal = Journal(tmp_path / "socket", native=True)
        journal.say(WARNING, f"found {HOSTILE}", vm=HOSTILE, capture=None, count=3)
        journal.close()
        told = journald.recv(4096).decode().splitlines()
    assert [line.partition("=")[0] for line in told] == [
        "MESSAGE",
        "PRIORITY",
        "SYSLOG_IDENTIFIER",
        "KVMPROBE_VM",
        "KVMPROBE_COUNT",
    ]
    assert told[1] == "PRIORITY=4"
    assert all(line.isprintable() for line in told)


@settings(max_examples=50)
@given(st.text(), st.text())
def test_no_text_makes_another_field_of_the_journal(message: str, name: str) -> None:
    data = entry(6, message, {"vm": name})
    # The message itself is made printable by `say`.
    assert data.count(b"\nKVMPROBE_VM=") == 1
    assert data.partition(b"KVMPROBE_VM=")[2].count(b"\n") == 1


def test_without_a_journal_stderr_gets_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for native in (True, False):
        Journal(tmp_path / "none", native=native).say(WARNING, HOSTILE)
        said = capfd.readouterr().err
        assert said.startswith("kvmprobe: a")
        assert said.count("\n") == 1
        assert "\x1b" not in said


def test_a_journal_that_does_not_read_holds_nothing_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(str(tmp_path / "socket"))
        journal = Journal(tmp_path / "socket", native=True)
        for _ in range(2000):
            journal.say(WARNING, 100 * "x")
        journal.close()
        assert journald.recv(4096).startswith(b"MESSAGE=")


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    address = f"@kvmprobe-test-{os.getpid()}" if abstract else str(tmp_path / "not@ify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(re.sub("^@", "\0", address))
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setenv("WATCHDOG_USEC", "3000000")
        notify = Notify()
        notify.send("READY=1", "STATUS=fine")
        assert manager.recv(4096) == b"READY=1\nSTATUS=fine"
        notify.alive()
        notify.alive()
        assert manager.recv(4096) == b"WATCHDOG=1"
        with notify.busy(120):
            assert manager.recv(4096) == b"WATCHDOG_USEC=120000000"
        assert manager.recv(4096) == b"WATCHDOG_USEC=3000000"
        notify.reloading()
        assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", manager.recv(4096))
    notify.send("STOPPING=1")


def test_the_watchdog_is_another_processs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    notify = Notify()
    notify.alive()
    assert notify._every is None


@pytest.mark.parametrize("step", [-(10**18), 0, 10**17])
def test_a_clock_that_is_stepped_changes_only_what_is_told(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    status = numbers().status
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + step)
    told = datetime.fromisoformat(wall(time.monotonic_ns() - 10**9)).timestamp()
    assert told == pytest.approx((now + step) / 1e9 - 1, abs=30)
    assert 0 <= status.age() < 60
    monkeypatch.setattr(time, "time_ns", lambda: -(10**19))
    assert wall() == "1970-01-01T00:00:00.000Z"


def numbers(**changes: object) -> Numbers:
    vm = WatchedVm(1, HOSTILE, 2, "inconclusive", {}, {})
    latched = Latched(
        "id", FAULTS[0], "critical", {RULES[0].id: 1}, HOSTILE, 2, 1, "", "", None, None
    )
    status = Status(
        schema=statuses.SCHEMA,
        version="0.1.0",
        boot_id=statuses.boot_id(),
        pid=1,
        written_ns=statuses.now_ns(),
        since=wall(),
        seconds=2.0,
        state="watching",
        reason=None,
        verdict="inconclusive",
        verdicts=fault_verdicts(None, None),
        vms=(vm, vm),
        vms_seen=3,
        vms_left_out=0,
        findings=(latched, replace(latched, ignored=HOSTILE)),
        findings_left_out=0,
        events={"MMIO": 5},
        lost={"MMIO": 2, "type-77": 1},
        attached=(("MMIO", "MMIO"),),
        metrics=None,
    )
    made = Numbers(
        status=status,
        plan=(
            Row(observation="MMIO", site="MMIO", attachment="a:b", attached=True, reason=""),
            Row(observation="FILL", site="ENTRY", attachment="a:b", attached=False, reason=HOSTILE),
        ),
        findings={RULES[0].id: 7},
        errors={"log": 2},
        evidence=1,
        attachments=1,
        config_good=True,
        config_loaded=1.0,
        expired_ignores=0,
        drained=2.0,
        runs={"tp_kvm_entry": (1000, 10), "tp_kvm_mmio": (0, 0)},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def scrape(place: str) -> str:
    with urllib.request.urlopen(f"http://{place}/metrics", timeout=20) as answer:
        return str(answer.read().decode())


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    serving = MetricsServer("127.0.0.1", 0, numbers)
    yield serving
    serving.close()


def test_metrics_have_no_label_that_a_guest_chooses(server: MetricsServer) -> None:
    text = scrape(server.place)
    assert "\x1b" not in text
    assert "a\\" not in text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert samples["kvmprobe_attached"] == "1.0"
    assert samples['kvmprobe_probe_attached{observation="FILL",site="ENTRY"}'] == "0.0"
    assert samples[f'kvmprobe_findings_total{{rule="{RULES[0].id}",severity="warning"}}'] == "7.0"
    assert samples['kvmprobe_latched{ignored="no",severity="critical"}'] == "1.0"
    assert samples['kvmprobe_latched{ignored="yes",severity="critical"}'] == "1.0"
    assert samples['kvmprobe_lost_records_total{observation="MMIO"}'] == "2.0"
    assert samples['kvmprobe_vms{verdict="inconclusive"}'] == "2.0"
    assert samples['kvmprobe_probe_run_seconds_total{program="tp_kvm_entry"}'] == "1e-06"
    assert samples['kvmprobe_probe_runs_total{program="tp_kvm_mmio"}'] == "0.0"
    assert all(re.fullmatch(r"[\w .-]+", word) for word in re.findall(r'="([^"]*)"', text))


def test_a_taken_port_is_one_line(server: MetricsServer) -> None:
    port = int(server.place.rpartition(":")[2])
    with pytest.raises(HostError, match=re.escape(f"can't serve metrics on 127.0.0.1:{port}: ")):
        MetricsServer("127.0.0.1", port, numbers)


def test_clients_that_say_nothing_hold_up_nobody_for_long(server: MetricsServer) -> None:
    host, _, port = server.place.rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(3)]
    assert "kvmprobe_attached" in scrape(server.place)
    for client in silent:
        client.close()


def test_alerts_name_metrics_that_there_are(server: MetricsServer) -> None:
    text = scrape(server.place)
    rules = (PACKAGING / "kvmprobe-watch.rules.yml").read_text()
    named = set(re.findall(r"kvmprobe_\w+", rules))
    assert named
    assert {name for name in named if f"\n{name}" not in text} == set()
    assert "vector(1)" in rules


def test_promtool_takes_the_alerts() -> None:
    promtool = which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    path = PACKAGING / "kvmprobe-watch.rules.yml"
    run = subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_unit_names_what_the_program_uses() -> None:
    unit = (PACKAGING / "kvmprobe-watch.service").read_text()
    config = Config()
    assert f"RuntimeDirectory={config.runtime_directory.name}\n" in unit
    assert f"StateDirectory={config.state_directory.name}\n" in unit
    assert "CapabilityBoundingSet=CAP_BPF CAP_PERFMON\n" in unit
    (limit,) = re.findall(r"^LimitNOFILE=(\d+)$", unit, re.MULTILINE)
    assert int(limit) >= 2 * NEEDED


def test_what_of_the_host_is_seen(tmp_path: Path) -> None:
    (tmp_path / "sys/module/kvm_intel").mkdir(parents=True)
    (tmp_path / "sys/module/kvmgt").mkdir()
    assert set(kvm_modules(tmp_path)) == {"kvm_intel"}
    before = kvm_modules(tmp_path)
    (tmp_path / "sys/module/kvm_intel").rename(tmp_path / "old")
    (tmp_path / "sys/module/kvm_intel").mkdir()
    assert kvm_modules(tmp_path) != before
    process = subprocess.Popen(["true"])
    process.wait()
    assert ended([os.getpid(), process.pid]) <= {process.pid}
