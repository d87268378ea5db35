# SPDX-License-Identifier: MIT
"""Thousands of VMs that live for a moment, under a watch: each counted, the memory bounded."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from kvmprobe.watch.status import Status
from tests.churn import WAYS
from tests.processes import ROOT
from tests.soak import GROWTH, memory
from tests.watched import Watch

PART = 500


def counted(vms: int, status: Status) -> bool:
    return status.vms_seen + status.lost.get("LIFECYCLE", 0) >= vms


def test_thousands_of_short_lived_vms(tmp_path: Path) -> None:
    with Watch(tmp_path) as watch:
        watch.watching()
        pid = watch.process.pid
        used = []
        for part, way in enumerate(("processes", *WAYS)):
            churn = [sys.executable, "-m", "tests.churn", way, str(PART), "4"]
            subprocess.run(churn, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            watch.until(partial(counted, (part + 1) * PART))
            used.append(memory(pid))
        # Their ends are noticed, too.
        status = watch.until(lambda s: len(s.vms) + s.vms_left_out < PART)
        assert status.findings == ()
        # A VM at the place of one before it is no gap in that one's records.
        assert not [m for v in status.verdicts.values() for m in v.missing]
        # Thousands of VMs leave a little: names and tables that grew; a soak has few.
        assert used[-1] - used[1] < 2 * GROWTH
        watch.signal(signal.SIGTERM)
        assert watch.end()[0] == 0
