# SPDX-License-Identifier: MIT
"""Every place in the kernel where an observation can be made, and what it takes to use it."""

from __future__ import annotations

from dataclasses import dataclass

from kvmprobe.probes.schema import Site, Type

_VCPU = "struct kvm_vcpu *"
_FAULT = "struct kvm_page_fault *"
_KVM = "struct kvm *"
_SLOT = "struct kvm_memory_slot *"
_CONST_SLOT = "const struct kvm_memory_slot *"


@dataclass(frozen=True)
class FunctionPoint:
    """A role in KVM that some function plays, probed at entry and perhaps at exit.

    `functions`: names to try, newest first.  `signature`: acceptable types of its first parameters;
    a function of the right name and another signature is another function (kernel.md: from 6.13 on
    kvm_faultin_pfn() is a generic helper).
    """

    role: str
    functions: tuple[str, ...]
    signature: tuple[tuple[str, ...], ...]
    has_exit: bool
    sees: tuple[tuple[Type, Site], ...]


@dataclass(frozen=True)
class TracepointPoint:
    """A raw tracepoint.  `instead_of`: used only when no function plays that role."""

    name: str
    signature: tuple[tuple[str, ...], ...]
    sees: tuple[tuple[Type, Site], ...]
    instead_of: str | None = None
    define: str | None = None


FUNCTIONS = (
    FunctionPoint(
        "fault",
        ("kvm_mmu_page_fault",),
        ((_VCPU,), ("gpa_t",), ("u64",)),
        True,
        ((Type.FAULT, Site.PAGE_FAULT), (Type.MATCH, Site.RSVD)),
    ),
    FunctionPoint(
        "faultin",
        # the first name is seen in 6.18 and 7.2, the second in 6.1 to 6.12
        ("kvm_mmu_faultin_pfn", "kvm_faultin_pfn"),
        ((_VCPU,), (_FAULT,)),
        True,
        ((Type.FAULTIN, Site.FAULTIN),),
    ),
    FunctionPoint(
        "noslot",
        ("kvm_handle_noslot_fault", "handle_abnormal_pfn"),
        ((_VCPU,), (_FAULT,), ("unsigned int",)),
        True,
        ((Type.FILL, Site.NOSLOT),),
    ),
    FunctionPoint(
        "commit_memslot",
        ("kvm_arch_commit_memory_region",),
        ((_KVM,), (_SLOT, _CONST_SLOT), (_SLOT, _CONST_SLOT), ("enum kvm_mr_change",)),
        False,
        ((Type.MEMSLOT, Site.COMMIT_MEMSLOT),),
    ),
    FunctionPoint(
        "memslots_updated",
        ("kvm_arch_memslots_updated",),
        ((_KVM,), ("u64",)),
        False,
        ((Type.GENERATION, Site.MEMSLOTS_UPDATED),),
    ),
    FunctionPoint(
        "vcpu_destroy",
        ("kvm_arch_vcpu_destroy",),
        ((_VCPU,),),
        False,
        ((Type.LIFECYCLE, Site.VCPU_DESTROY),),
    ),
    FunctionPoint(
        "vm_destroy",
        ("kvm_destroy_vm",),
        ((_KVM,),),
        False,
        ((Type.LIFECYCLE, Site.VM_DESTROY),),
    ),
)

_GFN = ("gfn_t",)
_U32 = ("unsigned int", "u32")

TRACEPOINTS = (
    TracepointPoint(
        "kvm_emulate_insn",
        ((_VCPU,),),
        (
            (Type.EMULATE, Site.EMULATE_INSN),
            (Type.FILL, Site.EMULATE_INSN),
            (Type.CACHE, Site.EMULATE_INSN),
            (Type.GENERATION, Site.EMULATE_INSN),
            (Type.NESTING, Site.EMULATE_INSN),
            (Type.SMM, Site.EMULATE_INSN),
            (Type.LIFECYCLE, Site.FIRST_SIGHT),
            (Type.MEMSLOT, Site.FIRST_SIGHT),
        ),
    ),
    TracepointPoint(
        "kvm_entry",
        ((_VCPU,),),
        (
            (Type.FILL, Site.ENTRY),
            (Type.CACHE, Site.ENTRY),
            (Type.GENERATION, Site.ENTRY),
            (Type.NESTING, Site.ENTRY),
            (Type.SMM, Site.ENTRY),
        ),
    ),
    TracepointPoint(
        "kvm_page_fault",
        ((_VCPU,), ("u64",), ("u64",)),
        ((Type.FAULT, Site.PAGE_FAULT_TP),),
        instead_of="fault",
        define="WITH_PAGE_FAULT_TP",
    ),
    TracepointPoint(
        "kvm_mmu_spte_requested",
        ((_FAULT,),),
        ((Type.FAULTIN, Site.SPTE_REQUESTED),),
        instead_of="faultin",
        define="WITH_SPTE_REQUESTED",
    ),
    TracepointPoint(
        "vcpu_match_mmio",
        (("gva_t",), ("gpa_t",), ("bool",), ("bool",)),
        ((Type.MATCH, Site.MATCH_MMIO),),
    ),
    TracepointPoint(
        "kvm_mmio",
        (("int",), ("int",), ("u64",)),
        ((Type.MMIO, Site.MMIO),),
    ),
    TracepointPoint("kvm_userspace_exit", (("__u32", "u32"), ("int",)), ()),
    TracepointPoint(
        "handle_mmio_page_fault",
        (("u64",), _GFN, ("unsigned int",)),
        ((Type.FILL, Site.MMIO_SPTE),),
    ),
    TracepointPoint(
        "mark_mmio_spte",
        (("u64 *",), _GFN, ("u64",)),
        ((Type.SPTE, Site.MARK_MMIO_SPTE), (Type.FILL, Site.MARK_MMIO_SPTE)),
    ),
    TracepointPoint(
        "check_mmio_spte",
        (("u64",), _U32, _U32),
        ((Type.SPTE, Site.CHECK_MMIO_SPTE),),
    ),
    TracepointPoint("sched_process_exit", (("struct task_struct *",),), ()),
)
