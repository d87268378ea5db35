# SPDX-License-Identifier: MIT
"""What the probes say of guests whose every access is known: identity, order, lookups, losses."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvmprobe.analysis.integrity import Integrity
from kvmprobe.capture import session as session_module
from kvmprobe.capture.session import Filters, Session
from kvmprobe.guests import load
from kvmprobe.probes import schema
from kvmprobe.probes.schema import (
    NO_VCPU,
    Flag,
    LifecycleChange,
    LossCause,
    MmioType,
    Site,
    Type,
)
from tests.processes import LOAD, Gated, counts

#: What a guest's own addresses and values never reach: the kernel's half of the address space.
KERNEL = np.uint64(0xFFFF800000000000)
UPDATING = np.uint64(1 << 63)  # a generation while memslots change


@dataclass(frozen=True)
class Recording:
    events: NDArray[Any]
    sent: int
    pid: int
    output: str

    @property
    def counts(self) -> dict[str, int]:
        """What the load's VMM counted."""
        return counts(self.output)

    def of(self, observation: Type, kind: int | None = None) -> NDArray[Any]:
        chosen = self.events["type"] == observation
        if kind is not None:
            chosen &= self.events["kind"] == kind
        found: NDArray[Any] = self.events[chosen]
        return found

    def vcpus(self) -> list[NDArray[Any]]:
        """The events of each vCPU, in the order in which they came out of the ring."""
        own = self.events[(self.events["vcpu"] != NO_VCPU) & (self.events["type"] != Type.LOSS)]
        keys = own["vm"].astype(np.int64) << 16 | own["vcpu"]
        return [own[keys == key] for key in np.unique(keys)]


def record(command: tuple[str, ...], idle: float = 0.0, vcpu: int | None = None) -> Recording:
    """Record the VMs of a command from its beginning to its end; don't drain for `idle` seconds."""
    guest = Gated(*command)
    try:
        with Session(Filters(pid=guest.process.pid, vcpu=vcpu)) as session:
            session.prepare()
            session.attach()
            session.start()
            guest.go()
            rows = []
            if idle:
                while not len(first := session.drain()):
                    time.sleep(0.001)
                rows.append(first)
                time.sleep(idle)
            while guest.process.poll() is None:
                rows.append(session.drain())
                time.sleep(session.tick)
            rows.append(session.stop())
            return Recording(
                np.concatenate(rows), session.sent(), guest.process.pid, guest.output()
            )
    finally:
        guest.process.kill()
        guest.process.wait()


@pytest.fixture(scope="module")
def two_vcpus() -> Recording:
    mix = ["--mmio", "2", "--outs-ram", "16", "--ins-ram", "16", "--outs-mmio", "3"]
    return record((*LOAD, "--seconds", "1", "--rate", "4000", "--vcpus", "2", *mix))


def test_what_was_sent_was_received(two_vcpus: Recording) -> None:
    assert len(two_vcpus.of(Type.LOSS)) == 0
    assert len(two_vcpus.events) == two_vcpus.sent > 1000


def test_mmio_is_what_the_vmm_counted(two_vcpus: Recording) -> None:
    reads = two_vcpus.of(Type.MMIO, MmioType.UNSATISFIED_READ)
    writes = two_vcpus.of(Type.MMIO, MmioType.WRITE)
    assert len(reads) == two_vcpus.counts["mmio_reads"] > 0
    assert len(writes) == two_vcpus.counts["mmio_writes"] > 0
    # No in-kernel device is there to answer, and no answer counts twice.
    assert len(two_vcpus.of(Type.MMIO)) == len(reads) + len(writes)
    assert (writes["flags"] & Flag.WRITE).all()
    assert not (reads["flags"] & Flag.WRITE).any()


def test_mmio_is_at_the_hole_only(two_vcpus: Recording) -> None:
    """REP OUTSB from and REP INSB to RAM are emulated too, and are no MMIO."""
    mmio = two_vcpus.of(Type.MMIO)
    # REP OUTSB goes through the hole's bytes.
    assert set(mmio["addr"].tolist()) == {load.HOLE, load.HOLE + 1, load.HOLE + 2}
    assert (mmio["slot"] == -1).all()
    assert (mmio["flags"] & Flag.SLOT_KNOWN).all()
    assert not (mmio["flags"] & (Flag.UNSTABLE | Flag.L2 | Flag.SMM)).any()
    assert (mmio["flags"] & Flag.LEVEL_KNOWN).all()
    assert (mmio["flags"] & Flag.AS_KNOWN).all()
    assert (mmio["flags"] & Flag.GEN_KNOWN).all()
    to_user = (mmio["flags"] & Flag.TO_USERSPACE) != 0
    assert to_user.all()
    assert (mmio["value"] == 6).all()  # KVM_EXIT_MMIO
    assert not (mmio["flags"] & Flag.CANDIDATE).any()


def test_instructions_are_emulated(two_vcpus: Recording) -> None:
    emulated = two_vcpus.of(Type.EMULATE)
    assert len(emulated) >= len(two_vcpus.of(Type.MMIO, MmioType.WRITE))
    assert (emulated["addr"] >= load.CODE).all()
    assert (emulated["addr"] < load.PARAMS).all()
    assert not (emulated["flags"] & Flag.FAILED).any()


def test_sequence_and_time_of_each_vcpu(two_vcpus: Recording) -> None:
    vcpus = two_vcpus.vcpus()
    assert [int(events["vcpu"][0]) for events in vcpus] == [0, 1]
    for events in vcpus:
        np.testing.assert_array_equal(events["seq"], np.arange(len(events)))
        assert (np.diff(events["ts"].astype(np.int64)) >= 0).all()


def test_who_it_was(two_vcpus: Recording) -> None:
    (vm,) = two_vcpus.of(Type.LIFECYCLE, LifecycleChange.VM_SEEN)
    assert vm["aux"] == two_vcpus.pid
    assert (two_vcpus.events["vm"] == vm["vm"]).all()
    seen = two_vcpus.of(Type.LIFECYCLE, LifecycleChange.VCPU_SEEN)
    assert sorted(seen["vcpu"].tolist()) == [0, 1]
    assert len(set(seen["aux"].tolist())) == 2
    name = b"".join(int(vm[field]).to_bytes(8, "little") for field in ("value", "gen"))
    assert name.rstrip(b"\0").decode().startswith("python")
    # Threads begin after their process, and before they are seen.
    assert (seen["addr"] > vm["addr"]).all()
    assert (seen["addr"] < seen["ts"]).all()
    gone = two_vcpus.of(Type.LIFECYCLE, LifecycleChange.VCPU_GONE)
    assert sorted(gone["aux"].tolist()) == sorted(seen["aux"].tolist())
    assert all(int(events["type"][-1]) == Type.LIFECYCLE for events in two_vcpus.vcpus())


def test_the_cache_is_reported_at_first_sight(two_vcpus: Recording) -> None:
    for events in two_vcpus.vcpus():
        first = events[events["site"] == Site.FIRST_SIGHT]
        assert Type.CACHE in first["type"][:2]


def test_no_kernel_pointer_leaves_the_kernel(two_vcpus: Recording) -> None:
    for name, dtype in schema.EVENT.fields.items():  # type: ignore[union-attr]
        if dtype[0].itemsize < 8:
            continue
        values = two_vcpus.events[name]
        values = values[values & ~UPDATING >= KERNEL & ~UPDATING]
        assert (values < KERNEL).all(), name


def test_vcpu_filter(two_vcpus: Recording) -> None:
    recording = record((*LOAD, "--seconds", "0.3", "--rate", "2000", "--vcpus", "2"), vcpu=1)
    (events,) = recording.vcpus()
    assert int(events["vcpu"][0]) == 1
    half = recording.counts["mmio_writes"] / 2
    assert 0 < len(recording.of(Type.MMIO, MmioType.WRITE)) < 1.5 * half


def test_a_full_ring_loses_records_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "RING_BYTES", 1 << 16)
    recording = record((*LOAD, "--seconds", "2", "--rate", "2000"), idle=1.0)
    losses = recording.of(Type.LOSS)
    stored = recording.events[recording.events["type"] != Type.LOSS]
    assert len(stored) == recording.sent
    assert (losses["len"] == LossCause.RING).all()
    assert (losses["addr"] > 0).all()
    # The loss is the VM's own, whatever the CPU.
    assert (losses["vm"] == recording.of(Type.LIFECYCLE, LifecycleChange.VM_SEEN)["vm"][0]).all()
    assert (losses["aux"] == 0xFFFFFFFF).all()
    lost = int(losses["addr"].sum())
    assert lost > 500
    # By observation: what this guest makes all the time is what is lost.
    assert {Type.EMULATE, Type.MMIO} <= {Type(kind) for kind in losses["kind"].tolist()}
    (events,) = recording.vcpus()
    assert int(np.diff(events["seq"].astype(np.int64)).sum()) == lost + len(events) - 1
    counted = Integrity()
    counted.feed(schema.columns(recording.events))
    assert counted.missing == counted.lost.total() == lost
    assert counted.unexplained == 0
    assert len(counted.gaps) >= 1
    # What the guest did and what is told of it.
    mmio = len(recording.of(Type.MMIO)) + int(losses[losses["kind"] == Type.MMIO]["addr"].sum())
    assert mmio == recording.counts["mmio_reads"] + recording.counts["mmio_writes"]


MANY = """
import os
from kvmprobe.guests import kvm, load
from kvmprobe.guests.vmm import PAGE, Machine

def guest():
    with Machine() as machine:
        (one,) = load.prepare(machine, load.Mix(mmio=3))
        for _ in range(5):
            one.round()

def in_child(body):
    child = os.fork()
    if not child:
        body()
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)

def writes_to_rom():
    with Machine() as machine:
        code = machine.add_slot(0, 0x1000, PAGE)
        code.memory[:6] = b"\\xc6\\x06\\x20\\x80\\x41\\xf4"  # movb $0x41, 0x8020; hlt
        machine.add_slot(7, 0x8000, PAGE, kvm.MEM_READONLY)
        vcpu = machine.add_vcpu(3)
        vcpu.start_at(0x1000)
        vcpu.step()
        vcpu.step()

for _ in range(20):
    in_child(guest)
in_child(writes_to_rom)
for _ in range(5):
    guest()
"""


@pytest.fixture(scope="module")
def many() -> tuple[NDArray[Any], int, list[int]]:
    """Events of short VMs, the process that had 5 of them, and those that had one each."""
    guest = Gated(sys.executable, "-c", MANY)
    try:
        with Session(Filters()) as session:
            session.prepare()
            session.attach()
            session.start()
            guest.go()
            rows = []
            while guest.process.poll() is None:
                rows.append(session.drain())
                time.sleep(session.tick)
            rows.append(session.stop())
    finally:
        guest.process.kill()
    children = [int(line) for line in guest.output().splitlines()]
    events = np.concatenate(rows)
    assert not (events["type"] == Type.LOSS).any()
    return events, guest.process.pid, children


Many = tuple[NDArray[Any], int, list[int]]


def seen_of(events: NDArray[Any], kind: LifecycleChange) -> NDArray[Any]:
    found: NDArray[Any] = events[(events["type"] == Type.LIFECYCLE) & (events["kind"] == kind)]
    return found


def test_vms_of_other_processes_have_other_numbers(many: Many) -> None:
    events, _, children = many
    seen = seen_of(events, LifecycleChange.VM_SEEN)
    assert len(np.unique(seen["vm"])) == len(seen)
    numbers = [seen["vm"][seen["aux"] == child] for child in children]
    assert [len(number) for number in numbers] == [1] * 21
    # Each did the same, and none took another's events.
    for number in numbers[:20]:
        own = events[(events["vm"] == number[0]) & (events["type"] == Type.MMIO)]
        assert len(own) == 30


def test_a_vcpu_at_an_old_ones_address_is_another(many: Many) -> None:
    """One process makes 5 VMs, one after the other: KVM often gives them the same addresses."""
    events, pid, _ = many
    vms = seen_of(events, LifecycleChange.VM_SEEN)
    own = events[np.isin(events["vm"], vms["vm"][vms["aux"] == pid])]
    assert len(seen_of(own, LifecycleChange.VCPU_SEEN)) == 5
    assert np.count_nonzero(own["type"] == Type.MMIO) == 5 * 30
    counted = Integrity()
    counted.feed(schema.columns(own))
    assert (counted.missing, counted.anomaly_counts) == (0, {})


def test_vms_of_one_process_have_numbers_of_their_own(many: Many) -> None:
    events, pid, _ = many
    seen = seen_of(events, LifecycleChange.VM_SEEN)
    assert np.count_nonzero(seen["aux"] == pid) == 5


def test_memory_that_is_emulated_has_its_slot(many: Many) -> None:
    """A write to read-only memory is MMIO by KVM's rules, and its slot is told."""
    events, _, children = many
    seen = seen_of(events, LifecycleChange.VM_SEEN)
    (vm,) = seen["vm"][seen["aux"] == children[20]]
    (write,) = events[(events["vm"] == vm) & (events["type"] == Type.MMIO)]
    assert (write["addr"], write["slot"], write["len"], write["vcpu"]) == (0x8020, 7, 1, 3)
    wanted = Flag.WRITE | Flag.SLOT_KNOWN | Flag.SLOT_READONLY | Flag.CANDIDATE
    assert write["flags"] & wanted == wanted
    assert not write["flags"] & (Flag.UNSTABLE | Flag.SLOT_INVALID | Flag.SLOT_PRESUMED)
