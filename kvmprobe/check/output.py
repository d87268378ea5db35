# SPDX-License-Identifier: MIT
"""An answer as a plugin's line, as JSON, and as a file for Prometheus's textfile collector."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvmprobe import __version__
from kvmprobe.check.model import WORDS, Code, Result, Seen

SCHEMA = "kvmprobe.check/1"
SCHEMA_FILE = Path(__file__).parent / "schema" / "check-1.json"


def performance(result: Result, seen: Seen) -> dict[str, str]:
    """Performance data by label: value and unit (monitoring-plugins' guidelines, 2.6)."""
    found = Counter(f.severity for f in seen.found if f.ignored is None)
    return {
        "seconds": f"{seen.seconds:.1f}s",
        "vms": f"{seen.vms};;;0",
        "unknown_vms": f"{len(result.unknown_vms)};;;0",
        "events": f"{seen.events}c",
        "lost": f"{sum(seen.lost.values())}c",
        "warnings": f"{found['warning']};0;;0",
        "criticals": f"{found['critical']};;0;0",
    }


def line(result: Result, seen: Seen) -> str:
    """The plugin's one line: no name in it can end it or its text."""
    text = "".join(c if c.isprintable() else "?" for c in result.text).replace("|", "/")
    data = " ".join(f"{label}={value}" for label, value in performance(result, seen).items())
    return f"KVMPROBE {result.code.name} - {text} | {data}"


def document(result: Result, seen: Seen) -> dict[str, Any]:
    """The document of `check --json`; `json_schema` describes it."""
    return {
        "schema": SCHEMA,
        "tool": {"name": "kvmprobe", "version": __version__},
        "status": result.code.name,
        "code": int(result.code),
        "text": result.text,
        "source": seen.source,
        "seconds": seen.seconds,
        "vms": seen.vms,
        "events": seen.events,
        "lost": dict(seen.lost),
        "error": seen.error,
        "verdicts": {
            fault: {"verdict": word, "proof": seen.unreachable.get(fault)}
            for fault, word in result.verdicts.items()
        },
        "missing": list(seen.missing),
        "unknown_vms": [
            {"vm": vm.label, "verdicts": dict(vm.verdicts), "missing": list(vm.missing)}
            for vm in result.unknown_vms
        ],
        "findings": [asdict(found) for found in seen.found],
    }


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `document`."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def textfile(result: Result, seen: Seen, now: float) -> str:
    """The answer as Prometheus metrics (text format 0.0.4), without timestamps.

    now: the wall clock, seconds since 1970.  Labels are words of this program.
    """
    return "".join(f"{line}\n" for line in _metrics(result, seen, now))


def _metrics(result: Result, seen: Seen, now: float) -> Iterator[str]:
    def metric(name: str, text: str, values: dict[str, float]) -> Iterator[str]:
        yield f"# HELP kvmprobe_check_{name} {text}"
        yield f"# TYPE kvmprobe_check_{name} gauge"
        for labels, value in values.items():
            yield f"kvmprobe_check_{name}{labels} {value!r}"

    def labels(**values: str) -> str:
        return "{" + ",".join(f'{name}="{value}"' for name, value in values.items()) + "}"

    code = int(result.code)
    yield from metric("status", "0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.", {"": code})
    yield from metric("last_run_timestamp_seconds", "When the check ended.", {"": now})
    yield from metric("watched_seconds", "Seconds with probes awake.", {"": seen.seconds})
    yield from metric("vms", "VMs watched.", {"": seen.vms})
    yield from metric("unknown_vms", "VMs without a verdict.", {"": len(result.unknown_vms)})
    yield from metric(
        "lost_records",
        "Records lost.",
        {labels(observation=name): count for name, count in sorted(seen.lost.items())},
    )
    findings: Counter[str] = Counter()
    for found in seen.found:
        for rule in found.rules:
            findings[labels(rule=rule, severity=found.severity)] += 1
    yield from metric("findings", "Findings, one a rule and vCPU.", dict(findings))
    yield from metric(
        "fault_verdict",
        "1: this is the verdict.",
        {
            labels(fault=fault, verdict=word): int(word == said)
            for fault, said in result.verdicts.items()
            for word in WORDS
        },
    )
    yield from metric(
        "probe_attached",
        "1: it is observed there.",
        {
            labels(observation=observation, site=site): int(attached)
            for observation, site, attached in seen.attached
        },
    )


def write_failed(result: Result, path: Path, why: str) -> Result:
    """The answer when the text file could not be written: UNKNOWN, unless it is worse."""
    code = result.code or Code.UNKNOWN
    text = f"{result.text}; {path} not written: {why}"
    return Result(code, text, result.verdicts, result.unknown_vms)
