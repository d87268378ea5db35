# SPDX-License-Identifier: MIT
"""The words in which the model speaks of KVM: accesses, what becomes of them, cache, SPTEs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvmprobe.probes.schema import SLOT_APIC, SLOT_IDENTITY, SLOT_TSS

PFERR_PRESENT, PFERR_WRITE, PFERR_RSVD = 1, 2, 8
EXIT_MMIO = 6
L1_GVA, L2_GVA, L2_GPA = 1 << 44, 1 << 45, 1 << 36  #: where guests see L1's memory
EMPTY_SPTE = 1 << 63  #: since v6.8; 0 before

INTERNAL = (SLOT_TSS, SLOT_APIC, SLOT_IDENTITY)


class How(Enum):
    """How a guest reaches a page: only some ways ask the cache (kernel.md 2.3 and 8.2)."""

    PLAIN = "plain load or store"
    STRING = "OUTS or INS"
    FORCED = "forced emulation of a load or store"
    STD = "emulated, through read_std or write_std"


class Result(Enum):
    """What became of an access."""

    MEMORY = "memory"
    USERSPACE = "KVM_EXIT_MMIO"
    DEVICE = "a device in the kernel"
    FAILED = "the instruction faulted"


class Ret(Enum):
    """RET_PF_*, as far as it matters."""

    CONTINUE = 0
    RETRY = 1
    EMULATE = 2
    INVALID = 3
    FIXED = 4


@dataclass(frozen=True)
class Cache:
    """vcpu->arch.mmio_*."""

    gva: int = 0
    gfn: int = 0
    access: int = 0
    gen: int = 0


@dataclass(frozen=True)
class Spte:
    """A shadow-page table entry: memory, or MMIO of a generation."""

    gfn: int
    mmio: bool
    gen: int = 0
    writable: bool = True

    @property
    def value(self) -> int:
        """As KVM would write it: bit 11 is SPTE_MMU_PRESENT."""
        if self.mmio:
            return 0x8 << 48 | self.gfn << 12 | (self.gen & 0xFF) << 3
        return self.gfn << 12 | 0xA21 | self.writable << 1


@dataclass(frozen=True)
class Fate:
    """What else happens to an access, beyond its own doing."""

    stale: bool = False  # the first fault is retried after its fill: mmu_lock was lost
    device: bool = False  # a device in the kernel answers
    poisoned: bool = False  # the memory behind the slot can't be accessed
    invalidated: bool = False  # the first fault on memory is retried: its mapping changes (v6.8)


#: Nothing else happens.
PLAINLY = Fate()
