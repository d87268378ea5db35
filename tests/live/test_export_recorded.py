# SPDX-License-Identifier: MIT
"""A recording of this host, anonymized: the same findings, and nothing that names the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvmprobe.probes.schema import Type
from tests.exports import events_of, header_of, told
from tests.processes import KVMPROBE, ROOT


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "c.kvmprobe"
    guest = (sys.executable, "-m", "kvmprobe.guests.load", "--seconds", "1", "--rate", "2000")
    subprocess.run([*KVMPROBE, "record", "-o", path, "--", *guest], cwd=ROOT, check=True)
    return path


def test_anonymized_recording(capture: Path, tmp_path: Path) -> None:
    made, events = header_of(capture), events_of(capture)
    life = events[events["type"] == Type.LIFECYCLE]
    names = {row["value"].tobytes() + row["gen"].tobytes() for row in life} - {bytes(16)}
    host = made["host"]
    words = [host["boot_id"], host["machine"], made["started"], str(capture), *made["command"]]
    words += [build for build in host["modules"].values() if build]
    secret = [word.encode() for word in words if word and len(word) > 4]
    secret += [name.split(b"\0")[0] for name in names]
    assert len(life) >= 2
    assert names
    for ending in ("kvmprobe", "parquet", "ndjson", "csv", "pftrace"):
        out = tmp_path / f"out.{ending}"
        subprocess.run(
            [*KVMPROBE, "export", capture, "-o", out, "--anonymize"], cwd=ROOT, check=True
        )
        data = out.read_bytes()
        assert [word for word in secret if word in data] == []
    anonymous = events_of(tmp_path / "out.kvmprobe")
    assert told(tmp_path / "out.kvmprobe") == told(capture)
    assert len(anonymous) == len(events)
    assert not set(life["aux"].tolist()) & set(
        anonymous["aux"][anonymous["type"] == Type.LIFECYCLE].tolist()
    )
    assert not [name for name in names if name in anonymous.tobytes()]
