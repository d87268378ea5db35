# SPDX-License-Identifier: MIT
"""Recorders that are killed at random moments: their captures open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

KILLS = 20


def test_what_killed_recorders_leave_opens(tmp_path: Path) -> None:
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command = [sys.executable, "-m", "tests.killed", "record", str(KILLS), str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert sum(seen.values()) == KILLS
        if seen.get("cut off"):
            return
    pytest.fail(f"no recorder was killed while it wrote: {seen}")
