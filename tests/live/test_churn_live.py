# SPDX-License-Identifier: MIT
"""What a busy host does to kvmprobe: VMs by the thousand, a full ring, an end at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvmprobe.analysis.judge import Judge
from kvmprobe.analysis.words import INCONCLUSIVE
from kvmprobe.capture.header import live_header
from kvmprobe.capture.session import Filters, Session
from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm
from kvmprobe.probes.schema import Type, columns
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter
from tests.watched import LOAD, ROOT, Watch

VMS = 1200
#: What anonymous memory may grow by from a third of the VMs to all of them, kB.
GROWTH = 8192
KILLS = 40
#: Longest life of a writer before its SIGKILL, seconds.
_LIFE = 0.1

#: Makes VMs, each in a process of its own that does a few accesses, 16 at a time: so many, after
#: each line on stdin.
_CHURN = """
import sys
from multiprocessing import get_context
from kvmprobe.guests.load import Mix, prepare
from kvmprobe.guests.vmm import Machine
def live(_):
    with Machine() as machine:
        prepare(machine, Mix())[0].round()
for line in sys.stdin:
    with get_context("fork").Pool(16, maxtasksperchild=1) as pool:
        print(len(pool.map(live, range(int(line)), 1)), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def _needs_kvm_and_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("recording needs root")
    try:
        os.close(kvm.open_device())
    except GuestError as error:
        pytest.skip(str(error))


@pytest.fixture
def busy() -> Iterator[None]:
    """A guest that does accesses as fast as it can."""
    guest = subprocess.Popen([*LOAD, "--seconds", "600"], cwd=ROOT, stdout=subprocess.DEVNULL)
    yield
    guest.kill()
    guest.wait()


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(Filters()) as session:
        session.prepare()
        session.attach()
        session.start()
        yield session


def anonymous(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0])


def seen_all(watch: Watch, vms: int) -> int:
    return watch.until(lambda status: status.vms_seen >= vms).vms_seen


def test_vms_by_the_thousand(tmp_path: Path) -> None:
    with Watch(tmp_path) as watch:
        watch.watching()
        pid = watch.process.pid
        with subprocess.Popen(
            [sys.executable, "-c", _CHURN],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as churn:
            assert churn.stdin is not None
            assert churn.stdout is not None
            memory, made = [], 0
            for count in (VMS // 3, VMS - VMS // 3):
                print(count, file=churn.stdin, flush=True)
                made += int(churn.stdout.readline())
                memory.append((seen_all(watch, made), anonymous(pid)))
        (early, little), (late, much) = memory
        assert (early, late) == (VMS // 3, VMS)
        assert much - little < GROWTH
        # Gone from the status: at once where the kernel shows a VM's end, else with its process.
        status = watch.until(lambda status: not status.vms)
        assert (status.vms_seen, status.vms_left_out) == (VMS, 0)
        assert status.findings == ()
        assert sum(status.lost.values()) == 0
        watch.signal(signal.SIGTERM)
        assert watch.end()[0] == 0


@pytest.mark.usefixtures("busy")
def test_a_full_ring_is_told_and_over(session: Session) -> None:
    lost: list[int] = []
    judge = Judge(session.plan.rows(), from_first=True)
    end = time.monotonic() + 60
    # Nobody drains, so the ring fills up.
    while not any(lost) and time.monotonic() < end:
        time.sleep(2)
        events = columns(session.drain())
        judge.feed(events)
        lost.append(int(events["addr"][events["type"] == Type.LOSS].sum()))
    assert any(lost)
    report = judge.report()
    assert sum(report.coverage.lost.values()) == sum(lost)
    assert report.verdicts["cache-hits-memory"].verdict == INCONCLUSIVE
    # What was lost is what the sequence lacks, and nothing more.
    assert report.coverage.unexplained == 0
    # It goes on as if nothing had been.
    for _ in range(20):
        time.sleep(session.tick)
        after = session.drain()
    assert np.count_nonzero(after["type"] != Type.LOSS) > 0


@pytest.mark.usefixtures("busy")
def test_killed_at_any_moment_a_capture_opens(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "capture"
    header = live_header(session, [])
    chance = random.Random(6)
    events = 0
    for _ in range(KILLS):
        path.unlink(missing_ok=True)
        writer = os.fork()
        if not writer:
            with CaptureWriter(path, header) as capture:
                while True:
                    time.sleep(session.tick)
                    capture.write(session.drain())
        time.sleep(chance.uniform(0, _LIFE))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        if path.exists() and path.stat().st_size:
            with CaptureReader(path) as capture_read:
                events += sum(len(batch["ts"]) for batch in capture_read.batches())
                assert capture_read.header["host"] == header["host"]
                assert capture_read.damaged == []
    assert events > 0
