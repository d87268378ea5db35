# SPDX-License-Identifier: MIT
"""Whether the faults' preconditions hold on this host, as far as its configuration tells."""

from __future__ import annotations

from collections.abc import Mapping

_YES = ("Y", "1")


def exposure(vendor: str | None, parameters: Mapping[str, str]) -> str:
    """Say whether KVM makes hidden memslots (TSS, identity map) for its VMs here, and why.

    KVM makes the TSS slot in vmx_set_tss_addr() only without unrestricted guest, and the identity
    map in vmx_vcpu_create() only with EPT and without unrestricted guest; SVM makes neither.  L2
    can touch them only with nesting.
    """
    if vendor == "amd":
        return "unreachable: kvm_amd makes neither a TSS nor an identity-map slot"
    if vendor != "intel":
        return f"unknown: no kvm_intel or kvm_amd is loaded (vendor: {vendor})"
    if parameters.get("kvm_intel.unrestricted_guest") in _YES:
        return "unreachable: unrestricted_guest=Y, so KVM makes no TSS or identity-map slot"
    if parameters.get("kvm_intel.nested") not in _YES:
        return "unreachable: nested is off, so there is no L2"
    if "kvm_intel.unrestricted_guest" not in parameters:
        return "unknown: kvm_intel does not show unrestricted_guest"
    return "reachable: unrestricted_guest=N, nested=Y; only a recording shows if it is fixed"
