# SPDX-License-Identifier: MIT
"""A VMM that switches dirty logging on and off all the time, with a guest that does MMIO.

python -m kvmprobe.guests.storm --rate 150 --seconds 6
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm
from kvmprobe.guests.load import Mix, prepare
from kvmprobe.guests.vmm import PAGE, Machine

_LOGGED = 0x20000
#: Changes between two accesses of the guest: where SVM is emulated, accesses cost far more.
_CHANGES_A_ROUND = 16


def run(seconds: float, rate: float) -> list[int]:
    """Change a memslot's dirty-log flag `rate` times a second; the changes made in each second.

    The guest does one MMIO read and write after every 16th change, on the same thread.  A slow
    machine does fewer.  GuestError when KVM can't.
    """
    changes = [0]
    with Machine() as machine:
        (load,) = prepare(machine, Mix(mmio=1, pio=0, ram=0))
        slot = machine.add_slot(1, _LOGGED, PAGE)
        began = due = time.monotonic()
        done = 0
        while (now := time.monotonic()) < began + seconds:
            if now < due:
                time.sleep(due - now)
                continue
            due += 1 / rate
            slot.set_flags(0 if done % 2 else kvm.MEM_LOG_DIRTY_PAGES)
            if done % _CHANGES_A_ROUND == 0:
                load.round()
            done += 1
            while now - began >= len(changes):
                changes.append(0)
            changes[-1] += 1
    return changes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line and print the changes made in each second; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kvmprobe.guests.storm",
        description="Switch dirty logging on and off, and count how often in each second.",
    )
    parser.add_argument("--rate", type=float, default=150.0, help="changes a second (default 150)")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long (default 6)")
    options = parser.parse_args(arguments)
    print(f"vm storm {os.getpid()}")
    try:
        changes = run(options.seconds, options.rate)
    except GuestError as error:
        print(f"storm: {error}", file=sys.stderr)
        return error.exit_code
    print("changes", *changes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
