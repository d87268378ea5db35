# SPDX-License-Identifier: MIT
"""A ring that is full: what is lost is counted, and it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvmprobe.analysis.judge import Judge
from kvmprobe.capture.session import Filters, Session
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
    # It goes on as if nothing had been.
    for _ in range(20):
        time.sleep(session.tick)
        after = session.drain()
    assert np.count_nonzero(after["type"] != Type.LOSS) > 0
