# SPDX-License-Identifier: MIT
"""`kvmprobe doctor`: can this host be recorded, how, and can the fault occur here."""

from __future__ import annotations

from kvmprobe.errors import HostError, KvmprobeError

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


def doctor() -> None:
    """Say what this host is, which probes would be attached and why.  Attaches nothing.

    Exits with 1 when recording is impossible here.
    """
    from kvmprobe.capture.session import Filters, Session
    from kvmprobe.cli.tables import columns, plan_lines
    from kvmprobe.host.exposure import exposure
    from kvmprobe.host.facts import access, host_facts

    facts, may = host_facts(), access()
    parameters = [(n, facts["parameters"][n]) for n in _PARAMETERS if n in facts["parameters"]]
    lines = columns(
        [
            ("kernel", str(facts["kernel"])),
            ("vendor", str(facts["vendor"])),
            ("modules", ", ".join(facts["modules"])),
            *parameters,
            ("BTF", "yes" if may.btf else "no"),
            ("lockdown", str(may.lockdown or "none")),
            ("permission to trace", "yes" if may.may_trace else "no: run as root"),
            ("/dev/kvm", "usable" if may.kvm_usable else "not usable by this user"),
            ("internal slots", exposure(facts["vendor"], facts["parameters"])),
        ]
    )
    print("\n".join(lines), flush=True)
    problems = may.advice()
    if problems:
        raise HostError("this host can't be recorded: " + "; ".join(problems))
    with Session(Filters()) as session:
        try:
            session.prepare()
        except KvmprobeError as error:
            raise HostError(f"this host can't be recorded: {error}") from error
        print("\n".join(plan_lines(session.plan.rows())))
