# SPDX-License-Identifier: MIT
"""Everything that `kvmprobe doctor` says, gathered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvmprobe import __version__
from kvmprobe.doctor.configured import configured
from kvmprobe.doctor.sample import Sample, take_sample
from kvmprobe.errors import GuestError, UsageError
from kvmprobe.host.exposure import FIXED_FROM, Exposure
from kvmprobe.host.facts import Access, HostFacts, access, host_facts
from kvmprobe.host.livepatch import Livepatch, kvm_livepatches
from kvmprobe.host.vms import nested_runs, running_vms
from kvmprobe.verify.answers import Answer

if TYPE_CHECKING:
    from kvmprobe.analysis.run import CaptureAnalysis

SCHEMA = "kvmprobe.doctor/1"
SCHEMA_FILE = Path(__file__).parent / "schema" / "doctor-1.json"
#: How long the probes are awake, seconds.
SECONDS = 1.0

Nesting = Literal["in use", "used before", "not seen"]


@dataclass(frozen=True)
class VmState:
    """A running VM; `slots` (name: gpa) and `nesting` are None where nothing was to be seen.

    `name` is what the VMM says, not yet made printable.
    """

    pid: int
    name: str | None
    comm: str
    slots: dict[str, int] | None
    nesting: Nesting | None


@dataclass(frozen=True)
class Report:
    """What this host is; `problems` are what makes a recording impossible, a line each."""

    host: HostFacts
    access: Access
    problems: tuple[str, ...]
    sample: Sample
    vms: tuple[VmState, ...]
    livepatches: tuple[Livepatch, ...]
    exposures: tuple[Exposure, ...]
    verified: tuple[Answer, ...]


def examine(captures: Sequence[Path], *, verify: bool) -> Report:
    """Look at this host: its probes are attached for a second, and its guests are left alone.

    captures: recordings of this host and kernel that may show a fault.  verify: also run what
    `kvmprobe verify` runs.  Raises UsageError for a capture of another host or kernel, CaptureError
    for one that can't be read.
    """
    host, may = host_facts(), access()
    shown = [fault for path in captures for fault in _shown(path, host)]
    problems = may.advice()
    sample = Sample(0.0, (), (), 0, problems[0]) if problems else take_sample(SECONDS)
    if sample.problem and not problems:
        problems = [sample.problem]
    verified = _verify(host) if verify else ()
    for answer in verified:
        if answer.answer == "vulnerable":
            shown.append(Exposure(answer.fault, "shown", f"kvmprobe verify: {answer.reason}"))
    return Report(
        host=host,
        access=may,
        problems=tuple(problems),
        sample=sample,
        vms=tuple(_vms(sample)),
        livepatches=tuple(kvm_livepatches()),
        exposures=tuple(
            next((e for e in shown if e.fault == exposure.fault), exposure)
            for exposure in configured(host)
        ),
        verified=verified,
    )


def _verify(host: HostFacts) -> tuple[Answer, ...]:
    from kvmprobe.verify.run import verify

    try:
        return tuple(verify(host, unsafe=False))
    except GuestError as error:
        return tuple(Answer(fault, "unknown", str(error)) for fault in FIXED_FROM)


def _shown(path: Path, host: HostFacts) -> list[Exposure]:
    from kvmprobe.analysis.run import analyze
    from kvmprobe.analysis.words import VULNERABLE
    from kvmprobe.store.reader import CaptureReader

    with CaptureReader(path) as reader:
        (capture,) = analyze([reader]).captures
    difference = _difference(capture, host)
    if difference:
        raise UsageError(f"{path} says nothing about this host: {difference}")
    return [
        Exposure(fault, "shown", f"{path}: {'; '.join(verdict.basis)}")
        for fault, verdict in capture.verdicts.items()
        if verdict.verdict == VULNERABLE
    ]


def _difference(capture: CaptureAnalysis, host: HostFacts) -> str | None:
    """How the capture's host differs from this one; None where it can't be told from it."""
    theirs: Mapping[str, Any] = capture.header["host"]
    for key, what in (("machine", "machine"), ("kernel", "kernel"), ("vendor", "kind of KVM")):
        mine = host[key]  # type: ignore[literal-required]
        if theirs.get(key) and mine and theirs[key] != mine:
            return f"it was recorded on another {what}"
    modules = theirs.get("modules") or {}
    for name in sorted(modules.keys() & host["modules"].keys()):
        if modules[name] and host["modules"][name] and modules[name] != host["modules"][name]:
            return f"it was recorded with another build of {name}"
    return None


def _vms(sample: Sample) -> list[VmState]:
    found = []
    for vm in running_vms():
        seen = [s for s in sample.vms if s.pid == vm.pid]
        runs = nested_runs(vm.pid)
        nesting: Nesting | None = None
        if any(s.nested for s in seen):
            nesting = "in use"
        elif runs:
            nesting = "used before"
        elif seen or runs == 0:
            nesting = "not seen"
        slots = {name: gpa for s in seen for name, gpa in s.slots.items()} if seen else None
        found.append(VmState(vm.pid, vm.name, vm.comm, slots, nesting))
    return found


def hints(report: Report) -> dict[str, str]:
    """By fault what the kernel's version suggests: no proof, for distributions backport."""
    name = report.host["kernel"]
    return {
        fault: f"this kernel calls itself {name}; the fix came first with {version}"
        for fault, version in FIXED_FROM.items()
    }


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `document`."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def document(report: Report) -> dict[str, Any]:
    """The JSON document of `doctor --json`; `json_schema` describes it."""
    hinted = hints(report)
    verified = {answer.fault: answer for answer in report.verified}
    return {
        "schema": SCHEMA,
        "tool": {"name": "kvmprobe", "version": __version__},
        "host": dict(report.host),
        "access": {
            **asdict(report.access),
            "capabilities": sorted(report.access.capabilities),
            "may_trace": report.access.may_trace,
        },
        "problems": list(report.problems),
        "plan": [dict(row) for row in report.sample.plan],
        "sample": {"seconds": report.sample.seconds, "lost": report.sample.lost},
        "vms": [
            {
                **asdict(vm),
                "slots": None
                if vm.slots is None
                else [{"name": name, "gpa": f"0x{gpa:x}"} for name, gpa in vm.slots.items()],
            }
            for vm in report.vms
        ],
        "livepatches": [asdict(patch) for patch in report.livepatches],
        "exposure": {
            e.fault: {
                "word": e.word,
                "reason": e.reason,
                "verified": asdict(verified[e.fault]) if e.fault in verified else None,
                "version_hint": hinted[e.fault],
            }
            for e in report.exposures
        },
    }
