# SPDX-License-Identifier: MIT
"""A memslot made and deleted, as fast as can be, where two vCPUs do MMIO: nobody is convicted."""

import subprocess
from pathlib import Path

from kvmprobe.analysis.run import analyze
from kvmprobe.probes.schema import Flag, Type
from kvmprobe.store.reader import CaptureReader
from tests.processes import KVMPROBE, LOAD, ROOT

GUEST = (*LOAD, "--vcpus", "2", "--pio", "0", "--ram", "0")


def test_lookups_while_memslots_change_are_unstable_and_convict_nobody(tmp_path: Path) -> None:
    path = tmp_path / "toggled.kvmprobe"
    # Alone of the types MMIO is seen by a tracepoint everywhere, whatever probes this kernel has.
    guest = (*GUEST, "--flips", "1000000", "--seconds", "1")
    command = [*KVMPROBE, "record", "-o", str(path), "--", *guest]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with CaptureReader(path) as reader:
        mmio = [batch["flags"][batch["type"] == Type.MMIO] for batch in reader.batches()]
        findings = analyze([reader]).to_document()["findings"]
    assert sum(int((flags & Flag.UNSTABLE != 0).sum()) for flags in mmio) > 0
    # Other VMs of this machine may run.
    pid = int(run.stdout.split()[1])
    assert [finding["rule"] for finding in findings if finding["vm"]["pid"] == pid] == []
