# SPDX-License-Identifier: MIT
"""`kvmprobe doctor` beside a running VM, and with captures of other hosts."""

from __future__ import annotations

import json
import subprocess

import jsonschema
import pytest

from kvmprobe.doctor import report
from kvmprobe.host.facts import access
from tests.processes import KVMPROBE, LOAD, ROOT

GUEST = (*LOAD, "--rate", "500", "--seconds", "60")


def test_doctor_sees_a_vm_that_runs() -> None:
    problem = access().problem()
    if problem:
        pytest.skip(str(problem))
    with subprocess.Popen(GUEST, cwd=ROOT, stdout=subprocess.DEVNULL) as load:
        try:
            done = subprocess.run(
                [*KVMPROBE, "doctor", "--json"], cwd=ROOT, capture_output=True, text=True
            )
        finally:
            load.terminate()
    assert (done.returncode, done.stderr) == (0, "")
    got = json.loads(done.stdout)
    jsonschema.validate(got, report.json_schema())
    assert any(row["attached"] for row in got["plan"])
    (vm,) = [vm for vm in got["vms"] if vm["pid"] == load.pid]
    assert vm["nesting"] == "not seen"
    assert vm["slots"] is not None
    if (
        got["exposure"]["internal-slot"]["word"] == "unreachable"
        and got["host"]["vendor"] != "intel"
    ):
        assert vm["slots"] == []


def test_a_capture_of_another_host_shows_nothing_of_this_one() -> None:
    golden = ROOT / "tests/data/golden/intel-6.1-tss.kvmprobe"
    done = subprocess.run(
        [*KVMPROBE, "doctor", "--capture", golden], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "it was recorded on another" in done.stderr
