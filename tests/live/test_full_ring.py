# SPDX-License-Identifier: MIT
"""A ring that is full: what is lost is counted, and it goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from mmap import PAGESIZE

import numpy as np
import pytest

from kvmprobe.analysis.judge import Judge
from kvmprobe.analysis.words import INCONCLUSIVE, NOT_EXERCISED
from kvmprobe.capture import session as sessions
from kvmprobe.capture.session import Filters, Session
from kvmprobe.guests.load import Mix, prepare
from kvmprobe.guests.vmm import Machine
from kvmprobe.probes.schema import Type, columns
from tests.processes import LOAD, running


@pytest.fixture
def busy() -> Iterator[None]:
    """A guest that does accesses as fast as it can."""
    with running(*LOAD, "--seconds", "600"):
        yield


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(Filters()) as session:
        session.prepare()
        session.attach()
        session.start()
        yield session


@pytest.mark.usefixtures("busy")
def test_a_full_ring_is_told_and_over(session: Session) -> None:
    lost: list[int] = []
    judge = Judge(session.plan.rows(), from_first=True)
    # Nobody drains, so the ring fills up; on a busy machine that takes longer.
    for seconds in (4, 8, 16, 32):
        time.sleep(seconds)
        events = columns(session.drain())
        judge.feed(events)
        lost.append(int(events["addr"][events["type"] == Type.LOSS].sum()))
        if any(lost):
            break
    assert any(lost)
    report = judge.report()
    assert sum(report.coverage.lost.values()) == sum(lost)
    # What was lost is what the sequence lacks, and nothing more.
    assert report.coverage.unexplained == 0
    # What can convict goes into the reserve: a fault is open only where some of that was lost.
    needed = {"LIFECYCLE", "CACHE", "MATCH"} & set(report.coverage.lost)
    verdict = report.verdicts["cache-hits-memory"].verdict
    assert verdict == (INCONCLUSIVE if needed else NOT_EXERCISED)
    # It goes on as if nothing had been.
    for _ in range(20):
        time.sleep(session.tick)
        after = session.drain()
    assert np.count_nonzero(after["type"] != Type.LOSS) > 0


def test_what_both_rings_lose_leaves_the_verdict_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "RING_BYTES", 16 * PAGESIZE)
    monkeypatch.setattr(sessions, "RESERVE_BYTES", PAGESIZE)
    with Session(Filters(pid=os.getpid())) as session:
        session.prepare()
        session.attach()
        judge = Judge(session.plan.rows(), from_first=True)
        session.start()
        for _ in range(100):  # VMs, each of which tells who it is; nobody drains
            with Machine() as machine:
                (load,) = prepare(machine, Mix())
                load.round()
        judge.feed(columns(session.stop()))
    report = judge.report()
    assert report.coverage.lost["LIFECYCLE"] > 0
    assert {v.verdict for v in report.verdicts.values()} == {INCONCLUSIVE}
