# SPDX-License-Identifier: MIT
"""A load with known counts: a guest that does MMIO, port I/O and RAM accesses at a chosen rate.

python -m kvmprobe.guests.load --seconds 2 --rate 1000
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from kvmprobe.errors import GuestError
from kvmprobe.guests.flip import Flipper
from kvmprobe.guests.kvm import IO_IN, ExitReason, RunOffset
from kvmprobe.guests.vmm import PAGE, Machine, Slot, Vcpu

# Addresses of load.S.
CODE = 0x1000
PARAMS = 0x2000
VCPU_PAGES = 0x3000
HOLE = 0xF000
RAM_DONE = 0
LAST_MMIO = 4
LAST_IN = 8
BUFFER = 0x800

MAX_VCPUS = 8
#: What every read of the hole and of a port answers.
ANSWER = b"\xa5"
#: Without a rate a round does about so many accesses, to make its HLT cheap.
_BURST = 256


@dataclass(frozen=True)
class Mix:
    """How often one round does each kind of access."""

    mmio: int = 1  # 4-byte writes of the hole, and as many reads
    pio: int = 1  # byte OUTs, and as many INs
    ram: int = 1  # increments of RAM
    outs_ram: int = 0  # bytes of REP OUTSB from RAM
    ins_ram: int = 0  # bytes of REP INSB into RAM
    outs_mmio: int = 0  # bytes of REP OUTSB from the hole
    ins_mmio: int = 0  # bytes of REP INSB into the hole

    @property
    def accesses(self) -> int:
        """Accesses of one round; a byte of a string instruction is one."""
        strings = self.outs_ram + self.ins_ram + self.outs_mmio + self.ins_mmio
        return 2 * self.mmio + 2 * self.pio + self.ram + strings

    def times(self, factor: int) -> Mix:
        """The mix of a round that does the work of `factor` rounds."""
        return Mix(*(factor * count for count in astuple(self)))


@dataclass
class Counts:
    """What the VMM saw the guest do.

    MMIO counts exits: one an access, but KVM writes the bytes of a REP INSB into the hole in pieces
    of 8.  Port I/O counts units: a byte of a string instruction is one.
    """

    mmio_reads: int = 0
    mmio_writes: int = 0
    io: int = 0
    ram: int = 0
    exits: int = 0
    rounds: int = 0
    memslot_changes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Load:
    """The load guest on one vCPU."""

    def __init__(self, vcpu: Vcpu, memory: Slot) -> None:
        self.counts = Counts()
        self._vcpu = vcpu
        page = VCPU_PAGES + PAGE * vcpu.id
        vcpu.start_at(CODE, fs=page >> 4)
        self._memory = memory.memory
        self._page = page - memory.gpa

    def round(self) -> None:
        """Let the guest do one round, and add what it did to `counts`."""
        run, run_bytes, run_words = self._vcpu.run, self._vcpu.run_bytes, self._vcpu.run_words
        is_write, count = RunOffset.MMIO_IS_WRITE, RunOffset.IO_COUNT // 4
        mmio_data, mmio_answer = slice(RunOffset.MMIO_DATA, RunOffset.MMIO_DATA + 8), ANSWER * 8
        direction = RunOffset.IO_DIRECTION
        mmio, port, halt = ExitReason.MMIO.value, ExitReason.IO.value, ExitReason.HLT.value
        reads = writes = units = exits = 0
        # One pass is one exit: 100,000 a second and more, so what it needs is in local variables.
        while (reason := run()) != halt:
            exits += 1
            if reason == mmio:
                if run_bytes[is_write]:
                    writes += 1
                else:
                    reads += 1
                    run_bytes[mmio_data] = mmio_answer
            elif reason == port:
                units += run_words[count]
                if run_bytes[direction] == IO_IN:
                    self._vcpu.answer(ANSWER * run_words[count])
            elif reason == ExitReason.INTR:
                exits -= 1
            else:
                raise GuestError(f"the load guest stopped: {self._vcpu.decode(reason)}")
        (ram,) = struct.unpack_from("I", self._memory, self._page + RAM_DONE)
        struct.pack_into("I", self._memory, self._page + RAM_DONE, 0)
        self.counts += Counts(reads, writes, units, ram, exits + 1, 1)

    def last_answers(self) -> tuple[int, int]:
        """What the guest got from its last read of the hole (4 bytes) and its last IN (1 byte)."""
        (mmio,) = struct.unpack_from("I", self._memory, self._page + LAST_MMIO)
        return mmio, self._memory[self._page + LAST_IN]

    def buffer(self) -> bytes:
        """The 2048 bytes that the string instructions read and write."""
        return self._memory[self._page + BUFFER : self._page + PAGE]


def prepare(machine: Machine, mix: Mix, vcpus: int = 1) -> list[Load]:
    """Put the load guest into a fresh machine.

    Raises GuestError when a count of `mix` or the number of vCPUs is out of range.
    """
    if not 1 <= vcpus <= MAX_VCPUS:
        raise GuestError(f"the load guest has 1 to {MAX_VCPUS} vCPUs, not {vcpus}")
    for name, count in asdict(mix).items():
        limit = 0xFFFF if name in ("mmio", "pio", "ram") else PAGE - BUFFER
        if not 0 <= count <= limit:
            raise GuestError(f"the load guest does 0 to {limit} {name} a round, not {count}")
    if mix.accesses == 0:
        raise GuestError("the load guest has nothing to do: every count is 0")
    machine.set_tss_addr()
    machine.set_identity_map_addr()
    memory = machine.add_slot(0, CODE, VCPU_PAGES + PAGE * MAX_VCPUS - CODE)
    code = Path(__file__).with_name("load.bin").read_bytes()
    memory.memory[: len(code)] = code
    struct.pack_into("7H", memory.memory, PARAMS - CODE, *astuple(mix))
    return [Load(machine.add_vcpu(n), memory) for n in range(vcpus)]


def _pace(load: Load, seconds: float, interval: float, stop: threading.Event) -> None:
    start = due = time.monotonic()
    while (now := time.monotonic()) < start + seconds and not stop.is_set():
        if now < due:
            stop.wait(min(due, start + seconds) - now)
            continue
        load.round()
        due += interval


def run_load(
    seconds: float,
    rate: float | None = None,
    mix: Mix | None = None,
    *,
    vcpus: int = 1,
    flips: float | None = None,
) -> Counts:
    """Run the load for `seconds` and return what the guest did, all vCPUs together.

    rate: accesses a second and vCPU (MMIO, port I/O and RAM alike), None for full speed.
    mix: what a round does; with None one of each kind of MMIO, port I/O and RAM access.
    flips: toggle a memslot at the hole so many times a second; then part of the MMIO becomes
    memory accesses, which nothing counts.
    Raises GuestError when KVM can't run the guest.
    """
    mix = mix or Mix()
    if rate is None:
        mix = mix.times(max(1, _BURST // max(1, mix.accesses)))
    interval = 0.0 if rate is None else mix.accesses / rate
    with ExitStack() as stack:
        machine = stack.enter_context(Machine())
        loads = prepare(machine, mix, vcpus)
        flipper = None
        if flips is not None:
            flipper = stack.enter_context(Flipper(machine.add_slot(1, HOLE, PAGE), flips))
        stop = threading.Event()
        with ThreadPoolExecutor(vcpus) as pool:
            futures = [pool.submit(_pace, load, seconds, interval, stop) for load in loads]
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()
    counts = sum((load.counts for load in loads), Counts())
    counts.memslot_changes = flipper.changes if flipper else 0
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load from the command line and print its counts; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kvmprobe.guests.load",
        description="Run a guest that does MMIO, port I/O and RAM accesses, and count them.",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="how long (default 2)")
    parser.add_argument(
        "--rate", type=float, help="accesses a second and vCPU; full speed if absent"
    )
    parser.add_argument("--vcpus", type=int, default=1, help=f"1 to {MAX_VCPUS} (default 1)")
    parser.add_argument(
        "--flips", type=float, help="toggle a memslot at the MMIO page, times a second"
    )
    for field in fields(Mix):
        option = "--" + field.name.replace("_", "-")
        what = "how often, or bytes, of one round"
        parser.add_argument(option, type=int, default=field.default, help=what)
    options = parser.parse_args(arguments)
    for name in ("seconds", "rate", "flips"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be above 0")
    mix = Mix(*(getattr(options, field.name) for field in fields(Mix)))
    started = time.monotonic()
    try:
        counts = run_load(
            options.seconds, options.rate, mix, vcpus=options.vcpus, flips=options.flips
        )
    except GuestError as error:
        print(f"load: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    elapsed = time.monotonic() - started
    print(f"pid {os.getpid()}")
    for name, value in asdict(counts).items():
        print(f"{name} {value}")
    print(f"exits_per_second {counts.exits / elapsed:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
