# SPDX-License-Identifier: MIT
"""The VMM and the load guest on this machine's KVM."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm, load
from kvmprobe.guests.flip import Flipper
from kvmprobe.guests.vmm import PAGE, Halt, Interrupted, Io, Machine, Mmio, Vcpu
from tests.processes import ROOT


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        machine.set_tss_addr()
        machine.set_identity_map_addr()
        yield machine


def code_at_0x1000(machine: Machine, code: bytes) -> Vcpu:
    slot = machine.add_slot(0, 0x1000, PAGE)
    slot.memory[: len(code)] = code
    vcpu = machine.add_vcpu()
    vcpu.start_at(0x1000)
    return vcpu


MIXES = [
    load.Mix(),
    load.Mix(mmio=5, pio=0, ram=0),
    load.Mix(mmio=0, pio=7, ram=3),
    load.Mix(mmio=0, pio=0, ram=1000),
    load.Mix(mmio=0, pio=0, ram=0, outs_ram=9),
    load.Mix(mmio=0, pio=0, ram=0, ins_ram=9),
    load.Mix(mmio=0, pio=0, ram=0, outs_mmio=9),
    load.Mix(mmio=0, pio=0, ram=0, ins_mmio=9),
    load.Mix(mmio=2, pio=2, ram=2, outs_ram=3, ins_ram=4, outs_mmio=5, ins_mmio=24),
]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_counts_are_exactly_the_mix(mix: load.Mix) -> None:
    rounds = 20
    with Machine() as machine:
        (guest,) = load.prepare(machine, mix)
        for _ in range(rounds):
            guest.round()
        counts = guest.counts
    assert counts.rounds == rounds
    assert counts.mmio_reads == rounds * (mix.mmio + mix.outs_mmio)
    assert counts.mmio_writes == rounds * (mix.mmio + -(-mix.ins_mmio // 8))
    strings = mix.outs_ram + mix.ins_ram + mix.outs_mmio + mix.ins_mmio
    assert counts.io == rounds * (2 * mix.pio + strings)
    assert counts.ram == rounds * mix.ram


def test_the_guest_gets_the_answers() -> None:
    with Machine() as machine:
        (guest,) = load.prepare(machine, load.Mix(ins_ram=16))
        guest.round()
        assert guest.last_answers() == (0xA5A5A5A5, 0xA5)
        assert guest.buffer()[:16] == load.ANSWER * 16
        assert guest.buffer()[16:] == bytes(PAGE - load.BUFFER - 16)


def test_rate_and_full_speed() -> None:
    paced = load.run_load(0.5, rate=500)
    # 5 accesses a round, 100 rounds a second; the last one due at the end may be missing.
    assert 1 <= paced.rounds <= 51
    assert paced.mmio_reads == paced.mmio_writes == paced.ram == paced.rounds
    assert paced.io == 2 * paced.rounds
    full = load.run_load(0.5)
    assert full.exits > paced.exits
    assert full.mmio_reads == full.mmio_writes == full.ram
    assert full.mmio_reads % full.rounds == 0


def test_two_vcpus_count_apart() -> None:
    with Machine() as machine:
        first, second = load.prepare(machine, load.Mix(mmio=3), vcpus=2)
        threads = [
            threading.Thread(target=lambda g=guest, n=n: [g.round() for _ in range(n)])
            for guest, n in ((first, 30), (second, 50))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (first.counts.mmio_reads, first.counts.ram) == (90, 30)
        assert (second.counts.mmio_reads, second.counts.ram) == (150, 50)


@pytest.mark.parametrize(
    ("mix", "vcpus", "message"),
    [
        (load.Mix(0, 0, 0), 1, "nothing to do"),
        (load.Mix(mmio=70000), 1, "0 to 65535 mmio"),
        (load.Mix(ins_ram=2049), 1, "0 to 2048 ins_ram"),
        (load.Mix(ram=-1), 1, "not -1"),
        (load.Mix(), 9, "1 to 8 vCPUs"),
    ],
)
def test_bad_parameters(mix: load.Mix, vcpus: int, message: str) -> None:
    with Machine() as machine, pytest.raises(GuestError, match=message):
        load.prepare(machine, mix, vcpus)


def test_write_to_a_readonly_slot_is_mmio_and_a_read_is_not(machine: Machine) -> None:
    # movb $0x41, 0x8000; movb 0x8000, %al; outb %al, $0x10; hlt
    vcpu = code_at_0x1000(machine, b"\xc6\x06\x00\x80\x41\xa0\x00\x80\xe6\x10\xf4")
    rom = machine.add_slot(1, 0x8000, PAGE, kvm.MEM_READONLY)
    rom.memory[0] = 0x77
    assert vcpu.step() == Mmio(0x8000, is_write=True, data=b"\x41")
    assert vcpu.step() == Io(0x10, is_write=True, size=1, count=1, data=b"\x77")
    assert vcpu.step() == Halt()
    assert rom.memory[0] == 0x77


def test_slot_deleted_moved_and_reflagged_under_the_guest(machine: Machine) -> None:
    # 1: incb 0x8000; hlt; jmp 1b
    vcpu = code_at_0x1000(machine, b"\xfe\x06\x00\x80\xf4\xeb\xf9")
    slot = machine.add_slot(7, 0x8000, PAGE)
    assert vcpu.step() == Halt()
    slot.delete()
    assert vcpu.step() == Mmio(0x8000, is_write=False, data=bytes(8)[:1])
    vcpu.answer(b"\x20")
    assert vcpu.step() == Mmio(0x8000, is_write=True, data=b"\x21")
    assert vcpu.step() == Halt()
    slot.insert()
    assert vcpu.step() == Halt()
    assert slot.memory[0] == 2
    slot.set_flags(kvm.MEM_LOG_DIRTY_PAGES)
    assert vcpu.step() == Halt()
    assert slot.memory[0] == 3
    slot.move(0x9000)
    assert slot.gpa == 0x9000
    assert isinstance(vcpu.step(), Mmio)


def test_flipped_slot_turns_mmio_into_memory() -> None:
    mix = load.Mix(mmio=200, pio=0, ram=0)
    with Machine() as machine:
        (guest,) = load.prepare(machine, mix)
        with Flipper(machine.add_slot(1, load.HOLE, PAGE), rate=500) as flipper:
            while flipper.changes < 50:
                guest.round()
        counts = guest.counts
        assert 0 < counts.mmio_reads < counts.rounds * mix.mmio
        guest.round()
        assert guest.counts.mmio_reads == counts.mmio_reads + mix.mmio


def test_overlapping_slot_is_refused(machine: Machine) -> None:
    machine.add_slot(0, 0x1000, PAGE)
    with pytest.raises(GuestError, match="can't create memslot 1"):
        machine.add_slot(1, 0x1000, PAGE)


def test_a_guest_that_never_exits_is_interrupted(machine: Machine) -> None:
    vcpu = code_at_0x1000(machine, b"\xeb\xfe")  # 1: jmp 1b
    inside = threading.Event()
    ends = []

    def spin() -> None:
        with vcpu.interruptible():
            inside.set()
            ends.append(vcpu.step())

    thread = threading.Thread(target=spin)
    thread.start()
    inside.wait()
    thread.join(0.05)
    assert thread.is_alive()
    vcpu.interrupt()
    thread.join(10)
    assert ends == [Interrupted()]


def test_instruction_that_kvm_cannot_go_on_from_names_rip(machine: Machine) -> None:
    vcpu = code_at_0x1000(machine, b"\xe9\xfd\x6f")  # jmp 0x8000, where nothing is
    with pytest.raises(GuestError, match=r"at rip 0x"):
        vcpu.step()


def test_nothing_is_left_behind() -> None:
    def resources() -> tuple[list[str], int]:
        gc.collect()
        links = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
        maps = Path("/proc/self/maps").read_text()
        return sorted(link for link in links if "kvm" in link), maps.count("kvm-vcpu")

    assert resources() == ([], 0)
    with Machine() as machine:
        (guest,) = load.prepare(machine, load.Mix())
        guest.round()
        fds, maps = resources()
        assert "/dev/kvm" in fds
        assert maps > 0
    assert resources() == ([], 0)


def test_command_prints_its_counts() -> None:
    command = [sys.executable, "-m", "kvmprobe.guests.load", "--seconds", "0.3", "--rate", "1000"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    printed = {name: int(value) for name, value in map(str.split, run.stdout.splitlines())}
    assert printed["mmio_reads"] == printed["mmio_writes"] == printed["rounds"] > 0
    assert printed["exits"] == 5 * printed["rounds"]
    assert printed["memslot_changes"] == 0
