# SPDX-License-Identifier: MIT
"""Many VMs of one process, which come and go and get each other's addresses."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvmprobe.analysis.judge import Judge
from kvmprobe.analysis.words import NOT_EXERCISED
from kvmprobe.capture.session import Filters, Session
from kvmprobe.guests.load import Mix, prepare
from kvmprobe.guests.vmm import Machine
from kvmprobe.probes.schema import LifecycleChange, Type, columns
from kvmprobe.stat.live import LiveStat
from kvmprobe.stat.model import Table

VMS, AT_A_TIME = 96, 16
MIX = Mix(mmio=3, pio=1, ram=1)


def _churn() -> int:
    """Run the VMs on threads that each run many; the MMIO accesses that their VMMs saw."""

    def one(_: int) -> int:
        with Machine() as machine:
            (load,) = prepare(machine, MIX)
            load.round()
            return load.counts.mmio_reads + load.counts.mmio_writes

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return sum(pool.map(one, range(VMS)))


@pytest.mark.parametrize("watch", [False, True], ids=["record", "watch"])
def test_each_vm_is_told_from_the_one_before(watch: bool) -> None:
    with Session(Filters(pid=os.getpid()), watch=watch) as session:
        session.prepare()
        session.attach()
        judge = Judge(session.plan.rows(), from_first=True)
        batches = []
        session.start()
        load = threading.Thread(target=_churn)
        load.start()
        while load.is_alive():
            load.join(session.tick)
            batches.append(session.drain())
        batches.append(session.stop())
    for batch in batches:
        judge.feed(columns(batch))
    lifecycle = np.concatenate([batch[batch["type"] == Type.LIFECYCLE] for batch in batches])
    own = [
        int(np.count_nonzero(lifecycle["kind"] == kind))
        for kind in (LifecycleChange.VM_SEEN, LifecycleChange.VCPU_SEEN)
    ]
    report = judge.report()
    assert own == [VMS, VMS]
    assert len(report.vms) == VMS
    assert report.coverage.unexplained == 0
    assert not report.coverage.lost
    assert report.verdict == NOT_EXERCISED


def test_each_vm_is_counted_by_itself() -> None:
    with LiveStat(os.getpid()) as live:
        live.start()
        accesses = _churn()
        live.stop()
        counted = live.counted()
    assert len(counted.vms) == VMS
    assert counted.total(Table.MMIO) == accesses
