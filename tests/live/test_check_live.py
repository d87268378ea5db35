# SPDX-License-Identifier: MIT
"""`kvmprobe check` records this host, beside a VM that runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from kvmprobe.host import facts
from tests.processes import KVMPROBE, LOAD, ROOT

GUEST = (*LOAD, "--rate", "500", "--seconds", "60")


def test_check_watches_the_host_for_its_time_and_sees_a_vm(tmp_path: Path) -> None:
    problem = facts.access().problem()
    if problem:
        pytest.skip(str(problem))
    metrics = tmp_path / "kvmprobe.prom"
    words = ("check", "-d", "2", "--json", "--runtime-directory", tmp_path, "--textfile", metrics)
    with subprocess.Popen(GUEST, cwd=ROOT, stdout=subprocess.DEVNULL) as load:
        try:
            done = subprocess.run([*KVMPROBE, *words], cwd=ROOT, capture_output=True, text=True)
        finally:
            load.terminate()
    answer = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (answer["code"], "")
    assert answer["source"] == "live"
    assert answer["error"] is None
    assert answer["vms"] >= 1
    assert answer["events"] > 0
    assert 0 < answer["seconds"] < 3
    assert f"kvmprobe_check_vms {answer['vms']}\n" in metrics.read_text()
