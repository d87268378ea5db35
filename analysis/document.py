# SPDX-License-Identifier: MIT
"""The public JSON document of `analyze --json`: kvmprobe.analysis/1.

analysis/schema/analysis-1.json describes it.  Additions keep /1; a removal or a new name makes /2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmprobe import __version__
from kvmprobe.analysis.findings import Finding, level_of
from kvmprobe.analysis.integrity import name_of
from kvmprobe.probes.schema import Flag, LossCause, Site, Type

if TYPE_CHECKING:
    from kvmprobe.analysis.judge import VmReport
    from kvmprobe.analysis.run import Analysis, CaptureAnalysis

SCHEMA = "kvmprobe.analysis/1"
SCHEMA_FILE = Path(__file__).parent / "schema" / "analysis-1.json"

_SITES = frozenset(int(site) for site in Site)
_HOST = ("boot_id", "kernel", "modules", "parameters")


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the document."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def document(analysis: Analysis) -> dict[str, Any]:
    """Return the document for an analysis; `json.dumps` takes it as it is."""
    numbers = {id(capture): n for n, capture in enumerate(analysis.captures)}
    counts = sorted(analysis.observations.items())
    return {
        "schema": SCHEMA,
        "tool": {"name": "kvmprobe", "version": __version__},
        "host": _host([capture.header["host"] for capture in analysis.captures]),
        "captures": [_capture(capture) for capture in analysis.captures],
        "events": analysis.events,
        "observations": {name_of(Type, t): n for t, n in counts if t != Type.LOSS},
        "lost": analysis.lost,
        "verdict": analysis.verdict,
        "verdicts": {
            fault: {"verdict": v.verdict, "basis": list(v.basis), "missing": list(v.missing)}
            for fault, v in analysis.verdicts.items()
        },
        "vms": [
            _vm(vm, n) for n, capture in enumerate(analysis.captures) for vm in capture.vms.values()
        ],
        "findings": [
            _finding(capture, finding, numbers[id(capture)])
            for capture, finding in analysis.findings
        ],
    }


def _host(hosts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say what all captures agree on; null where they don't."""
    return {
        key: hosts[0].get(key) if hosts and all(h.get(key) == hosts[0].get(key) for h in hosts)
        else None
        for key in _HOST
    }  # fmt: skip


def _capture(capture: CaptureAnalysis) -> dict[str, Any]:
    integrity, coverage = capture.integrity, capture.coverage
    return {
        "file": capture.path,
        "started": capture.header["started"],
        "source": dict(capture.header["source"]),
        "events": integrity.total,
        "lost": integrity.lost_total,
        "losses": [
            {
                "observation": name_of(Type, observation),
                "cpu": cpu,
                "cause": name_of(LossCause, cause),
                "records": records,
                "vm": vm or None,
            }
            for (observation, cpu, cause, vm), records in sorted(integrity.lost.items())
        ],
        "truncated": coverage.truncated,
        "damaged": coverage.damaged,
        "unknown_events": coverage.unknown,
        "anomalies": dict(sorted(integrity.anomaly_counts.items())),
    }


def _vm(report: VmReport, number: int) -> dict[str, Any]:
    vm = report.vm
    return {
        "capture": number,
        "vm": {"id": vm.id, "name": vm.name, "pid": vm.pid},
        "gone": report.gone,
        "verdict": report.verdict,
        "verdicts": {fault: v.verdict for fault, v in report.verdicts.items()},
        "missing": list(dict.fromkeys(m for v in report.verdicts.values() for m in v.missing)),
    }


def _finding(capture: CaptureAnalysis, finding: Finding, number: int) -> dict[str, Any]:
    vm, cause = capture.names.get(finding.vm), finding.cause
    return {
        "rule": finding.rule.id,
        "fault": finding.rule.fault,
        "severity": finding.rule.severity,
        "capture": number,
        "vm": {"id": vm.id, "name": vm.name, "pid": vm.pid},
        "vcpu": finding.vcpu,
        "thread": capture.names.thread(finding.vm, finding.vcpu),
        "level": finding.level,
        "gpa": f"0x{finding.gpa:x}" if finding.has_gpa else None,
        "slot": finding.slot,
        "slot_confidence": finding.slot_confidence,
        "first_ns": capture.since_start(finding.first_ts),
        "last_ns": capture.since_start(finding.last_ts),
        "count": finding.count,
        "per_second": finding.rate,
        "cause": cause and {"rule": cause.rule, "age_ns": cause.age_ns, "count": cause.count},
        "evidence": {
            "total": finding.evidence_total,
            "events": [event(capture, row) for row in finding.evidence],
        },
    }


def event(capture: CaptureAnalysis, row: np.void) -> dict[str, Any]:
    """Write one event of evidence: names for numbers, hexadecimal for 64-bit values."""
    flags = int(row["flags"])
    site = int(row["site"])
    return {
        "ns": capture.since_start(int(row["ts"])),
        "seq": int(row["seq"]),
        "observation": name_of(Type, int(row["type"])),
        "site": Site(site).name if site in _SITES else f"site-{site}",
        "level": level_of(flags),
        "flags": [flag.name for flag in Flag if flags & flag],
        "addr": f"0x{row['addr']:x}",
        "value": f"0x{row['value']:x}",
        "gen": f"0x{row['gen']:x}",
        "aux": int(row["aux"]),
        "slot": int(row["slot"]),
        "kind": int(row["kind"]),
        "len": int(row["len"]),
    }
