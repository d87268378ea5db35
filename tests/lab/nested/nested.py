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
import ctypes
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
from kvmprobe.guests.vmm import Halt, Io, Machine, Mmio, Slot, Vcpu

MEMORY = 2 << 20
CODE, TARGET, IS_AMD, FIELDS, VMCB = 0x1000, 0x2000, 0x2008, 0x3000, 0x6000
GUEST_TABLES, NESTED_TABLES = 0x10000, 0x20000
COMMAND, LOADED, STRING_OUT, STRING_IN, FAILED = 0x10, 0x11, 0x12, 0x13, 0x1F
COMMANDS = {
    "load": 1,
    "store": 2,
    "string-out": 3,
    "string-in": 4,
    "forced-load": 5,
    "l2-load": 6,
    "l2-store": 7,
    "spin": 8,
    "forced-sidt": 9,
}
VMM_STEPS = ("flags", "slot", "meet", "pause", "kill")
#: What the VMM answers to an MMIO read and to INSB: tells where the data came from.
FROM_MMIO, FROM_PORT = 0xEE, 0x77

CR0 = 0x80000031  # PG, NE, ET, PE
CR4_INTEL, CR4_AMD = 0x2020, 0x20  # PAE, and VMXE
EFER_INTEL, EFER_AMD = 0x500, 0x1500  # LME, LMA, and SVME

GET_SUPPORTED_CPUID = 0xC008AE05
SET_CPUID2 = 0x4008AE90
LAB_SLOT_SET = 0xC018AEF0


def identity_map(memory: Slot, base: int, *, upper: int, leaf: int) -> None:
    """Write tables that map 4 GiB onto itself in 2 MiB pages.

    Accessed and dirty are set in advance: KVM write-protects tables that it shadows, and a
    processor that had to set them would fault there.
    """
    target = memory.memory
    struct.pack_into("<Q", target, base, base + 0x1000 | upper)
    for quarter in range(4):
        directory = base + 0x2000 + quarter * 0x1000
        struct.pack_into("<Q", target, base + 0x1000 + quarter * 8, directory | upper)
        pages = (quarter << 30 | page << 21 | leaf for page in range(512))
        struct.pack_into("<512Q", target, directory, *pages)


def vmcs_fields(*, nested_paging: bool) -> bytes:
    """Return the list of VMCS fields: L1's state as host, long mode on L1's tables as guest."""
    fields: list[tuple[int, int, int]] = [
        (0x4000, 0x481, 0),
        (0x4002, 0x482, (1 << 31) if nested_paging else 0),
        (0x400C, 0x483, 1 << 9),  # the host is 64-bit
        (0x4012, 0x484, 1 << 9),  # the guest is in IA-32e mode
        (0x2800, 0, (1 << 64) - 1),  # no shadow VMCS
    ]
    if nested_paging:
        fields += [(0x401E, 0x48B, 1 << 1), (0x201A, 0, NESTED_TABLES | 0x1E)]
    zeros = [0x4004, 0x4006, 0x4008, 0x400A, 0x400E, 0x4010, 0x4014, 0x4016]
    zeros += [0x6000, 0x6002, 0x6004, 0x6006]
    fields += [(field, 0, 0) for field in zeros]
    # Guest segments: ES, CS, SS, DS, FS, GS, LDTR, TR.
    selectors = (0x10, 0x08, 0x10, 0x10, 0, 0, 0, 0x18)
    rights = (0xC093, 0xA09B, 0xC093, 0xC093, 0x10000, 0x10000, 0x10000, 0x8B)
    for number, (selector, right) in enumerate(zip(selectors, rights, strict=True)):
        limit = 0x67 if number == 7 else 0xFFFFFFFF
        fields += [
            (0x800 + 2 * number, 0, selector),
            (0x4800 + 2 * number, 0, limit),
            (0x4814 + 2 * number, 0, right),
            (0x6806 + 2 * number, 0, 0),
        ]
    fields += [(0x4810, 0, 0xFFFF), (0x4812, 0, 0xFFFF), (0x6816, 0, 0), (0x6818, 0, 0)]
    fields += [(field, 0, 0) for field in (0x4824, 0x4826, 0x482A, 0x2802)]
    fields += [(0x6800, 0, CR0), (0x6802, 0, GUEST_TABLES), (0x6804, 0, CR4_INTEL)]
    fields += [(0x681A, 0, 0x400), (0x681C, 0, 0xA000), (0x6820, 0, 2)]
    fields += [(field, 0, 0) for field in (0x6822, 0x6824, 0x6826)]
    # Host state.
    fields += [(0xC00, 0, 0x10), (0xC02, 0, 8), (0xC04, 0, 0x10), (0xC06, 0, 0x10)]
    fields += [(0xC08, 0, 0), (0xC0A, 0, 0), (0xC0C, 0, 0x18), (0x4C00, 0, 0)]
    fields += [(0x6C00, 0, CR0), (0x6C02, 0, GUEST_TABLES), (0x6C04, 0, CR4_INTEL)]
    fields += [(field, 0, 0) for field in range(0x6C06, 0x6C14, 2)]
    return b"".join(struct.pack("<IIQ", *field) for field in fields) + bytes(16)


def vmcb(*, nested_paging: bool) -> bytes:
    """Return a VMCB for long mode on L1's tables that exits on VMMCALL."""
    block = bytearray(4096)
    struct.pack_into("<I", block, 0x010, 3)  # intercept VMRUN (it must be) and VMMCALL
    struct.pack_into("<I", block, 0x058, 1)  # ASID
    if nested_paging:
        struct.pack_into("<Q", block, 0x090, 1)
        struct.pack_into("<Q", block, 0x0B0, NESTED_TABLES)
    data, code = (0x10, 0xC93, 0xFFFFFFFF, 0), (0x08, 0xA9B, 0xFFFFFFFF, 0)
    for offset, segment in ((0x400, data), (0x410, code), (0x420, data), (0x430, data)):
        struct.pack_into("<HHIQ", block, offset, *segment)
    struct.pack_into("<HHIQ", block, 0x490, 0x18, 0x8B, 0x67, 0)  # TR
    for offset, value in (
        (0x4D0, EFER_AMD),
        (0x548, CR4_AMD),
        (0x550, GUEST_TABLES),
        (0x558, CR0),
        (0x570, 2),
        (0x5D8, 0xA000),
        (0x668, 0x0007040600070406),
    ):
        struct.pack_into("<Q", block, offset, value)
    return bytes(block)


def set_cpuid(vcpu: Vcpu) -> None:
    """Give the guest all that KVM supports, VMX and SVM with it."""
    leaves = bytearray(struct.pack("<II", 256, 0) + bytes(256 * 40))
    device = kvm.open_device()
    fcntl.ioctl(device, GET_SUPPORTED_CPUID, leaves)
    fcntl.ioctl(vcpu.fd, SET_CPUID2, leaves)


def enter_long_mode(vcpu: Vcpu, *, amd: bool) -> None:
    """Put the vCPU at CODE in 64-bit mode on GUEST_TABLES, ready for VMXON or VMRUN."""
    sregs = kvm.SpecialRegisters()
    kvm.call(vcpu.fd, kvm.GET_SREGS, sregs, "read special registers")
    flat = {"base": 0, "limit": 0xFFFFFFFF, "present": 1, "dpl": 0, "s": 1, "g": 1, "unusable": 0}
    for name in ("ds", "es", "ss", "fs", "gs"):
        values = flat | {"selector": 0x10, "type": 3, "db": 1, "l": 0}
        _fill(getattr(sregs, name), values)
    _fill(sregs.cs, flat | {"selector": 8, "type": 11, "db": 0, "l": 1})
    task = {"base": 0, "limit": 0x67, "selector": 0x18, "type": 11, "present": 1, "s": 0, "g": 0}
    _fill(sregs.tr, task)
    sregs.cr0, sregs.cr3 = CR0, GUEST_TABLES
    sregs.cr4 = CR4_AMD if amd else CR4_INTEL
    sregs.efer = EFER_AMD if amd else EFER_INTEL
    kvm.call(vcpu.fd, kvm.SET_SREGS, sregs, "set special registers")
    kvm.call(vcpu.fd, kvm.SET_REGS, kvm.Registers(rip=CODE, rflags=2), "set registers")


def _fill(segment: ctypes.Structure, values: dict[str, int]) -> None:
    for name, value in values.items():
        setattr(segment, name, value)


def make_internal_slot(machine: Machine, gpa: int, size: int = 3 * 4096) -> None:
    """Have the lab's module make the slot that kvm_intel would make for its hidden TSS."""
    region = bytearray(struct.pack("<iIQQ", machine._fd, size, gpa, 0))
    with Path("/dev/lab_slot").open("rb") as device:
        fcntl.ioctl(device, LAB_SLOT_SET, region)


def do_step(vcpu: Vcpu, step: str) -> str:
    """Let the guest, which waits for a command, do one; tell what the VMM saw of it."""
    vcpu.answer(bytes([COMMANDS[step]]))
    seen: list[str] = []
    while True:
        match vcpu.step():
            case Io(port=port, is_write=False) if port == COMMAND:
                return ", ".join(seen) or "no exit"
            case Io(port=port, is_write=False) if port == STRING_IN:
                vcpu.answer(bytes([FROM_PORT]))
            case Io(port=port, data=data) if port == FAILED:
                raise GuestError(f"the guest gave up at {step}: {data[::-1].hex()}")
            case Io(port=port, data=data) if port in (LOADED, STRING_OUT):
                seen.append(f"got {data[0]:#04x}")
            case Io():
                pass
            case Mmio(gpa=gpa, is_write=is_write, data=data):
                kind = "write" if is_write else "read"
                seen.append(f"MMIO {kind} {gpa:#x} {len(data)} bytes")
                if not is_write:
                    vcpu.answer(bytes([FROM_MMIO] * len(data)))
            case Halt() | _ as other:
                raise GuestError(f"the guest ended at {step} with {other}")


def start(vcpu: Vcpu, *, amd: bool) -> None:
    """Bring the guest to where it waits for its first command."""
    set_cpuid(vcpu)
    enter_long_mode(vcpu, amd=amd)
    first = vcpu.step()
    if not (isinstance(first, Io) and first.port == COMMAND):
        raise GuestError(f"the guest didn't start: {first}")


def wait_for(path: Path, files: int) -> None:
    """Wait until there are so many files with this path's name and any suffix."""
    deadline = time.monotonic() + 300
    while len(list(path.parent.glob(path.name + "*"))) < files:
        if time.monotonic() > deadline:
            raise GuestError(f"nobody else came to {path}")
        time.sleep(0.05)


class Vmm:
    """The machine's own steps."""

    def __init__(self, machine: Machine, memory: Slot, vcpu: Vcpu, target: int) -> None:
        self._machine, self._memory, self._vcpu, self._target = machine, memory, vcpu, target
        self._dirty_log = False
        self._meetings = 0

    def do(self, step: str) -> str:
        """Do one of VMM_STEPS; tell what was done."""
        match step:
            case "flags":
                self._dirty_log = not self._dirty_log
                self._memory.set_flags(kvm.MEM_LOG_DIRTY_PAGES if self._dirty_log else 0)
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
                return do_step(self._vcpu, "spin")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="nested", help="printed with the process's id")
    parser.add_argument("--target", type=lambda text: int(text, 0), default=0xFFFBD000)
    parser.add_argument("--nested-paging", action="store_true", help="L2 on nested EPT or NPT")
    parser.add_argument("--slot", action="store_true", help="make the slot through /dev/lab_slot")
    parser.add_argument("--irqchip", action="store_true", help="KVM emulates the APIC")
    parser.add_argument("--vcpus", type=int, default=1, choices=(1, 2), help="a thread each")
    parser.add_argument("steps", nargs="+")
    arguments = parser.parse_args()
    print(f"vm {arguments.name} {os.getpid()}", flush=True)
    amd = Path("/sys/module/kvm_amd").exists()
    with Machine() as machine, ThreadPoolExecutor(1) as second_thread:
        if arguments.irqchip:
            machine.create_irqchip()
        memory = machine.add_slot(0, 0, MEMORY)
        if not amd:
            machine.set_identity_map_addr()
            machine.set_tss_addr()
        identity_map(memory, GUEST_TABLES, upper=0x27, leaf=0xE7)
        if amd:
            identity_map(memory, NESTED_TABLES, upper=0x27, leaf=0xE7)
        else:
            identity_map(memory, NESTED_TABLES, upper=0x7, leaf=0xB7)
        code = Path(__file__).with_name("nested.bin").read_bytes()
        memory.memory[CODE : CODE + len(code)] = code
        struct.pack_into("<QQ", memory.memory, TARGET, arguments.target, amd)
        fields = vmcs_fields(nested_paging=arguments.nested_paging)
        memory.memory[FIELDS : FIELDS + len(fields)] = fields
        memory.memory[VMCB : VMCB + 4096] = vmcb(nested_paging=arguments.nested_paging)
        vcpus = [machine.add_vcpu(n) for n in range(arguments.vcpus)]
        if arguments.slot:
            make_internal_slot(machine, arguments.target)
        # The guests share their scratch memory: they take turns, also in starting.
        start(vcpus[0], amd=amd)
        for vcpu in vcpus[1:]:
            second_thread.submit(start, vcpu, amd=amd).result()
        vmm = Vmm(machine, memory, vcpus[0], arguments.target)
        for step in arguments.steps:
            if step in VMM_STEPS:
                seen = vmm.do(step)
            elif step.startswith("1:"):
                seen = second_thread.submit(do_step, vcpus[1], step[2:]).result()
            else:
                seen = do_step(vcpus[0], step)
            print(f"{step}: {seen}", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (GuestError, OSError) as error:
        print(f"nested: {error}", file=sys.stderr)
        sys.exit(1)
