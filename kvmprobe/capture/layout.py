# SPDX-License-Identifier: MIT
"""Where KVM keeps what the probes read: byte offsets from BTF, given to the C as definitions."""

from __future__ import annotations

from dataclasses import dataclass

from kvmprobe.errors import BtfError
from kvmprobe.host.btf import KernelBtf

#: C name of an offset -> (structure, dotted path of the member).
MEMBERS = {
    "OFF_VCPU_KVM": ("kvm_vcpu", "kvm"),
    "OFF_VCPU_ID": ("kvm_vcpu", "vcpu_id"),
    "OFF_VCPU_EXITS": ("kvm_vcpu", "stat.exits"),
    "OFF_VCPU_INSNS": ("kvm_vcpu", "stat.insn_emulation"),
    "OFF_VCPU_GUEST_MODE": ("kvm_vcpu", "stat.guest_mode"),
    "OFF_VCPU_PF_TAKEN": ("kvm_vcpu", "stat.pf_taken"),
    "OFF_VCPU_MMU": ("kvm_vcpu", "arch.mmu"),
    "OFF_VCPU_GUEST_MMU": ("kvm_vcpu", "arch.guest_mmu"),
    "OFF_VCPU_NESTED_MMU": ("kvm_vcpu", "arch.nested_mmu"),
    "OFF_VCPU_WALK_MMU": ("kvm_vcpu", "arch.walk_mmu"),
    "OFF_VCPU_MMIO_CACHE": ("kvm_vcpu", "arch.mmio_gva"),
    "OFF_VCPU_EMULATE_CTXT": ("kvm_vcpu", "arch.emulate_ctxt"),
    "OFF_CTXT_EIP": ("x86_emulate_ctxt", "eip"),
    "OFF_CTXT_INSN": ("x86_emulate_ctxt", "fetch.data"),
    "OFF_MMU_ROOT_ROLE": ("kvm_mmu", "root_role"),
    "OFF_KVM_MEMSLOTS": ("kvm", "memslots"),
    "OFF_KVM_CLOCK": ("kvm", "arch.kvmclock_offset"),
    "OFF_MEMSLOTS_GENERATION": ("kvm_memslots", "generation"),
    "OFF_MEMSLOTS_GFN_TREE": ("kvm_memslots", "gfn_tree"),
    "OFF_MEMSLOTS_ID_HASH": ("kvm_memslots", "id_hash"),
    "OFF_MEMSLOTS_NODE_IDX": ("kvm_memslots", "node_idx"),
    "OFF_SLOT_BASE_GFN": ("kvm_memory_slot", "base_gfn"),
    "OFF_SLOT_NPAGES": ("kvm_memory_slot", "npages"),
    "OFF_SLOT_FLAGS": ("kvm_memory_slot", "flags"),
    "OFF_SLOT_ID": ("kvm_memory_slot", "id"),
    "OFF_SLOT_GFN_NODE": ("kvm_memory_slot", "gfn_node"),
    "OFF_SLOT_ID_NODE": ("kvm_memory_slot", "id_node"),
    "OFF_RB_LEFT": ("rb_node", "rb_left"),
    "OFF_RB_RIGHT": ("rb_node", "rb_right"),
    "OFF_FAULT_GFN": ("kvm_page_fault", "gfn"),
    "OFF_FAULT_SLOT": ("kvm_page_fault", "slot"),
    "OFF_FAULT_PFN": ("kvm_page_fault", "pfn"),
    "OFF_TASK_GROUP_LEADER": ("task_struct", "group_leader"),
    "OFF_TASK_START_TIME": ("task_struct", "start_time"),
    "OFF_TASK_COMM": ("task_struct", "comm"),
}

#: Members that the C reads in one go with a neighbour: (structure, member, neighbour, bytes).
NEIGHBOURS = (
    ("kvm_vcpu", "arch.mmio_gva", "arch.mmio_access", 8),
    ("kvm_vcpu", "arch.mmio_gva", "arch.mmio_gfn", 16),
    ("kvm_vcpu", "arch.mmio_gva", "arch.mmio_gen", 24),
    ("kvm_vcpu", "stat.pf_taken", "stat.pf_fixed", 8),
    ("kvm_vcpu", "stat.pf_taken", "stat.pf_emulate", 16),
    ("kvm_vcpu", "stat.pf_taken", "stat.pf_spurious", 24),
    ("kvm_memory_slot", "base_gfn", "npages", 8),
    ("kvm_memory_slot", "id", "as_id", 2),
)

#: Counters that the C reads in one go, and at most so many bytes of a stack of 512.
_STAT = ("OFF_VCPU_EXITS", "OFF_VCPU_INSNS", "OFF_VCPU_GUEST_MODE")
_STAT_BYTES = 256
#: The same from arch.mmu to arch.root_mmu.root_role.
_MMU_BYTES = 128


@dataclass(frozen=True)
class Layout:
    """Definitions for the probes' C by name: byte offsets (OFF_), sizes (SIZE_), counts."""

    values: dict[str, int]

    def defines(self) -> str:
        """The definitions as C preprocessor lines."""
        return "".join(f"#define {name} {value}\n" for name, value in self.values.items())


def read_layout(btf: KernelBtf) -> Layout:
    """Derive the layout from a kernel's BTF.

    Raises:
        BtfError: a structure or member that the probes need is missing or lies otherwise than they
            read it; the message names it.

    """
    values = {name: btf.member(struct, path).offset for name, (struct, path) in MEMBERS.items()}
    for struct, first, second, distance in NEIGHBOURS:
        a, b = btf.member(struct, first), btf.member(struct, second)
        if b.offset - a.offset != distance:
            raise BtfError(
                f"struct {struct}: {second} is not {distance} bytes after {first}; "
                "this kernel's layout is not known to kvmprobe"
            )
    # Both nodes of a slot are arrays of two: one for the active and one for the inactive tree.
    values["SIZE_GFN_NODE"] = btf.member("kvm_memory_slot", "gfn_node").size // 2
    values["SIZE_ID_NODE"] = btf.member("kvm_memory_slot", "id_node").size // 2
    counters = [values[name] for name in _STAT]
    size = max(counters) + 8 - min(counters)
    if size > _STAT_BYTES:
        raise BtfError(
            "struct kvm_vcpu_stat: exits, insn_emulation and guest_mode are more than "
            f"{_STAT_BYTES} bytes apart; this kernel's layout is not known to kvmprobe"
        )
    values["OFF_VCPU_STAT"] = min(counters)
    values["SIZE_VCPU_STAT"] = size
    values["OFF_VCPU_ROOT_ROLE"] = btf.member("kvm_vcpu", "arch.root_mmu.root_role").offset
    size = values["OFF_VCPU_ROOT_ROLE"] + 4 - values["OFF_VCPU_MMU"]
    if not 8 < size <= _MMU_BYTES:
        raise BtfError(
            f"struct kvm_vcpu_arch: root_mmu.root_role is not within {_MMU_BYTES} bytes of mmu; "
            "this kernel's layout is not known to kvmprobe"
        )
    values["ADDRESS_SPACES"] = btf.member("kvm", "memslots").size // 8
    return Layout(values)
