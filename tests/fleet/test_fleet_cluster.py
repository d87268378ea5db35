# SPDX-License-Identifier: MIT
"""`kvmprobe fleet` on workers that are processes: here, on a cluster, killed, from a store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests import fleet_processes as processes
from tests.fleet_truth import differences

HOSTS = 40
Popen = subprocess.Popen[str]
#: moto's server, which can't be in this environment: its botocore wants an older dateutil.
MOTO = os.environ.get("KVMPROBE_MOTO_SERVER")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet") / "captures"
    status, out, err = processes.run(
        "simulate", folder, "--hosts", str(HOSTS), "--days", "2", "--events", "800000",
        "--vulnerable", "0.4", "--hit", "0.2",
    )  # fmt: skip
    assert (status, out) == (0, "")
    assert f"{HOSTS} hosts, 80" in err
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with processes.cluster(2) as (address, _):
        yield address


def done(result: Path) -> dict[str, int]:
    """The hosts' results that are there, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (result / "hosts").glob("*.json")}


def test_on_this_machine_and_again(fleet: Path, tmp_path: Path) -> None:
    result = tmp_path / "r"
    status, out, err = processes.run("analyze", fleet, "-o", result)
    assert (status, differences(fleet, result)) == (0, []), err
    assert f"{HOSTS} hosts, " in out
    before = done(result)
    assert len(before) == HOSTS
    # Nothing is left to do: no worker is asked.
    again = processes.run("analyze", fleet, "-o", result, "--scheduler", "tcp://127.0.0.1:9")
    assert (again[0], again[1]) == (0, out)
    assert done(result) == before


def _some_done(result: Path) -> bool:
    return len(done(result)) > 2


def in_the_middle(
    fleet: Path, folder: Path, workers: int, act: Callable[[Popen], None]
) -> tuple[Popen, Path, dict[str, int]]:
    """Begin an analysis and do something to it: the process, its result, and what was done then."""
    for attempt in range(5):
        result = folder / str(attempt)
        process = processes.start("analyze", fleet, "-o", result, "--workers", str(workers))
        processes.wait_for(partial(_some_done, result), "no host was done")
        act(process)
        before = done(result)
        if len(before) < HOSTS:
            return process, result, before
        process.communicate()
    pytest.fail("the analysis was at its end each time before anything could be done to it")


def test_a_worker_killed_in_the_middle_loses_nothing(fleet: Path, tmp_path: Path) -> None:
    process, result, _ = in_the_middle(
        fleet,
        tmp_path,
        2,
        lambda process: processes.workers_of(psutil.Process(process.pid))[0].kill(),
    )
    _, err = process.communicate()
    assert (process.returncode, differences(fleet, result)) == (0, []), err


def test_a_run_that_was_killed_goes_on(fleet: Path, tmp_path: Path) -> None:
    def kill(process: Popen) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    _, result, before = in_the_middle(fleet, tmp_path, 1, kill)
    status, _, err = processes.run("analyze", fleet, "-o", result)
    assert (status, differences(fleet, result)) == (0, []), err
    assert f"{len(before)} hosts are done already" in err
    assert before.items() <= done(result).items()


def test_ctrl_c_is_told_in_a_line(fleet: Path, tmp_path: Path) -> None:
    # As a terminal does, to all of them.
    process, _, _ = in_the_middle(
        fleet, tmp_path, 1, lambda process: os.killpg(process.pid, signal.SIGINT)
    )
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err == "kvmprobe: ended; the same command goes on from here\n"


def test_a_cluster(fleet: Path, tmp_path: Path, cluster: str) -> None:
    result = tmp_path / "r"
    status, _, err = processes.run("analyze", fleet, "-o", result, "--scheduler", cluster)
    assert (status, differences(fleet, result)) == (0, []), err


def test_a_cluster_whose_worker_dies(fleet: Path, tmp_path: Path) -> None:
    result = tmp_path / "r"
    with processes.cluster(2) as (address, pids):
        process = processes.start("analyze", fleet, "-o", result, "--scheduler", address)
        processes.wait_for(partial(_some_done, result), "no host was done")
        os.kill(pids[0], signal.SIGKILL)
        assert len(done(result)) < HOSTS
        _, err = process.communicate()
    assert (process.returncode, differences(fleet, result)) == (0, []), err


def test_a_cluster_whose_scheduler_dies(fleet: Path, tmp_path: Path) -> None:
    result = tmp_path / "r"
    with processes.cluster(1) as (address, pids):
        process = processes.start("analyze", fleet, "-o", result, "--scheduler", address)
        processes.wait_for(partial(_some_done, result), "no host was done")
        os.kill(pids[-1], signal.SIGKILL)
        out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err == (
        "kvmprobe: the scheduler is gone; the same command goes on where this one ended\n"
    )


def test_damage_is_told_and_the_rest_goes_on(fleet: Path, tmp_path: Path, cluster: str) -> None:
    place, result = tmp_path / "in", tmp_path / "r"
    names = sorted(path.name for path in fleet.iterdir() if path.is_dir())[:3]
    for name in names:
        shutil.copytree(fleet / name, place / name)
    broken = place / names[0] / "2026-01-02.parquet"
    broken.write_bytes(broken.read_bytes()[:-50])
    shutil.copytree(place / names[1], place / "copy\n\x1b[31m")
    status, out, err = processes.run("analyze", place, "-o", result, "--scheduler", cluster)
    assert status == 1
    assert "3 hosts, " in out
    lines = err.splitlines()
    assert [line for line in lines if f"{broken} is a Parquet file that is cut" in line]
    assert [line for line in lines if "one machine has files under 2 names" in line]
    assert [line for line in lines if "is a copy of" in line]
    assert "\x1b" not in out + err
    assert all(line.startswith("kvmprobe: ") for line in lines[:-1])


@pytest.mark.parametrize("scheduler", ["tcp://127.0.0.1:9", "nonsense"])
def test_no_scheduler(fleet: Path, tmp_path: Path, scheduler: str) -> None:
    status, out, err = processes.run(
        "analyze", fleet, "-o", tmp_path / "r", "--scheduler", scheduler
    )
    assert (status, out) == (1, "")
    assert err.startswith(f"kvmprobe: no scheduler answers at {scheduler}; start one with")
    assert err.count("\n") == 1


def test_no_worker(fleet: Path, tmp_path: Path) -> None:
    with processes.cluster(0) as (address, _):
        status, out, err = processes.run(
            "analyze", fleet, "-o", tmp_path / "r", "--scheduler", address
        )
    assert (status, out) == (1, "")
    assert err.startswith(f"kvmprobe: the scheduler at {address} has no worker; start some with")
    assert err.count("\n") == 1


@pytest.mark.skipif(MOTO is None, reason="KVMPROBE_MOTO_SERVER does not name a moto_server (5.1)")
def test_a_store(fleet: Path, tmp_path: Path) -> None:
    place = tmp_path / "in"
    for name in sorted(path.name for path in fleet.iterdir() if path.is_dir())[:4]:
        shutil.copytree(fleet / name, place / name)
    here, there = tmp_path / "here", tmp_path / "there"
    with processes.store(str(MOTO), "fleet") as env:
        processes.upload(place, env, "fleet/captures")
        status, out, err = processes.run("analyze", "s3://fleet/captures", "-o", there, env=env)
        assert status == 0, err
        nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_EC2_METADATA_DISABLED": "true"}
        env = {**nobody, "AWS_REGION": "us-east-1", "HOME": str(tmp_path)}
        refused = processes.run("analyze", "s3://fleet/captures", "-o", tmp_path / "no", env=env)
    assert processes.run("analyze", place, "-o", here)[1] == out
    assert (refused[0], refused[1]) == (1, "")
    assert refused[2].startswith("kvmprobe: can't list s3://fleet/captures: there are no credent")
    assert refused[2].count("\n") == 1
