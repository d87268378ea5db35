# SPDX-License-Identifier: MIT
"""Watch mode, the flight recorder, and a guest that floods: what reaches user space."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvmprobe.analysis.candidates import candidates
from kvmprobe.analysis.detector import Detector
from kvmprobe.analysis.integrity import Integrity
from kvmprobe.capture import session as session_module
from kvmprobe.capture.session import Filters, Session
from kvmprobe.capture.source import FLIGHT_EVENTS
from kvmprobe.errors import HostError
from kvmprobe.probes import schema
from kvmprobe.probes.schema import NO_VCPU, Flag, LifecycleChange, Type
from tests.processes import LOAD, Gated

#: Reads a hole and writes to read-only memory, in turn: the writes are candidates.
ROM = """
from kvmprobe.guests import kvm
from kvmprobe.guests.vmm import PAGE, Machine

with Machine() as machine:
    code = machine.add_slot(0, 0x1000, PAGE)
    # movb 0xf000, %al; movb $0x41, 0x8020; hlt; jmp back
    code.memory[:11] = b"\\xa0\\x00\\xf0\\xc6\\x06\\x20\\x80\\x41\\xf4\\xeb\\xf5"
    machine.add_slot(7, 0x8000, PAGE, kvm.MEM_READONLY)
    vcpu = machine.add_vcpu(0)
    vcpu.start_at(0x1000)
    for _ in range(300):
        vcpu.step()
"""
#: What an event says of what happened, whenever it did.
SAID = ("vcpu", "type", "site", "flags", "addr", "value", "slot", "kind", "len")


def prepared(session: Session) -> None:
    session.prepare()
    session.attach()
    session.start()


def rom_writes(*, watch: bool) -> NDArray[Any]:
    guest = Gated(sys.executable, "-c", ROM)
    with Session(Filters(pid=guest.process.pid), watch=watch) as session:
        prepared(session)
        guest.go()
        rows = []
        while guest.process.poll() is None:
            rows.append(session.drain())
            time.sleep(session.tick)
        guest.counts()
        return np.concatenate([*rows, session.stop()])


def test_watch_ships_the_candidates_and_nothing_else() -> None:
    full, watched = rom_writes(watch=False), rom_writes(watch=True)
    assert candidates(schema.columns(watched)).all()
    # Changes of the level and of SMM, of which watch mode leaves some out, are not in this guest.
    wanted = full[(full["flags"] & Flag.CANDIDATE) != 0]
    assert np.count_nonzero(wanted["type"] == Type.MMIO) > 50
    assert len(full) > 2 * len(wanted)
    own, others = [rows[rows["vcpu"] != NO_VCPU] for rows in (watched, wanted)]
    bulk = own["type"] != Type.LIFECYCLE
    for name in SAID:
        np.testing.assert_array_equal(own[name][bulk], others[name][bulk], name)
    np.testing.assert_array_equal(own["type"], others["type"])
    # Nothing is missing from the sequence, for what is not shipped has no place in it.
    counted = Integrity()
    counted.feed(schema.columns(watched))
    assert (counted.missing, counted.anomaly_counts) == (0, {})
    found = []
    for rows in (full, watched):
        detector = Detector()
        detector.feed(schema.columns(rows))
        found.append([(f.rule.id, f.count) for f in detector.findings()])
    assert found[0] == found[1]


def test_the_flight_recorder_keeps_the_last_events() -> None:
    guest = Gated(*LOAD, "--seconds", "1", "--rate", "2000", "--vcpus", "2")
    with Session(Filters(pid=guest.process.pid), watch=True, flight=True) as session:
        prepared(session)
        guest.go()
        shipped, flights = [], []
        while guest.process.poll() is None:
            shipped.append(session.drain())
            flights.append(session.flight())
            time.sleep(0.05)
        guest.counts()
        rows = np.concatenate(shipped)
        # While the guest runs: nothing torn, nothing out of order, nothing left out.
        for columns in flights:
            for vcpu in np.unique(columns["vcpu"][columns["vcpu"] != NO_VCPU]):
                own = columns["vcpu"] == vcpu
                assert 1 <= np.count_nonzero(own) <= FLIGHT_EVENTS
                assert (np.diff(columns["seq"][own].astype(np.int64)) == 1).all()
                assert (np.diff(columns["ts"][own].astype(np.int64)) > 0).all()
                assert set(columns["type"][own].tolist()) <= set(Type)
        last = session.flight()
    assert {Type.EMULATE, Type.MMIO} <= set(last["type"].tolist())
    assert set(last["vcpu"][last["vcpu"] != NO_VCPU].tolist()) == {0, 1}
    assert set(rows["type"].tolist()) <= {Type.LIFECYCLE, Type.CACHE, Type.MEMSLOT}
    # An event that was shipped too has the time there that it has here.
    early = flights[next(i for i, flight in enumerate(flights) if len(flight["ts"]))]
    seen = early["ts"][early["type"] == Type.LIFECYCLE]
    assert set(seen.tolist()) <= set(rows["ts"].tolist())


def test_no_flight_recorder_unless_asked_for() -> None:
    with pytest.raises(HostError, match="no flight recorder"):
        Session(Filters()).flight()


def test_a_flood_takes_nothing_from_another_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small ring, drained too late for the guest that floods: the other VM loses nothing."""
    monkeypatch.setattr(session_module, "RING_BYTES", 1 << 17)
    flood = Gated(*LOAD, "--seconds", "3")
    quiet = Gated(*LOAD, "--seconds", "3", "--rate", "200")
    guests = flood, quiet
    with Session(Filters()) as session:
        prepared(session)
        for guest in guests:
            guest.go()
        rows = []
        while any(guest.process.poll() is None for guest in guests):
            rows.append(session.drain())
            time.sleep(0.2)
        rows.append(session.stop())
        sent = session.sent()
    counts = quiet.counts()
    flood.counts()
    events = np.concatenate(rows)
    seen = events[(events["type"] == Type.LIFECYCLE) & (events["kind"] == LifecycleChange.VM_SEEN)]
    numbers = [int(seen["vm"][seen["aux"] == guest.process.pid][0]) for guest in guests]
    losses = events[events["type"] == Type.LOSS]
    assert set(losses["vm"].tolist()) == {numbers[0]}
    stored = events[events["type"] != Type.LOSS]
    assert len(stored) == sent
    own = stored[stored["vm"] == numbers[1]]
    mmio = np.count_nonzero(own["type"] == Type.MMIO)
    assert mmio == counts["mmio_reads"] + counts["mmio_writes"] > 0
    # What decides of the VM that floods is complete too: it is seen, and seen to go.
    flooding = stored[(stored["vm"] == numbers[0]) & (stored["vcpu"] == 0)]
    lives = flooding[flooding["type"] == Type.LIFECYCLE]["kind"].tolist()
    assert lives == [LifecycleChange.VCPU_SEEN, LifecycleChange.VCPU_GONE]
    assert not (losses["kind"] == Type.LIFECYCLE).any()
    counted = Integrity()
    counted.feed(schema.columns(events))
    assert counted.anomaly_counts == {}
    assert counted.missing == int(losses["addr"].sum()) > 1000
