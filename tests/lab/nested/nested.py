# SPDX-License-Identifier: MIT
"""Nested guests that touch a chosen gpa: run inside the lab's VM, one line a step.

    nested.py [--name NAME] [--target GPA] [--slot] [--nested-paging] … [VCPU:]STEP …

Steps of L1: load, store, string-out, string-in, forced-load, forced-sidt; of L2: l2-load, l2-store.
forced-…: with kvm.force_emulation_prefix=1.  Steps of the VMM: flags (the dirty-log flag of guest
memory changes, and so the memslot generation), slot (the internal slot is made only now), meet
(wait until another nested.py is there too), pause (say so in /tmp/ready, wait for /tmp/go), kill
(SIGKILL while the guest runs).
"""

import argparse
import fcntl
import os
import signal
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm
from kvmprobe.guests.nested import Guest
from kvmprobe.guests.vmm import TSS_ADDRESS, Machine

VMM_STEPS = ("flags", "slot", "meet", "pause", "kill")
LAB_SLOT_SET = 0xC018AEF0


def make_internal_slot(machine: Machine, gpa: int, size: int = 3 * 4096) -> None:
    """Have the lab's module make the slot that kvm_intel would make for its hidden TSS."""
    region = bytearray(struct.pack("<iIQQ", machine._fd, size, gpa, 0))
    with Path("/dev/lab_slot").open("rb") as device:
        fcntl.ioctl(device, LAB_SLOT_SET, region)


def wait_for(path: Path, files: int) -> None:
    """Wait until there are so many files with this path's name and any suffix."""
    deadline = time.monotonic() + 1800
    while len(list(path.parent.glob(path.name + "*"))) < files:
        if time.monotonic() > deadline:
            raise GuestError(f"nobody else came to {path}")
        time.sleep(0.05)


class Vmm:
    """The machine's own steps."""

    def __init__(self, machine: Machine, guest: Guest, target: int) -> None:
        self._machine, self._guest, self._target = machine, guest, target
        self._dirty_log = False
        self._meetings = 0

    def do(self, step: str) -> str:
        """Do one of VMM_STEPS; tell what was done."""
        match step:
            case "flags":
                self._dirty_log = not self._dirty_log
                self._guest.memory.set_flags(kvm.MEM_LOG_DIRTY_PAGES if self._dirty_log else 0)
                return "changed"
            case "slot":
                make_internal_slot(self._machine, self._target)
                return "made"
            case "meet":
                self._meetings += 1
                place = Path(f"/tmp/meet-{self._meetings}")
                place.with_suffix(f".{os.getpid()}").touch()
                wait_for(place, 2)
                return "met"
            case "pause":
                Path("/tmp/ready").touch()
                wait_for(Path("/tmp/go"), 1)
                return "over"
            case _:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
                return str(self._guest.do("spin"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="nested", help="printed with the process's id")
    parser.add_argument("--target", type=lambda text: int(text, 0), default=TSS_ADDRESS)
    parser.add_argument("--nested-paging", action="store_true", help="L2 on nested EPT or NPT")
    parser.add_argument("--slot", action="store_true", help="make the slot through /dev/lab_slot")
    parser.add_argument("--irqchip", action="store_true", help="KVM emulates the APIC")
    parser.add_argument("--vcpus", type=int, default=1, choices=(1, 2), help="a thread each")
    parser.add_argument("steps", nargs="+")
    arguments = parser.parse_args()
    print(f"vm {arguments.name} {os.getpid()}", flush=True)
    with Machine() as machine, ThreadPoolExecutor(1) as second_thread:
        if arguments.irqchip:
            machine.create_irqchip()
        guest = Guest(
            machine,
            target=arguments.target,
            nested_paging=arguments.nested_paging,
            vcpus=arguments.vcpus,
        )
        if arguments.slot:
            make_internal_slot(machine, arguments.target)
        # The guests share their scratch memory: they take turns, also in starting.
        guest.start()
        if arguments.vcpus > 1:
            second_thread.submit(guest.start, 1).result()
        vmm = Vmm(machine, guest, arguments.target)
        for step in arguments.steps:
            if step in VMM_STEPS:
                seen = vmm.do(step)
            elif step.startswith("1:"):
                seen = str(second_thread.submit(guest.do, step[2:], 1).result())
            else:
                seen = str(guest.do(step))
            print(f"{step}: {seen}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (GuestError, OSError) as error:
        print(f"nested: {error}", file=sys.stderr)
        sys.exit(1)
