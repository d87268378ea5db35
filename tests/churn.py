# SPDX-License-Identifier: MIT
"""VMs that live for a moment: how does a watch stand thousands of them?

python -m tests.churn HOW VMS JOBS   make them; prints how many entered the guest

HOW is a key of `WAYS`.
"""

from __future__ import annotations

import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

from kvmprobe.guests.vmm import PAGE, Machine, Mmio

#: movb 0xf000, %al; hlt: one read of a hole.
_CODE = b"\xa0\x00\xf0\xf4"
_AT = 0x1000


def live_once() -> None:
    """One VM, from its first memslot over one MMIO access to its end."""
    with Machine() as machine:
        machine.add_slot(0, _AT, PAGE).memory[: len(_CODE)] = _CODE
        vcpu = machine.add_vcpu(0)
        vcpu.start_at(_AT)
        found = vcpu.step()
        if not isinstance(found, Mmio):
            raise AssertionError(f"no MMIO but {found}")


def in_a_process_each(vms: int) -> None:
    """So many VMs, one after the other, each in a process of its own."""
    for _ in range(vms):
        child = os.fork()
        if not child:
            try:
                live_once()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            raise AssertionError(f"a VM ended with {status}")


def in_one_process(vms: int) -> None:
    """So many VMs, one after the other, all in this process: KVM takes their memory again."""
    for _ in range(vms):
        live_once()


def at_once(vms: int) -> None:
    """So many VMs in this process, 16 at a time."""
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(live_once) for _ in range(vms)]:
            done.result()


WAYS = {"processes": in_a_process_each, "one-process": in_one_process, "at-once": at_once}


def main() -> None:
    """Make VMs."""
    way, vms, jobs = WAYS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        for done in [pool.submit(way, vms // jobs) for _ in range(jobs)]:
            done.result()
    print(vms // jobs * jobs)


if __name__ == "__main__":
    main()
