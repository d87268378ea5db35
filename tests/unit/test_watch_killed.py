# SPDX-License-Identifier: MIT
"""A watch that is killed at random moments: what it kept is whole, and the next one goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.processes import ROOT


def test_what_killed_desks_leave_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.killed", "watch", "12", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert min(seen["latched"], seen["evidence"], seen["found"]) > 1
