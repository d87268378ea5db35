# SPDX-License-Identifier: MIT
"""A guest hypervisor (L1) and its guest (L2), which touch a chosen gpa.

L1 and L2 share 2 MiB of memory at gpa 0 and page tables that map 4 GiB onto itself.  L2 runs on
L1's page tables, or on nested EPT or NPT with tables of its own.  Needs a KVM that lets guests
nest.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm
from kvmprobe.guests.vmm import Io, Machine, Mmio, Slot, Vcpu

MEMORY = 2 << 20
CODE, TARGET, IS_AMD, FIELDS, VMCB = 0x1000, 0x2000, 0x2008, 0x3000, 0x6000
GUEST_TABLES, NESTED_TABLES = 0x10000, 0x20000
COMMAND, LOADED, STRING_OUT, STRING_IN, FAILED = 0x10, 0x11, 0x12, 0x13, 0x1F
#: What the guest can be told to do.  forced-…: with kvm.force_emulation_prefix=1.  spin never ends.
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
#: What the VMM answers to an MMIO read and to INSB: tells where the data came from.
FROM_MMIO, FROM_PORT = 0xEE, 0x77

_CR0 = 0x80000031  # PG, NE, ET, PE
_CR4_INTEL, _CR4_AMD = 0x2020, 0x20  # PAE, and VMXE
_EFER_INTEL, _EFER_AMD = 0x500, 0x1500  # LME, LMA, and SVME

_CPUID_ENTRIES = 256
# Leaf, index of the register in struct kvm_cpuid_entry2 (ECX), bit: cpufeatures.h's VMX and SVM.
_VMX, _SVM = (0x1, 5), (0x80000001, 2)


@dataclass(frozen=True)
class Account:
    """What the VMM saw of one command; `got` is the byte that a load or an OUTS gave."""

    mmio: tuple[Mmio, ...]
    got: int | None

    def __str__(self) -> str:
        seen = [
            f"MMIO {'write' if exit.is_write else 'read'} {exit.gpa:#x} {len(exit.data)} bytes"
            for exit in self.mmio
        ]
        if self.got is not None:
            seen.append(f"got {self.got:#04x}")
        return ", ".join(seen) or "no exit"


def supported_cpuid() -> bytearray:
    """All CPUID leaves that KVM supports, VMX or SVM with them, as a struct kvm_cpuid2.

    Raises GuestError when /dev/kvm can't be used.
    """
    leaves = bytearray(struct.pack("<II", _CPUID_ENTRIES, 0) + bytes(_CPUID_ENTRIES * 40))
    device = kvm.open_device()
    try:
        kvm.call(device, kvm.GET_SUPPORTED_CPUID, leaves, "tell which CPUID it supports")
    finally:
        os.close(device)
    return leaves


def nests() -> str | None:
    """Whose virtualization this KVM offers its guests: "intel" (VMX), "amd" (SVM) or None.

    What counts is KVM_GET_SUPPORTED_CPUID: vmx_set_cpu_caps() and svm_set_cpu_caps() have the bit
    only with nested=1.  Raises GuestError when /dev/kvm can't be used.
    """
    leaves = supported_cpuid()
    (count,) = struct.unpack_from("<I", leaves)
    ecx = {
        function: ecx
        for function, _index, _flags, _eax, _ebx, ecx, _edx, *_ in (
            struct.unpack_from("<10I", leaves, 8 + 40 * n) for n in range(count)
        )
        if function in (_VMX[0], _SVM[0])
    }
    for name, (leaf, bit) in (("intel", _VMX), ("amd", _SVM)):
        if ecx.get(leaf, 0) >> bit & 1:
            return name
    return None


class Guest:
    """L1 with its L2 in a machine of its own; each vCPU does `start` first, then commands.

    target: the gpa that every command touches.  The vCPUs share their scratch memory: they take
    turns, also in starting.  On Intel the machine has its hidden TSS and identity map where vmm.py
    says.  Raises GuestError when this KVM offers no nesting.
    """

    def __init__(
        self, machine: Machine, *, target: int, nested_paging: bool = False, vcpus: int = 1
    ) -> None:
        vendor = nests()
        if vendor is None:
            raise GuestError("this KVM offers its guests neither VMX nor SVM (nested is off)")
        self._amd = vendor == "amd"
        self.memory = machine.add_slot(0, 0, MEMORY)
        if not self._amd:
            machine.set_identity_map_addr()
            machine.set_tss_addr()
        _identity_map(self.memory, GUEST_TABLES, upper=0x27, leaf=0xE7)
        if self._amd:
            _identity_map(self.memory, NESTED_TABLES, upper=0x27, leaf=0xE7)
        else:
            _identity_map(self.memory, NESTED_TABLES, upper=0x7, leaf=0xB7)
        memory = self.memory.memory
        code = Path(__file__).with_name("nested.bin").read_bytes()
        memory[CODE : CODE + len(code)] = code
        struct.pack_into("<QQ", memory, TARGET, target, self._amd)
        fields = _vmcs_fields(nested_paging=nested_paging)
        memory[FIELDS : FIELDS + len(fields)] = fields
        memory[VMCB : VMCB + 4096] = _vmcb(nested_paging=nested_paging)
        self._vcpus = [machine.add_vcpu(n) for n in range(vcpus)]

    def start(self, vcpu: int = 0) -> None:
        """Bring a vCPU to where it waits for its first command; GuestError when it can't."""
        fd = self._vcpus[vcpu].fd
        kvm.call(fd, kvm.SET_CPUID2, supported_cpuid(), "set the guest's CPUID")
        _enter_long_mode(self._vcpus[vcpu], amd=self._amd)
        first = self._vcpus[vcpu].step()
        if not (isinstance(first, Io) and first.port == COMMAND):
            raise GuestError(f"the guest didn't start: {first}")

    def do(self, command: str, vcpu: int = 0) -> Account:
        """Let a vCPU do one of COMMANDS; tell what the VMM saw of it.

        Raises GuestError when the guest gave up or went astray.
        """
        cpu = self._vcpus[vcpu]
        cpu.answer(bytes([COMMANDS[command]]))
        mmio: list[Mmio] = []
        got = None
        while True:
            match cpu.step():
                case Io(port=port, is_write=False) if port == COMMAND:
                    return Account(tuple(mmio), got)
                case Io(port=port, is_write=False) if port == STRING_IN:
                    cpu.answer(bytes([FROM_PORT]))
                case Io(port=port, data=data) if port == FAILED:
                    raise GuestError(f"the guest gave up at {command}: {data[::-1].hex()}")
                case Io(port=port, data=data) if port in (LOADED, STRING_OUT):
                    got = data[0]
                case Io():
                    pass
                case Mmio() as seen:
                    mmio.append(seen)
                    if not seen.is_write:
                        cpu.answer(bytes([FROM_MMIO] * len(seen.data)))
                case other:
                    raise GuestError(f"the guest ended at {command} with {other}")


def _identity_map(memory: Slot, base: int, *, upper: int, leaf: int) -> None:
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


def _vmcs_fields(*, nested_paging: bool) -> bytes:
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
    fields += [(0x6800, 0, _CR0), (0x6802, 0, GUEST_TABLES), (0x6804, 0, _CR4_INTEL)]
    fields += [(0x681A, 0, 0x400), (0x681C, 0, 0xA000), (0x6820, 0, 2)]
    fields += [(field, 0, 0) for field in (0x6822, 0x6824, 0x6826)]
    # Host state.
    fields += [(0xC00, 0, 0x10), (0xC02, 0, 8), (0xC04, 0, 0x10), (0xC06, 0, 0x10)]
    fields += [(0xC08, 0, 0), (0xC0A, 0, 0), (0xC0C, 0, 0x18), (0x4C00, 0, 0)]
    fields += [(0x6C00, 0, _CR0), (0x6C02, 0, GUEST_TABLES), (0x6C04, 0, _CR4_INTEL)]
    fields += [(field, 0, 0) for field in range(0x6C06, 0x6C14, 2)]
    return b"".join(struct.pack("<IIQ", *field) for field in fields) + bytes(16)


def _vmcb(*, nested_paging: bool) -> bytes:
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
        (0x4D0, _EFER_AMD),
        (0x548, _CR4_AMD),
        (0x550, GUEST_TABLES),
        (0x558, _CR0),
        (0x570, 2),
        (0x5D8, 0xA000),
        (0x668, 0x0007040600070406),
    ):
        struct.pack_into("<Q", block, offset, value)
    return bytes(block)


def _enter_long_mode(vcpu: Vcpu, *, amd: bool) -> None:
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
    sregs.cr0, sregs.cr3 = _CR0, GUEST_TABLES
    sregs.cr4 = _CR4_AMD if amd else _CR4_INTEL
    sregs.efer = _EFER_AMD if amd else _EFER_INTEL
    kvm.call(vcpu.fd, kvm.SET_SREGS, sregs, "set special registers")
    kvm.call(vcpu.fd, kvm.SET_REGS, kvm.Registers(rip=CODE, rflags=2), "set registers")


def _fill(segment: ctypes.Structure, values: dict[str, int]) -> None:
    for name, value in values.items():
        setattr(segment, name, value)
