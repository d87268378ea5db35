# SPDX-License-Identifier: MIT
"""A guest that goes in and out of system management mode (SMM), where it sees other memory.

python -m kvmprobe.guests.smm forward

KVM keeps one set of memslots for SMM (address space 1) and one for the rest (address space 0), but
one MMIO cache.  Each recipe is a row of accesses; a line for each says whether memory is there and
what the VMM saw.  They differ on a kernel with CVE-2026-99082, and nowhere else.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm
from kvmprobe.guests.vmm import Io, Machine, Mmio, Slot, Vcpu

CHECK_EXTENSION = 0xAE03
SMI = 0xAEB7
CAP_X86_SMM = 117
#: In struct kvm_run: `flags` (16 bits), and its bit for a vCPU in SMM.
RUN_FLAGS, RUN_IN_SMM = 14, 1

CODE = 0x1000
#: Where a vCPU begins in SMM after a reset: SMBASE 0x30000, offset 0x8000.
HANDLER = 0x38000
COMMAND, LOADED, ADDRESS, STRING = 0xE0, 0xE2, 0xE4, 0xE8
#: What the VMM answers to an MMIO read, to an INSB, and what the guest's stores write.
FROM_MMIO, FROM_PORT, STORED = 0xEE, 0x77, 0x5A

#: A slot number with this bit is of SMM's address space.
SMM_VIEW = 1 << 16
LOW_SIZE, SIZE = 0xA0000, 0x10000
LOW = 0x5000
X = 0xA0000  # memory in SMM only, as SMRAM behind the VGA window is
Y = 0xC0000  # memory outside SMM only
Z = 0xE0000  # memory nowhere at first, later in SMM only
HOLE = 0xF0000


class Access(IntEnum):
    """What the guest does; the values are smm.S's commands."""

    NOTHING = 0
    LOAD = 1
    STORE = 2
    STRING_OUT = 3
    STRING_IN = 4
    RSM = 5


@dataclass(frozen=True)
class Step:
    """One access at `gpa`, in SMM or not."""

    name: str
    smm: bool
    access: Access
    gpa: int


@dataclass(frozen=True)
class Change:
    """The VMM changes a memslot, and so the generation of that address space.

    `add` is a gpa where memory comes to be; else only a flag changes.
    """

    smm: bool
    add: int | None = None


_LOAD, _STORE = Access.LOAD, Access.STORE
_OUT, _IN = Access.STRING_OUT, Access.STRING_IN

RECIPES: dict[str, tuple[Step | Change, ...]] = {
    # Filled outside SMM, used in SMM.
    "forward": (
        Step("F1", True, _OUT, X),
        Step("F2", True, _LOAD, X),
        Step("F3", False, _LOAD, X),
        Step("F4", False, _OUT, X),
        Step("F5", True, _LOAD, X),
        Step("F6", True, _OUT, X),
        Step("F7", True, _IN, X + 0x10),
        Step("F8", True, _LOAD, X),
        Step("F9", True, _OUT, LOW),
        Step("F10", True, _OUT, X + 0x1000),
        Change(smm=True),
        Step("F11", True, _OUT, X),
        Change(smm=False),
        Step("F12", True, _OUT, X),
    ),
    # Filled in SMM, used outside.
    "reverse": (
        Step("V1", False, _OUT, Y),
        Step("V2", False, _LOAD, Y),
        Step("V3", True, _LOAD, Y),
        Step("V4", False, _LOAD, Y),
        Step("V5", False, _OUT, Y),
        Step("V6", False, _IN, Y + 0x10),
        Step("V7", False, _OUT, Y + 0x1000),
    ),
    # Filled and used in SMM, whose memslots changed between.
    "stale": (
        Step("S1", True, _LOAD, Z),
        Step("S2", True, _LOAD, Z),
        Change(smm=True, add=Z),
        Step("S3", True, _LOAD, Z),
        Step("S4", True, _OUT, Z),
        Step("S5", True, _STORE, Z + 0x10),
        Step("S6", False, _LOAD, Z),
        Change(smm=False),
        Step("S7", True, _LOAD, Z),
        Step("S8", True, _OUT, Z),
    ),
    # No memory in either: a hit of the wrong address space does no harm.
    "harmless": (
        Step("H1", False, _LOAD, HOLE),
        Step("H2", True, _OUT, HOLE),
        Step("H3", True, _LOAD, HOLE),
        Step("H4", False, _OUT, HOLE),
    ),
}


@dataclass(frozen=True)
class Result:
    """What became of a step: whether memory is there, and whether the access went to the VMM.

    began, ended: CLOCK_MONOTONIC, ns.
    """

    step: Step
    memory: bool
    mmio: bool
    began: int
    ended: int

    @property
    def wrong(self) -> bool:
        """Whether KVM took memory for MMIO, or the other way round."""
        return self.memory == self.mmio

    def __str__(self) -> str:
        mode = "SMM" if self.step.smm else "normal"
        what = f"{self.step.name} {mode} {self.step.access.name} {self.step.gpa:#x}"
        there = "memory" if self.memory else "hole"
        seen = "MMIO" if self.mmio else "memory"
        return f"{what} {there} {seen} {self.began} {self.ended}"


def supported() -> bool:
    """Whether this KVM has SMM (KVM_CAP_X86_SMM); GuestError when it can't tell."""
    device = kvm.open_device()
    try:
        what = "tell whether it has SMM"
        return bool(kvm.call(device, CHECK_EXTENSION, CAP_X86_SMM, what))
    finally:
        os.close(device)


class Guest:
    """The guest in a machine of its own, waiting for its first command outside SMM.

    Raises GuestError when this KVM has no SMM.
    """

    def __init__(self, machine: Machine) -> None:
        if not supported():
            raise GuestError("this KVM has no SMM (KVM_CAP_X86_SMM)")
        self._machine = machine
        machine.set_tss_addr()
        machine.set_identity_map_addr()
        code = Path(__file__).with_name("smm.bin").read_bytes()
        low = machine.add_slot(0, 0, LOW_SIZE)
        for start in (CODE, HANDLER):
            low.memory[start : start + len(code)] = code
        low.memory[LOW] = ord("R")
        address = ctypes.addressof(ctypes.c_char.from_buffer(low.memory))
        shared = kvm.MemoryRegion(SMM_VIEW, 0, 0, LOW_SIZE, address)
        kvm.call(machine._fd, kvm.SET_USER_MEMORY_REGION, shared, "create SMM's low memory")
        self._views: dict[bool, list[Slot]] = {False: [low], True: [low]}
        self.add_memory(smm=False, gpa=Y, fill=b"N")
        self.add_memory(smm=True, gpa=X, fill=b"S")
        self._vcpu = machine.add_vcpu()
        self._vcpu.start_at(CODE)
        _make_flat(self._vcpu)
        self._smm = False
        self._expect(ADDRESS)

    def add_memory(self, *, smm: bool, gpa: int, fill: bytes) -> None:
        """Create 64 KiB of memory full of `fill` at `gpa`, in one of the address spaces."""
        slots = self._views[smm]
        new = self._machine.add_slot(len(slots) | (SMM_VIEW if smm else 0), gpa, SIZE)
        new.memory[:] = fill * SIZE
        slots.append(new)

    def change(self, change: Change) -> None:
        """Change a memslot."""
        if change.add is not None:
            self.add_memory(smm=change.smm, gpa=change.add, fill=b"L")
        else:
            self._views[change.smm][1].set_flags(kvm.MEM_LOG_DIRTY_PAGES)

    def do(self, step: Step) -> Result:
        """Do one step; GuestError when the guest doesn't do as it was told."""
        began = time.monotonic_ns()
        self._switch(smm=step.smm)
        self._command(step.access, step.gpa)
        data: bytes | None = None  # a byte that tells where it came from
        mmio = False
        while True:
            match self._vcpu.step():
                case Io(port=port, is_write=False) if port == ADDRESS:
                    break
                case Io(port=port, is_write=False) if port == STRING:
                    self._vcpu.answer(bytes([FROM_PORT]))
                case Io(port=port) as out if port in (LOADED, STRING):
                    data = out.data
                case Mmio(gpa=gpa, is_write=is_write) if gpa == step.gpa:
                    mmio = True
                    if not is_write:
                        self._vcpu.answer(bytes([FROM_MMIO]))
                case other:
                    raise GuestError(f"the guest ended {step.name} with {other}")
        slot = self._slot(step)
        result = Result(step, slot is not None, mmio, began, time.monotonic_ns())
        self._check(result, slot, data)
        return result

    def _slot(self, step: Step) -> Slot | None:
        for slot in self._views[step.smm]:
            if slot.gpa <= step.gpa < slot.gpa + len(slot.memory):
                return slot
        return None

    def _check(self, result: Result, slot: Slot | None, data: bytes | None) -> None:
        """Compare the byte that was read, or memory after a write, with what the VMM saw."""
        step = result.step
        there = slot.memory[step.gpa - slot.gpa] if slot else None
        if step.access in (_LOAD, _OUT):
            right = data == bytes([FROM_MMIO if result.mmio else there or 0])
        else:
            written = FROM_PORT if step.access == _IN else STORED
            right = slot is None or (there == written) != result.mmio
        if not right:
            raise GuestError(f"{step.name}: memory holds {there}, the guest got {data!r}")

    def _switch(self, *, smm: bool) -> None:
        if smm == self._smm:
            return
        if smm:
            # The guest gets its address first, enters SMM then, and goes on with it after RSM.
            kvm.call(self._vcpu.fd, SMI, 0, "inject an SMI")
            self._vcpu.answer(bytes(4))
            self._smm = True
            self._expect(ADDRESS)
        else:
            self._command(Access.RSM, 0)
            self._smm = False
            self._expect(COMMAND)
            self._vcpu.answer(bytes([Access.NOTHING]))
            self._expect(ADDRESS)

    def _command(self, access: Access, gpa: int) -> None:
        self._vcpu.answer(struct.pack("<I", gpa))
        self._expect(COMMAND)
        self._vcpu.answer(bytes([access]))

    def _expect(self, port: int) -> None:
        """Run until the guest asks at `port`."""
        seen = self._vcpu.step()
        flags = self._vcpu.run_bytes[RUN_FLAGS]
        asked = isinstance(seen, Io) and seen.port == port and not seen.is_write
        if not asked or bool(flags & RUN_IN_SMM) != self._smm:
            raise GuestError(f"the guest went astray (SMM {self._smm}, flags {flags}): {seen}")


def _make_flat(vcpu: Vcpu) -> None:
    """Give data segments 4 GiB in real mode; SMM has that by itself."""
    sregs = kvm.SpecialRegisters()
    kvm.call(vcpu.fd, kvm.GET_SREGS, sregs, "read special registers")
    for name in ("ds", "es"):
        segment = getattr(sregs, name)
        segment.limit, segment.g = 0xFFFFFFFF, 1
    kvm.call(vcpu.fd, kvm.SET_SREGS, sregs, "set special registers")


def run(steps: Iterable[Step | Change]) -> list[Result]:
    """Do the steps in a fresh machine; GuestError when KVM can't."""
    results = []
    with Machine() as machine:
        guest = Guest(machine)
        for step in steps:
            if isinstance(step, Change):
                guest.change(step)
            else:
                results.append(guest.do(step))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one recipe from the command line and print a line for each step; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kvmprobe.guests.smm",
        description="Go in and out of SMM. A line a step: name, mode, access, gpa, what is there, "
        "what the VMM saw, begin and end (CLOCK_MONOTONIC, ns).",
    )
    parser.add_argument("recipe", choices=sorted(RECIPES))
    options = parser.parse_args(arguments)
    print(f"vm {options.recipe} {os.getpid()}")
    try:
        results = run(RECIPES[options.recipe])
    except GuestError as error:
        print(f"smm: {error}", file=sys.stderr)
        return error.exit_code
    for result in results:
        print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
