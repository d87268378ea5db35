# SPDX-License-Identifier: MIT
"""A tiny VMM: a machine with memory slots and real-mode vCPUs, and its exits decoded."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fcntl import ioctl
from types import TracebackType

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm
from kvmprobe.guests.kvm import ExitReason, RunOffset

PAGE = 4096
#: Where kvm_intel puts its hidden TSS (three pages) and its identity map (one page); other vendors
#: accept both and make nothing of them.
TSS_ADDRESS = 0xFFFBD000
IDENTITY_MAP_ADDRESS = 0xFFFBC000

_KICK = signal.SIGUSR1


@dataclass(frozen=True)
class Mmio:
    """The guest touched a gpa without usable memory; a read waits for `Vcpu.answer`."""

    gpa: int
    is_write: bool
    data: bytes


@dataclass(frozen=True)
class Io:
    """The guest did port I/O: `count` units of `size` bytes; IN waits for `Vcpu.answer`."""

    port: int
    is_write: bool
    size: int
    count: int
    data: bytes


@dataclass(frozen=True)
class Halt:
    """The guest executed HLT."""


@dataclass(frozen=True)
class Shutdown:
    """The guest took a triple fault."""


@dataclass(frozen=True)
class Interrupted:
    """`Vcpu.interrupt` or a signal ended the run."""


Exit = Mmio | Io | Halt | Shutdown | Interrupted


class Slot:
    """One memslot with its memory, which stays when the slot is deleted."""

    def __init__(self, vm_fd: int, slot: int, gpa: int, size: int, flags: int) -> None:
        self._vm_fd = vm_fd
        self.memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._region = kvm.MemoryRegion(slot, flags, gpa, size, address)
        self._gone = kvm.MemoryRegion(slot, 0, gpa, 0, address)

    @property
    def gpa(self) -> int:
        """Base gpa."""
        return self._region.guest_phys_addr

    def insert(self) -> None:
        """Create the slot; KVM calls that KVM_MR_CREATE.  GuestError when it overlaps another."""
        self._set(self._region, f"create memslot {self._region.slot}")

    def delete(self) -> None:
        """Delete the slot (KVM_MR_DELETE); `insert` brings it back with its contents."""
        self._set(self._gone, f"delete memslot {self._region.slot}")

    def move(self, gpa: int) -> None:
        """Move the slot to another base gpa (KVM_MR_MOVE)."""
        self._region.guest_phys_addr = gpa
        self._set(self._region, f"move memslot {self._region.slot}")

    def set_flags(self, flags: int) -> None:
        """Change the flags (KVM_MR_FLAGS_ONLY); KVM refuses to change MEM_READONLY."""
        self._region.flags = flags
        self._set(self._region, f"set the flags of memslot {self._region.slot}")

    def close(self) -> None:
        """Give the memory back."""
        self.memory.close()

    def _set(self, region: kvm.MemoryRegion, what: str) -> None:
        kvm.call(self._vm_fd, kvm.SET_USER_MEMORY_REGION, region, what)


class Vcpu:
    """One vCPU in real mode.  One thread at a time may `run` it."""

    def __init__(self, vm_fd: int, vcpu_id: int, run_size: int) -> None:
        self.id = vcpu_id
        with ExitStack() as undo:
            self.fd = kvm.call(vm_fd, kvm.CREATE_VCPU, vcpu_id, f"create vCPU {vcpu_id}")
            undo.callback(os.close, self.fd)
            self._map = mmap.mmap(self.fd, run_size)
            undo.pop_all()
        #: struct kvm_run as bytes and as 32-bit words, for callers that can't wait for `exit`.
        self.run_bytes = memoryview(self._map)
        self.run_words = self.run_bytes.cast("I")
        self._thread: int | None = None

    def start_at(self, rip: int, *, fs: int = 0) -> None:
        """Set real mode, flat at base 0, with `rip` (below 64 KiB); `fs` is the selector of FS."""
        sregs = kvm.SpecialRegisters()
        kvm.call(self.fd, kvm.GET_SREGS, sregs, "read special registers")
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
            segment.base = segment.selector = 0
        sregs.fs.selector, sregs.fs.base = fs, fs << 4
        kvm.call(self.fd, kvm.SET_SREGS, sregs, "set special registers")
        registers = kvm.Registers(rip=rip, rflags=2)  # bit 1 is always set
        kvm.call(self.fd, kvm.SET_REGS, registers, "set registers")

    def registers(self) -> kvm.Registers:
        """The general registers now."""
        registers = kvm.Registers()
        kvm.call(self.fd, kvm.GET_REGS, registers, "read registers")
        return registers

    def run(self) -> int:
        """Enter the guest once; the exit reason, INTR if a signal or `interrupt` ended it."""
        try:
            ioctl(self.fd, kvm.RUN)
        except InterruptedError:
            return ExitReason.INTR
        except OSError as error:
            raise GuestError(f"KVM can't run vCPU {self.id}: {error.strerror}") from error
        return self.run_words[RunOffset.EXIT_REASON // 4]

    def step(self) -> Exit:
        """Enter the guest once and decode the exit.

        Raises GuestError, with rip, for an exit after which the guest can't go on.
        """
        return self.decode(self.run())

    def decode(self, reason: int) -> Exit:
        """Decode the exit that `run` returned; GuestError if the guest can't go on."""
        run = self.run_bytes
        if reason == ExitReason.MMIO:
            (gpa,) = struct.unpack_from("Q", run, RunOffset.MMIO_GPA)
            (length,) = struct.unpack_from("I", run, RunOffset.MMIO_LEN)
            data = bytes(run[RunOffset.MMIO_DATA :][:length])
            return Mmio(gpa, bool(run[RunOffset.MMIO_IS_WRITE]), data)
        if reason == ExitReason.IO:
            direction, size, port, count, start = struct.unpack_from(
                "BBHIQ", run, RunOffset.IO_DIRECTION
            )
            data = bytes(run[start : start + size * count])
            return Io(port, direction == kvm.IO_OUT, size, count, data)
        if reason == ExitReason.HLT:
            return Halt()
        if reason == ExitReason.SHUTDOWN:
            return Shutdown()
        if reason == ExitReason.INTR:
            return Interrupted()
        raise GuestError(f"{self._failure(reason)} at rip {self.registers().rip:#x}")

    def answer(self, data: bytes) -> None:
        """Give the waiting MMIO read or IN its data, used at the next `run`."""
        if self.run_words[RunOffset.EXIT_REASON // 4] == ExitReason.MMIO:
            start = RunOffset.MMIO_DATA
        else:
            (start,) = struct.unpack_from("Q", self.run_bytes, RunOffset.IO_DATA_OFFSET)
        self.run_bytes[start : start + len(data)] = data

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let `interrupt`, called from another thread, end a `run` of this thread.

        The signal stays blocked outside the guest, and KVM unblocks it only while inside: so it
        needs no handler and can't come between a check and the entry.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {_KICK})
        try:
            inside = sum(1 << number - 1 for number in before - {_KICK})
            mask = struct.pack("=IQ", 8, inside)
            kvm.call(self.fd, kvm.SET_SIGNAL_MASK, mask, "set the signal mask")
            self._thread = threading.get_ident()
            yield
        finally:
            self._thread = None
            while signal.sigtimedwait({_KICK}, 0):
                pass
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def interrupt(self) -> None:
        """End the run of the thread that is inside `interruptible`, and every later one."""
        self.run_bytes[RunOffset.IMMEDIATE_EXIT] = 1
        if self._thread is not None:
            signal.pthread_kill(self._thread, _KICK)

    def close(self) -> None:
        """Give everything back; the vCPU itself goes with the last descriptor of its VM."""
        self.run_words.release()
        self.run_bytes.release()
        self._map.close()
        os.close(self.fd)

    def _failure(self, reason: int) -> str:
        if reason == ExitReason.INTERNAL_ERROR:
            (suberror,) = struct.unpack_from("I", self.run_bytes, RunOffset.INTERNAL_SUBERROR)
            return f"KVM had an internal error (suberror {suberror})"
        if reason == ExitReason.FAIL_ENTRY:
            (why,) = struct.unpack_from("Q", self.run_bytes, RunOffset.ENTRY_FAILURE_REASON)
            return f"KVM could not enter the guest (hardware reason {why:#x})"
        return f"the guest left with exit reason {reason}, which this VMM does not know,"


class Machine:
    """A VM.  As a context manager it leaves no descriptor and no mapping behind.

    Every `Vcpu.run` must have come back before `close`; GuestError when KVM refuses something.
    """

    def __init__(self) -> None:
        with ExitStack() as undo:
            self._kvm_fd = kvm.open_device()
            undo.callback(os.close, self._kvm_fd)
            self._run_size = kvm.call(
                self._kvm_fd, kvm.GET_VCPU_MMAP_SIZE, 0, "tell the size of struct kvm_run"
            )
            self._fd = kvm.call(self._kvm_fd, kvm.CREATE_VM, 0, "create a VM")
            self._undo = undo.pop_all()
        self._undo.callback(os.close, self._fd)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back vCPUs, memory and descriptors, last made first."""
        self._undo.close()

    def set_tss_addr(self, gpa: int = TSS_ADDRESS) -> None:
        """Tell kvm_intel where its hidden TSS goes; before the first vCPU."""
        kvm.call(self._fd, kvm.SET_TSS_ADDR, gpa, "set the TSS address")

    def set_identity_map_addr(self, gpa: int = IDENTITY_MAP_ADDRESS) -> None:
        """Tell kvm_intel where its identity map goes; before the first vCPU."""
        address = struct.pack("Q", gpa)
        kvm.call(self._fd, kvm.SET_IDENTITY_MAP_ADDR, address, "set the identity map address")

    def create_irqchip(self) -> None:
        """Have KVM emulate the interrupt controllers; before the first vCPU.

        kvm_intel then makes its memslot for the APIC access page, where the processor virtualizes
        APIC accesses.  HLT no longer comes back from `Vcpu.run`.
        """
        kvm.call(self._fd, kvm.CREATE_IRQCHIP, 0, "create the interrupt controllers")

    def add_slot(self, slot: int, gpa: int, size: int, flags: int = 0) -> Slot:
        """Create a memslot of `size` bytes of fresh zeroed memory at `gpa` (both whole pages)."""
        new = Slot(self._fd, slot, gpa, size, flags)
        self._undo.callback(new.close)
        new.insert()
        return new

    def add_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """Create a vCPU; `Vcpu.start_at` makes it ready."""
        vcpu = Vcpu(self._fd, vcpu_id, self._run_size)
        self._undo.callback(vcpu.close)
        return vcpu
