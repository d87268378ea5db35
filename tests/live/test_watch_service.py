# SPDX-License-Identifier: MIT
"""`kvmprobe watch` on this host: signals, neighbours, and what goes wrong at the start.

It runs with the capabilities of the packaged unit alone.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmprobe.watch.status import Status
from tests.processes import LOAD, running
from tests.soak import soak
from tests.watched import PATIENCE, Watch, left_behind, programs_of


@pytest.fixture
def guest() -> Iterator[subprocess.Popen[bytes]]:
    with running(*LOAD, "--seconds", "600", "--rate", "500") as process:
        yield process


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end of sd_notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(PATIENCE)
        yield listening


def heard(manager: socket.socket, wanted: str) -> list[str]:
    """What the service told its manager, up to what is wanted."""
    lines: list[str] = []
    while wanted not in lines:
        lines += manager.recv(4096).decode().splitlines()
    return lines


def test_from_start_to_stop(
    tmp_path: Path, guest: subprocess.Popen[bytes], manager: socket.socket
) -> None:
    config = tmp_path / "watch.toml"
    config.write_text("log.files = 2\n")
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}
    with Watch(tmp_path, "-c", str(config), env=env) as watch:
        watch.watching()
        heard(manager, "READY=1")
        heard(manager, "WATCHDOG=1")

        def sees_guest(status: Status) -> bool:
            return guest.pid in [vm.pid for vm in status.vms]

        status = watch.until(sees_guest)
        assert status.verdict == "not exercised"
        assert status.findings == ()
        metrics = watch.metrics()
        assert metrics["kvmprobe_attached"] == 1
        assert metrics["kvmprobe_config_good"] == 1
        assert metrics['kvmprobe_vms{verdict="not exercised"}'] >= 1
        assert metrics['kvmprobe_lost_records_total{observation="MMIO"}'] == 0
        assert metrics["process_resident_memory_bytes"] > 0

        config.write_text("colour = 1\n")
        watch.signal(signal.SIGHUP)
        assert "READY=1" not in heard(manager, "RELOADING=1")
        heard(manager, "READY=1")
        while watch.metrics()["kvmprobe_config_good"] == 1:
            time.sleep(0.05)

        watch.signal(signal.SIGUSR1)
        status = watch.until(lambda status: status.state == "detached")
        assert (status.verdict, status.attached) == ("inconclusive", ())
        assert status.reason is not None
        assert status.reason.startswith("SIGUSR1")
        assert programs_of(watch.process.pid) == set()
        assert left_behind(watch.programs) == set()
        assert watch.metrics()["kvmprobe_attached"] == 0

        config.write_text("log.files = 3\n")
        watch.signal(signal.SIGHUP)
        watch.watching()
        watch.until(sees_guest)
        metrics = watch.metrics()
        assert metrics["kvmprobe_config_good"] == 1
        assert metrics["kvmprobe_attachments_total"] == 2

        watch.signal(signal.SIGTERM)
        heard(manager, "STOPPING=1")
        code, said = watch.end()
        assert code == 0
        assert not (watch.runtime / "status.json").exists()
        assert sum("the old configuration stays" in line for line in said) == 1
        assert f"{config}: colour: unknown key" in "".join(said)
        assert said[-1] == "kvmprobe: stopping (SIGTERM)"


def test_two_at_once_but_not_in_one_place(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with Watch(tmp_path / "one") as one, Watch(tmp_path / "two") as two:
        status = one.watching()
        two.watching()
        for options, says in (
            (("--listen", status.metrics or ""), "can't serve metrics on"),
            (("--state-directory", str(one.state)), f"another kvmprobe watch uses {one.state}"),
            (("--runtime-directory", str(one.runtime)), "another --runtime-directory"),
        ):
            with Watch(tmp_path / "three", *options) as third:
                code, (said,) = third.end()
            assert code == 1
            assert says in said
        # Killed outright, it leaves a status that is stale, and nothing else.
        one.signal(signal.SIGKILL)
        assert one.end()[0] == -signal.SIGKILL
        assert (one.runtime / "status.json").exists()
        assert two.status() is not None
        two.signal(signal.SIGINT)
        assert two.end()[0] == 0


def one_line(watch: Watch) -> str:
    with watch:
        code, (said,) = watch.end()
    assert code == 1
    assert not (watch.runtime / "status.json").exists()
    return str(said)


def test_a_kernel_without_btf(tmp_path: Path) -> None:
    hide = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /sys/kernel/btf && exec "$@"', "sh")
    assert "/sys/kernel/btf/vmlinux" in one_line(Watch(tmp_path, prefix=hide))


def test_without_capabilities(tmp_path: Path) -> None:
    said = one_line(Watch(tmp_path, prefix=("setpriv", "--bounding-set=-all")))
    assert "CAP_BPF" in said


def test_a_short_soak(tmp_path: Path) -> None:
    result = soak(tmp_path, seconds=6.0, warm_up=2.0)
    assert result.vms > 0
    assert result.problems() == []
