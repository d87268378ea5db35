# SPDX-License-Identifier: MIT
"""The verdict and the facts of the host and the recording, for the page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kvmprobe.analysis.integrity import name_of
from kvmprobe.analysis.text import duration, vm_name
from kvmprobe.analysis.verdict import Verdict
from kvmprobe.analysis.words import FIXED, INCONCLUSIVE, NOT_EXERCISED, VERDICTS, VULNERABLE
from kvmprobe.probes.schema import LossCause, Type
from kvmprobe.report.gather import Gathered

_MEANING = {
    VULNERABLE: "Proof of the fault was seen: this kernel takes memory for MMIO.",
    INCONCLUSIVE: "Something that has to be seen was lost or could not be attached.",
    NOT_EXERCISED: "Nothing happened that shows a fault or proves the kernel free of it.",
    FIXED: "Proof was seen that this kernel does the right thing.",
}
#: What decides whether a host can show the internal-slot fault at all.
TELLING = (
    "kvm_intel.unrestricted_guest",
    "kvm_intel.ept",
    "kvm_intel.nested",
    "kvm_amd.npt",
    "kvm_amd.nested",
    "kvm.mmio_caching",
    "kvm.force_emulation_prefix",
)
_MAX_LOSSES = 100
_MAX_VMS = 200


@dataclass(frozen=True)
class Summary:
    """The overall verdict, what it means, and each fault's."""

    overall: str
    meaning: str
    faults: tuple[Verdict, ...]
    findings: int
    vcpus: int
    file: str
    kernel: str
    started: str
    seconds: str
    events: int
    lost: int


@dataclass(frozen=True)
class VmRow:
    """A VM's verdict, and the faults that have it; `missing` is what others don't lack."""

    vm: str
    gone: bool
    verdict: str
    faults: str
    findings: int
    lost: int
    missing: str


@dataclass(frozen=True)
class Facts:
    """Tables of (name, value)."""

    recording: tuple[tuple[str, str], ...]
    host: tuple[tuple[str, str], ...]
    telling: tuple[tuple[str, str], ...]
    parameters: tuple[tuple[str, str], ...]
    losses: tuple[tuple[str, str, str, str, str], ...]
    more_losses: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What was attached, and what not and why."""

    attached: tuple[tuple[str, str, str], ...]
    left: tuple[tuple[str, str], ...]


def verdicts(found: Gathered) -> Summary:
    """Return the verdict, the worst fault first."""
    analysis, capture = found.analysis, found.capture
    rates = found.rates
    faults = sorted(analysis.verdicts.values(), key=lambda v: VERDICTS.index(v.verdict))
    return Summary(
        overall=analysis.verdict,
        meaning=_MEANING[analysis.verdict],
        faults=tuple(faults),
        findings=len(capture.findings),
        vcpus=len({(f.vm, f.vcpu) for f in capture.findings}),
        file=capture.path.rpartition("/")[2],
        kernel=capture.header["host"]["kernel"] or "unknown kernel",
        started=_moment(capture.header["started"]),
        seconds=duration(rates.last_ts - rates.first_ts) if rates.seen else "0 s",
        events=capture.integrity.total,
        lost=capture.integrity.lost_total,
    )


def vms(found: Gathered) -> tuple[list[VmRow], list[tuple[str, int]]]:
    """Return the VMs, the worst first, and how many of each verdict found no place."""
    capture = found.capture
    findings = Counter(finding.vm for finding in capture.findings)
    reports = sorted(
        capture.vms.values(), key=lambda r: (VERDICTS.index(r.verdict), -findings[r.vm.id], r.vm.id)
    )
    lines = {r.vm.id: [line for v in r.verdicts.values() for line in v.missing] for r in reports}
    # What all VMs lack stands above, with the verdicts on the host.
    shared = set.intersection(*map(set, lines.values())) if lines else set()
    rows = []
    for report in reports[:_MAX_VMS]:
        deciding = {f: v for f, v in report.verdicts.items() if v.verdict == report.verdict}
        missing = [line for line in dict.fromkeys(lines[report.vm.id]) if line not in shared]
        rows.append(
            VmRow(
                vm=vm_name(report.vm),
                gone=report.gone,
                verdict=report.verdict,
                faults=", ".join(deciding) if len(deciding) < len(report.verdicts) else "all",
                findings=findings[report.vm.id],
                lost=sum(report.coverage.lost.values()),
                missing="; ".join(missing),
            )
        )
    left = Counter(report.verdict for report in reports[_MAX_VMS:])
    return rows, sorted(left.items(), key=lambda item: VERDICTS.index(item[0]))


def facts(found: Gathered) -> Facts:
    """Return what is known of the host, the recording and its losses."""
    capture = found.capture
    header, host = capture.header, capture.header["host"]
    source, filters = header["source"], header["filters"]
    known = {str(name): str(value) for name, value in (host["parameters"] or {}).items()}
    losses = sorted(capture.integrity.lost.items(), key=lambda item: -item[1])
    coverage = capture.coverage
    problems = []
    if coverage.truncated:
        problems.append(f"The capture ends early: {coverage.truncated}")
    if coverage.damaged:
        problems.append(f"{coverage.damaged} damaged part(s) of the capture were refused")
    if coverage.unknown:
        problems.append(f"{coverage.unknown:,} events are of types that a newer kvmprobe wrote")
    problems += [
        f"{count:,} events that no kernel makes: {kind}"
        for kind, count in sorted(capture.integrity.anomaly_counts.items())
    ]
    return Facts(
        recording=(
            ("File", capture.path),
            ("Started", _moment(header["started"])),
            ("Command", " ".join(map(str, header["command"])) or "-"),
            ("Source", source["kind"] + (f": {source['note']}" if source["note"] else "")),
            ("Only", _only(filters)),
            ("Made by", f"{header['tool']['name']} {header['tool']['version']}"),
            ("Events", f"{capture.integrity.total:,}"),
            ("Lost", f"{capture.integrity.lost_total:,}"),
        ),
        host=(
            ("Kernel", str(host["kernel"] or "unknown")),
            ("Vendor", str(host["vendor"] or "unknown")),
            ("Boot", str(host["boot_id"] or "unknown")),
            *((f"Build of {name}", str(build)) for name, build in (host["modules"] or {}).items()),
        ),
        telling=tuple((name, known[name]) for name in TELLING if name in known),
        parameters=tuple(item for item in sorted(known.items()) if item[0] not in TELLING),
        losses=tuple(
            (
                name_of(Type, kind),
                str(cpu),
                f"VM {vm}" if vm else "any",
                name_of(LossCause, cause),
                f"{records:,}",
            )
            for (kind, cpu, cause, vm), records in losses[:_MAX_LOSSES]
        ),
        more_losses=sum(records for _, records in losses[_MAX_LOSSES:]),
        problems=tuple(problems),
    )


def plan(found: Gathered) -> Plan:
    """Return what the recording could see."""
    rows = found.capture.header["plan"]
    return Plan(
        tuple(
            (str(r["observation"]), str(r["site"] or "-"), str(r["attachment"] or "-"))
            for r in rows
            if r["attached"]
        ),
        tuple(
            (str(r["attachment"] or r["observation"]), str(r["reason"] or "no reason given"))
            for r in rows
            if not r["attached"]
        ),
    )


def _only(filters: dict[str, object]) -> str:
    chosen = [f"{name} {value}" for name, value in filters.items() if value is not None]
    return ", ".join(chosen) or "everything on the host"


def _moment(started: str | None) -> str:
    return f"{started[:19].replace('T', ' ')} UTC" if started else "unknown"
