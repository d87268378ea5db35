# SPDX-License-Identifier: MIT
"""The part of KVM's ioctl interface that a tiny VMM needs: numbers, structs, clear errors.

Everything here restates the ABI of <linux/kvm.h> on x86-64, which never changes; a test compares it
with that header.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum
from pathlib import Path

from kvmprobe.errors import GuestError

DEVICE = Path("/dev/kvm")
API_VERSION = 12


class Segment(Structure):
    """struct kvm_segment."""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )
    base: int
    selector: int


class DescriptorTable(Structure):
    """struct kvm_dtable."""

    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class SpecialRegisters(Structure):
    """struct kvm_sregs."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", DescriptorTable),
        ("idt", DescriptorTable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment


class Registers(Structure):
    """struct kvm_regs."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    )
    rip: int
    rflags: int


class MemoryRegion(Structure):
    """struct kvm_userspace_memory_region."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int


_NONE, _WRITE, _READ = 0, 1, 2
_KVMIO = 0xAE


def _ioc(direction: int, number: int, size: int = 0) -> int:
    """Build an ioctl number as <asm-generic/ioctl.h> does on x86."""
    return direction << 30 | size << 16 | _KVMIO << 8 | number


GET_API_VERSION = _ioc(_NONE, 0x00)
CREATE_VM = _ioc(_NONE, 0x01)
GET_VCPU_MMAP_SIZE = _ioc(_NONE, 0x04)
# The size counts only the head of struct kvm_cpuid2, not the entries behind it.
GET_SUPPORTED_CPUID = _ioc(_READ | _WRITE, 0x05, 8)
CREATE_VCPU = _ioc(_NONE, 0x41)
SET_USER_MEMORY_REGION = _ioc(_WRITE, 0x46, ctypes.sizeof(MemoryRegion))
SET_TSS_ADDR = _ioc(_NONE, 0x47)
SET_IDENTITY_MAP_ADDR = _ioc(_WRITE, 0x48, 8)
CREATE_IRQCHIP = _ioc(_NONE, 0x60)
RUN = _ioc(_NONE, 0x80)
GET_REGS = _ioc(_READ, 0x81, ctypes.sizeof(Registers))
SET_REGS = _ioc(_WRITE, 0x82, ctypes.sizeof(Registers))
GET_SREGS = _ioc(_READ, 0x83, ctypes.sizeof(SpecialRegisters))
SET_SREGS = _ioc(_WRITE, 0x84, ctypes.sizeof(SpecialRegisters))
SET_CPUID2 = _ioc(_WRITE, 0x90, 8)
# The size counts only the length field of struct kvm_signal_mask, not the mask behind it.
SET_SIGNAL_MASK = _ioc(_WRITE, 0x8B, 4)

MEM_LOG_DIRTY_PAGES = 1 << 0
MEM_READONLY = 1 << 1


class ExitReason(IntEnum):
    """exit_reason of struct kvm_run, as far as these guests can cause it."""

    IO = 2
    HLT = 5
    MMIO = 6
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17


class RunOffset:
    """Byte offsets in struct kvm_run, which KVM shares with user space."""

    IMMEDIATE_EXIT = 1
    EXIT_REASON = 8
    ENTRY_FAILURE_REASON = 32
    IO_DIRECTION = 32
    IO_SIZE = 33
    IO_PORT = 34
    IO_COUNT = 36
    IO_DATA_OFFSET = 40
    MMIO_GPA = 32
    MMIO_DATA = 40
    MMIO_LEN = 48
    MMIO_IS_WRITE = 52
    INTERNAL_SUBERROR = 32


IO_IN = 0
IO_OUT = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)


def call(fd: int, request: int, argument: int | bytes | bytearray | Structure, what: str) -> int:
    """Make one ioctl and return its value; a struct is filled in place.

    Raises GuestError with `what` failed and why.
    """
    try:
        if isinstance(argument, int):
            # Not fcntl.ioctl: it takes no integer above 2^31, where the TSS address is.
            result: int = _libc.ioctl(fd, request, argument)
            if result < 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            return result
        fcntl.ioctl(fd, request, argument)
        return 0
    except OSError as error:
        raise GuestError(f"KVM can't {what}: {error.strerror}") from error


def open_device() -> int:
    """Open /dev/kvm and return the descriptor.

    Raises GuestError when KVM is not there, may not be used, or speaks another API.
    """
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise GuestError(
            f"{DEVICE} does not exist: load kvm_intel or kvm_amd, "
            "or turn on virtualization in the firmware"
        ) from None
    except PermissionError:
        raise GuestError(f"{DEVICE} may not be opened: run as root or join the group kvm") from None
    except OSError as error:
        hint = ": kvm is not loaded" if error.errno in (errno.ENODEV, errno.ENXIO) else ""
        raise GuestError(f"{DEVICE} can't be opened ({error.strerror}){hint}") from None
    try:
        version = call(fd, GET_API_VERSION, 0, "tell its API version")
        if version != API_VERSION:
            raise GuestError(f"{DEVICE} speaks API version {version}, not {API_VERSION}")
    except GuestError:
        os.close(fd)
        raise
    return fd
