# SPDX-License-Identifier: MIT
"""The report of `kvmprobe doctor` for people, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from kvmprobe.analysis.vms import printable
from kvmprobe.doctor.report import Report, VmState, hints

#: Parameters that decide what can happen here; --json has all.
_PARAMETERS = (
    "kvm_intel.nested",
    "kvm_intel.ept",
    "kvm_intel.unrestricted_guest",
    "kvm_amd.nested",
    "kvm_amd.npt",
    "kvm_amd.avic",
    "kvm.mmio_caching",
    "kvm.force_emulation_prefix",
)
_WIDTH = 80


def facts(report: Report) -> list[tuple[str, str]]:
    """What this host is, as rows of a table."""
    host, may = report.host, report.access
    parameters = host["parameters"]
    return [
        ("kernel", str(host["kernel"])),
        ("vendor", str(host["vendor"])),
        ("modules", ", ".join(host["modules"])),
        *((name, parameters[name]) for name in _PARAMETERS if name in parameters),
        ("BTF", "yes" if may.btf else "no"),
        ("lockdown", may.lockdown or "not in this kernel"),
        ("capabilities", ", ".join(sorted(may.capabilities)) or "none for tracing"),
        ("permission to trace", "yes" if may.may_trace else "no: run as root"),
        ("/dev/kvm", "usable" if may.kvm_usable else "not usable by this user"),
    ]


def rest(report: Report) -> Iterator[str]:
    """Lines on livepatches, VMs and exposure."""
    yield "livepatches of KVM:" + ("" if report.livepatches else " none")
    for patch in report.livepatches:
        state = "in transition" if patch.in_transition else "on" if patch.enabled else "off"
        yield from _wrap(f"{patch.name} ({state}): {', '.join(patch.functions)}", "  ")
    yield "VMs:" + ("" if report.vms else " none runs")
    for vm in report.vms:
        yield from _vm(vm, report.sample.seconds)
    hinted = hints(report)
    answers = {answer.fault: answer for answer in report.verified}
    yield "exposure:"
    for exposure in report.exposures:
        yield f"  {exposure.fault}: {exposure.word}"
        yield from _wrap(exposure.reason, "    ")
        if exposure.fault in answers and exposure.word != "shown":
            answer = answers[exposure.fault]
            yield from _wrap(f"kvmprobe verify: {answer.answer}: {answer.reason}", "    ")
        if exposure.word == "reachable":
            yield from _wrap(f"hint only, distributions backport: {hinted[exposure.fault]}", "    ")


def _vm(vm: VmState, seconds: float) -> Iterable[str]:
    name = printable(vm.name or vm.comm)
    if vm.slots is None:
        slots = f"not seen running within {seconds:g} s" if seconds else "not to be seen"
    else:
        slots = ", ".join(f"{slot} at {gpa:#x}" for slot, gpa in vm.slots.items()) or "none"
    yield from _wrap(
        f"{vm.pid} {name}: internal slots: {slots}; nesting: {vm.nesting or 'not known'}", "  "
    )


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
