# SPDX-License-Identifier: MIT
"""Recorders that are killed at random moments: their captures open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT

KILLS = 20


def test_what_killed_recorders_leave_opens(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.killed", "record", str(KILLS), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert sum(seen.values()) == KILLS
    assert seen["cut off"] > 0
