# SPDX-License-Identifier: MIT
"""One probe a fault: a guest of guests/ in a VM of its own, and what its accesses say.

The VMM sees the faults of the cache by itself: an access of the guest to memory comes out as MMIO.
So no tracing is needed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from kvmprobe.errors import GuestError
from kvmprobe.guests import nested, overwrite, smm
from kvmprobe.guests.vmm import IDENTITY_MAP_ADDRESS, PAGE, TSS_ADDRESS, Machine
from kvmprobe.verify.answers import Answer

INTERNAL_SLOT, ADDRESS_SPACE, SPTE_OVERWRITE = "internal-slot", "address-space", "spte-overwrite"

_INTERNAL = {"hidden TSS": TSS_ADDRESS, "identity map": IDENTITY_MAP_ADDRESS}
#: A slot number that the guests don't use.
_SPARE_SLOT = 9
_ON = ("Y", "1")
_KERNEL_LOG = Path("/dev/kmsg")
_PANIC_ON_WARN = Path("/proc/sys/kernel/panic_on_warn")
_LOG_RECORD = 8192  # the longest record of /dev/kmsg (CONSOLE_EXT_LOG_MAX)


def internal_slot(parameters: Mapping[str, str]) -> Answer:
    """L2 touches KVM's hidden TSS, then L1 does an OUTS from it.

    Vulnerable kernels (3a2936dedd20 "kvm: mmu: Don't expose private memslots to L2", until Linux
    6.10) take L2's access for MMIO, and after it L1's.  Raises GuestError when KVM can't run it.
    """
    vendor = nested.nests()
    with Machine() as machine:
        slots = _internal_slots(machine)
    conditions = []
    if not slots:
        conditions.append("KVM makes no hidden TSS and no identity map" + _why_no_slots(parameters))
    if vendor is None:
        conditions.append(
            "KVM offers its guests no virtualization, so there is no L2" + _why_no_l2(parameters)
        )
    if conditions:
        return Answer(INTERNAL_SLOT, "unreachable", "; ".join(conditions))
    name, target = slots[0]
    with Machine() as machine:
        guest = nested.Guest(machine, target=target)
        guest.start()
        before = [guest.do("load"), guest.do("string-out")]
        touch = guest.do("l2-load")
        after = guest.do("string-out")
    evidence = tuple(
        f"{who} {access} of the {name} at {target:#x}: {_seen(account)}"
        for who, access, account in (
            ("L1's", "load", before[0]),
            ("L1's", "OUTS", before[1]),
            ("L2's", "load", touch),
            ("L1's", "OUTS", after),
        )
    )
    if any(account.mmio for account in before):
        reason = f"the {name} was MMIO for L1 before L2 touched it, which no kernel is known to do"
        return Answer(INTERNAL_SLOT, "unknown", reason, evidence)
    if after.mmio:
        reason = "after L2 touched memory of KVM's own, L1's access to it went to the VMM"
        return Answer(INTERNAL_SLOT, "vulnerable", reason, evidence)
    if touch.mmio:
        reason = "KVM hides its own memory from L2, whose access went to the VMM"
        return Answer(INTERNAL_SLOT, "vulnerable", reason, evidence)
    reason = "L2 touched memory of KVM's own and read memory, and so did L1 after it"
    return Answer(INTERNAL_SLOT, "fixed", reason, evidence)


def _seen(account: nested.Account) -> str:
    return "MMIO" if account.mmio else "memory"


def _internal_slots(machine: Machine) -> list[tuple[str, int]]:
    """Which slots of its own KVM made for a fresh machine: (name, gpa).

    They show as they are in the way of a slot of ours (kvm_set_memory_region() then says EEXIST).
    """
    machine.set_identity_map_addr()
    machine.set_tss_addr()
    machine.add_vcpu()
    found = []
    for name, gpa in _INTERNAL.items():
        try:
            machine.add_slot(_SPARE_SLOT, gpa, PAGE).delete()
        except GuestError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EEXIST):
                raise
            found.append((name, gpa))
    return found


def _why_no_slots(parameters: Mapping[str, str]) -> str:
    if parameters.get("kvm_intel.unrestricted_guest") in _ON:
        return " (kvm_intel.unrestricted_guest=Y)"
    if any(name.startswith("kvm_amd.") for name in parameters):
        return " (kvm_amd never does)"
    return ""


def _why_no_l2(parameters: Mapping[str, str]) -> str:
    for name in ("kvm_intel.nested", "kvm_amd.nested"):
        if name in parameters and parameters[name] not in _ON:
            return f" ({name}={parameters[name]})"
    return ""


def address_space() -> Answer:
    """A guest goes in and out of SMM and touches what is memory in one mode only.

    CVE-2026-99082: vulnerable kernels take the generation of the MMIO cache from address space 0
    also in SMM (vcpu_cache_mmio_info(), vcpu_match_mmio_gen()).  Raises GuestError when KVM can't
    run it.
    """
    if not smm.supported():
        reason = "this KVM has no SMM (KVM_CAP_X86_SMM), so a VM has only one address space"
        return Answer(ADDRESS_SPACE, "unreachable", reason)
    results = [r for name in ("forward", "reverse", "stale") for r in smm.run(smm.RECIPES[name])]
    wrong = [result for result in results if result.wrong]
    evidence = tuple(
        f"{r.step.name}: {r.step.access.name} {'in' if r.step.smm else 'outside'} SMM at "
        f"{r.step.gpa:#x}: {'memory' if r.memory else 'a hole'}, taken for "
        f"{'MMIO' if r.mmio else 'memory'}"
        for r in wrong
    )
    if any(not result.memory for result in wrong):
        reason = "an access to nothing was no MMIO, which no kernel is known to do"
        return Answer(ADDRESS_SPACE, "unknown", reason, evidence)
    if wrong:
        reason = (
            f"{len(wrong)} of {len(results)} accesses in and outside SMM were to memory and went "
            "to the VMM (CVE-2026-99082)"
        )
        return Answer(ADDRESS_SPACE, "vulnerable", reason, evidence)
    reason = f"all {len(results)} accesses in and outside SMM went where they belong"
    return Answer(ADDRESS_SPACE, "fixed", reason)


def spte_overwrite(parameters: Mapping[str, str], *, unsafe: bool) -> Answer:
    """A guest's page table changes behind KVM's back, under shadow paging.

    CVE-2026-23401: mark_mmio_spte() of vulnerable kernels writes over an SPTE in use and warns,
    once a boot.  The guest sees nothing, so only the kernel's log tells; a kernel free of the fault
    says nothing, so the answer is never "fixed".  Raises GuestError when KVM can't run it.
    """
    paging = next(
        (name for name in ("kvm_intel.ept", "kvm_amd.npt") if parameters.get(name) in _ON), None
    )
    if paging and nested.nests() is None:
        reason = f"{paging}=Y and no guest can nest, so KVM keeps no shadow page tables"
        return Answer(SPTE_OVERWRITE, "unreachable", reason)
    if not unsafe:
        reason = (
            "a vulnerable kernel would warn and keep a stale record of a page until it is booted "
            "again; --unsafe tests it"
        )
        return Answer(SPTE_OVERWRITE, "untested", reason)
    if paging:
        reason = (
            f"{paging}=Y: KVM shadows the page tables of nested guests only; no probe does that"
        )
        return Answer(SPTE_OVERWRITE, "unknown", reason)
    if _PANIC_ON_WARN.read_text(encoding="ascii").strip() != "0":
        reason = "refused: kernel.panic_on_warn=1, so a vulnerable kernel would panic"
        return Answer(SPTE_OVERWRITE, "unknown", reason)
    try:
        log = os.open(_KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = f"not run: the answer is in the kernel's log, {_KERNEL_LOG}: {error.strerror}"
        return Answer(SPTE_OVERWRITE, "unknown", reason)
    try:
        os.lseek(log, 0, os.SEEK_END)
        overwrite.run("present")
        warnings = [line for line in _new_records(log) if "mark_mmio_spte" in line]
    finally:
        os.close(log)
    if warnings:
        reason = "the kernel warned that it overwrote an entry in use (CVE-2026-23401)"
        return Answer(SPTE_OVERWRITE, "vulnerable", reason, (warnings[0],))
    reason = (
        "the kernel did not warn, which proves nothing: it warns once a boot, and one without the "
        "fault never. `kvmprobe record -- python3 -m kvmprobe.guests.overwrite present` sees more"
    )
    return Answer(SPTE_OVERWRITE, "unknown", reason)


def _new_records(log: int) -> list[str]:
    """The texts of /dev/kmsg's new records (Documentation/ABI/testing/dev-kmsg)."""
    texts: list[str] = []
    while True:
        try:
            record = os.read(log, _LOG_RECORD)
        except BlockingIOError:
            return texts
        except BrokenPipeError:  # overrun: the next read goes on with the oldest record
            continue
        text = record.decode(errors="replace").partition(";")[2].split("\n")[0]
        texts.append("".join(c if c.isprintable() else "?" for c in text))
