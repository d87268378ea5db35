# SPDX-License-Identifier: MIT
"""Which faults this host's configuration rules out, and by which condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: "unreachable": a condition of this host rules the fault out.  "reachable": none does; that says
#: nothing about the kernel's being fixed.  "shown": a capture or a verification proved it.
Word = Literal["unreachable", "reachable", "shown"]

_ON = ("Y", "1")

#: Where the fix came first.  A hint only: distributions backport.
FIXED_FROM = {
    "internal-slot": "Linux 6.10",
    "address-space": "Debian 6.1.192-1, 6.12.115-1 and 7.2.12-1",
    "spte-overwrite": "Debian 6.1.170-1 and 6.12.85-1",
}


@dataclass(frozen=True)
class Exposure:
    """What the configuration says about one fault, and which condition says it."""

    fault: str
    word: Word
    reason: str


def exposures(
    vendor: str | None, parameters: Mapping[str, str], *, smm: bool | None, nests: bool | None
) -> list[Exposure]:
    """Say for each fault with a known cause whether this host's configuration rules it out.

    vendor, parameters: as in `HostFacts`.  smm: KVM_CAP_X86_SMM; nests: whether KVM offers guests
    VMX or SVM (KVM_GET_SUPPORTED_CPUID); None where KVM can't be asked.
    """
    return [
        Exposure("internal-slot", *_internal_slot(vendor, parameters, nests)),
        Exposure("address-space", *_address_space(smm)),
        Exposure("spte-overwrite", *_spte_overwrite(vendor, parameters)),
    ]


def _internal_slot(
    vendor: str | None, parameters: Mapping[str, str], nests: bool | None
) -> tuple[Word, str]:
    """The hidden TSS and the identity map, and an L2 to touch them.

    KVM makes the TSS slot in vmx_set_tss_addr() only without unrestricted guest, and the identity
    map in vmx_vcpu_create() only with EPT and without unrestricted guest; SVM makes neither.
    """
    if vendor == "amd":
        return "unreachable", "kvm_amd makes no hidden TSS and no identity map"
    if nests is False:
        return "unreachable", "KVM offers its guests neither VMX nor SVM, so there is no L2"
    if vendor != "intel":
        return "reachable", f"nothing is known of a KVM for {vendor}: run kvmprobe verify"
    if parameters.get("kvm_intel.unrestricted_guest") in _ON:
        return "unreachable", (
            "kvm_intel.unrestricted_guest=Y, so KVM makes no hidden TSS and no identity map"
        )
    if _off(parameters, "kvm_intel.nested"):
        return "unreachable", "kvm_intel.nested is off, so there is no L2"
    if "kvm_intel.unrestricted_guest" not in parameters:
        return "reachable", "kvm_intel does not show its parameters, so nothing rules it out"
    return "reachable", "kvm_intel.unrestricted_guest=N and nested=Y"


def _address_space(smm: bool | None) -> tuple[Word, str]:
    if smm is None:
        return "reachable", "/dev/kvm can't be asked for SMM here, so nothing rules it out"
    if smm:
        return "reachable", "KVM has SMM (KVM_CAP_X86_SMM): a guest's firmware may use it"
    return "unreachable", "KVM has no SMM (KVM_CAP_X86_SMM), so a VM has one address space"


def _spte_overwrite(vendor: str | None, parameters: Mapping[str, str]) -> tuple[Word, str]:
    """Shadow page tables: without nested paging, or for a nested guest."""
    paging = {"intel": "kvm_intel.ept", "amd": "kvm_amd.npt"}.get(vendor or "")
    if paging is None:
        return "reachable", f"nothing is known of the page tables of a KVM for {vendor}"
    if parameters.get(paging) not in _ON:
        return "reachable", f"{paging} is not on: guests run on shadow page tables"
    nested = f"kvm_{vendor}.nested"
    if _off(parameters, nested):
        return "unreachable", f"{paging}=Y and {nested} is off: KVM makes no shadow page tables"
    return "reachable", f"{nested} is on: nested guests may run on shadow page tables"


def _off(parameters: Mapping[str, str], name: str) -> bool:
    return name in parameters and parameters[name] not in _ON
