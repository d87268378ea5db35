# SPDX-License-Identifier: MIT
"""Livepatches that change KVM: a patched function is not what its BTF and version say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Livepatch:
    """A loaded livepatch and the functions of KVM that it replaces ("kvm:kvm_faultin_pfn")."""

    name: str
    enabled: bool
    in_transition: bool
    functions: tuple[str, ...]


def kvm_livepatches(root: Path = Path("/")) -> list[Livepatch]:
    """Every loaded livepatch that touches KVM (Documentation/ABI/testing/sysfs-kernel-livepatch).

    KVM is the modules kvm, kvm_intel and their like, and, where it is built in, the functions of
    vmlinux with "kvm" in their names, or of its emulator, MMU, VMX or SVM code by their prefix.
    """
    found = []
    for patch in sorted((root / "sys/kernel/livepatch").glob("*")):
        functions = tuple(
            f"{entry.parent.name}:{entry.name.rpartition(',')[0] or entry.name}"
            for entry in sorted(patch.glob("*/*"))
            if entry.is_dir() and _of_kvm(entry.parent.name, entry.name)
        )
        if functions:
            on, moving = _flag(patch / "enabled"), _flag(patch / "transition")
            found.append(Livepatch(patch.name, on, moving, functions))
    return found


_PREFIXES = ("kvm", "vmx_", "svm_", "x86_emulate_", "emulator_", "mmu_", "tdp_mmu_", "nested_")


def _of_kvm(target: str, function: str) -> bool:
    if target == "vmlinux":
        return "kvm" in function or function.startswith(_PREFIXES)
    return target == "kvm" or target.startswith("kvm_")


def _flag(path: Path) -> bool:
    try:
        return path.read_text(encoding="ascii").strip() == "1"
    except OSError:
        return False
