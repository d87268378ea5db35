# SPDX-License-Identifier: MIT
"""A guest with page tables that the VMM changes behind KVM's back.

python -m kvmprobe.guests.overwrite present

The guest loads from a page that its page table maps read-only to memory: shadow paging (npt=0 or
ept=0) then has a present SPTE.  The VMM makes the table name a hole, and the guest stores: KVM
writes an MMIO SPTE over the present one (CVE-2026-23401).  "control" leaves out the load.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm
from kvmprobe.guests.vmm import PAGE, Exit, Io, Machine, Mmio, Slot, Vcpu

CODE, DATA = 0x1000, 0x30000
DIRECTORY, LOW_TABLE, HIGH_TABLE = 0x10000, 0x11000, 0x12000
MEMORY = 0x80000
HOLE = 0xE0000
COMMAND, LOADED = 0xE0, 0xE2
LOAD, STORE = 1, 2
CR0 = 0x80010031  # PG, WP, NE, ET, PE

# Accessed and dirty are set in advance: the processor has nothing to write into the tables.
_WRITABLE = 0x67  # dirty, accessed, user, writable, present
_READ_ONLY = 0x65

RECIPES = ("present", "control")


class Guest:
    """The guest in a machine of its own, waiting for its first command."""

    def __init__(self, machine: Machine) -> None:
        machine.set_tss_addr()
        machine.set_identity_map_addr()
        self._memory = machine.add_slot(0, 0, MEMORY)
        code = Path(__file__).with_name("overwrite.bin").read_bytes()
        self._memory.memory[CODE : CODE + len(code)] = code
        self._memory.memory[DATA] = ord("R")
        _make_tables(self._memory)
        self._vcpu = machine.add_vcpu()
        _start_paged(self._vcpu)
        self._wait(self._vcpu.step())

    def change_table(self) -> None:
        """Let the guest's page name the hole, writable; KVM doesn't see that."""
        struct.pack_into("<I", self._memory.memory, HIGH_TABLE, HOLE | _WRITABLE)

    def load(self) -> bytes:
        """Let the guest load; the byte it got from memory.  GuestError if it was MMIO."""
        self._vcpu.answer(bytes([LOAD]))
        seen = self._vcpu.step()
        if not (isinstance(seen, Io) and seen.port == LOADED):
            raise GuestError(f"the guest's load ended with {seen}")
        self._wait(self._vcpu.step())
        return seen.data

    def store(self) -> int:
        """Let the guest store; the gpa where it was MMIO.  GuestError if it was not."""
        self._vcpu.answer(bytes([STORE]))
        seen = self._vcpu.step()
        if not (isinstance(seen, Mmio) and seen.is_write):
            raise GuestError(f"the guest's store ended with {seen}")
        self._wait(self._vcpu.step())
        return seen.gpa

    def _wait(self, seen: Exit) -> None:
        if not (isinstance(seen, Io) and seen.port == COMMAND):
            raise GuestError(f"the guest went astray: {seen}")


def _make_tables(memory: Slot) -> None:
    """Map the guest's memory onto itself, and va 0x400000 read-only to DATA."""
    struct.pack_into("<2I", memory.memory, DIRECTORY, LOW_TABLE | _WRITABLE, HIGH_TABLE | _WRITABLE)
    pages = (gpa | _WRITABLE for gpa in range(0, MEMORY, PAGE))
    struct.pack_into(f"<{MEMORY // PAGE}I", memory.memory, LOW_TABLE, *pages)
    struct.pack_into("<I", memory.memory, HIGH_TABLE, DATA | _READ_ONLY)


def _start_paged(vcpu: Vcpu) -> None:
    """Put the vCPU at CODE in 32-bit protected mode with paging."""
    sregs = kvm.SpecialRegisters()
    kvm.call(vcpu.fd, kvm.GET_SREGS, sregs, "read special registers")
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base, segment.limit, segment.g = 0, 0xFFFFFFFF, 1
        segment.present = segment.s = segment.db = 1
        segment.selector, segment.type = (8, 11) if name == "cs" else (16, 3)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0, DIRECTORY, 0, 0
    kvm.call(vcpu.fd, kvm.SET_SREGS, sregs, "set special registers")
    kvm.call(vcpu.fd, kvm.SET_REGS, kvm.Registers(rip=CODE, rflags=2), "set registers")


def run(recipe: str) -> list[str]:
    """Run one of RECIPES in a fresh machine; a line for each access.  GuestError when KVM can't."""
    lines = []
    with Machine() as machine:
        guest = Guest(machine)
        if recipe == "present":
            lines.append(f"P1 LOAD {DATA:#x} memory {guest.load()[0]:#x}")
        guest.change_table()
        lines.append(f"P2 STORE {guest.store():#x} hole MMIO")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one recipe from the command line and print a line for each access; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kvmprobe.guests.overwrite",
        description="Change a guest's page table behind KVM's back. Needs shadow paging to show.",
    )
    parser.add_argument("recipe", choices=RECIPES)
    options = parser.parse_args(arguments)
    print(f"vm {options.recipe} {os.getpid()}")
    try:
        lines = run(options.recipe)
    except GuestError as error:
        print(f"overwrite: {error}", file=sys.stderr)
        return error.exit_code
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
