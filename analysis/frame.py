# SPDX-License-Identifier: MIT
"""Findings as a DataFrame; pandas is imported here and nowhere else in the analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from kvmprobe.analysis.run import Analysis


def _signed(ns: int) -> int:
    """Bring a time into int64: one that doesn't fit was never a time."""
    return max(-(1 << 63), min(ns, (1 << 63) - 1))


def findings_frame(analysis: Analysis) -> pd.DataFrame:
    """Return one row a finding, in order.

    Columns: capture (index), rule, fault, severity, vm, vm_name, pid, vcpu, level, gpa (uint64),
    slot, slot_confidence, first_ns and last_ns (int64, from the capture's `started`), count,
    per_second (float, NaN for a single occurrence), evidence (events in all).
    """
    numbers = {id(capture): n for n, capture in enumerate(analysis.captures)}
    rows = [
        (
            numbers[id(c)], f.rule.id, f.rule.fault, f.rule.severity, f.vm,
            c.names.get(f.vm).name, c.names.get(f.vm).pid, f.vcpu, f.level, f.gpa,
            -1 if f.slot is None else f.slot, f.slot_confidence, _signed(c.since_start(f.first_ts)),
            _signed(c.since_start(f.last_ts)), f.count, np.nan if f.rate is None else f.rate,
            f.evidence_total,
        )
        for c, f in analysis.findings
    ]  # fmt: skip
    types: dict[str, Any] = {
        "capture": "int64", "rule": "str", "fault": "str", "severity": "str", "vm": "uint32",
        "vm_name": "object", "pid": "Int64", "vcpu": "uint16", "level": "str", "gpa": "uint64",
        "slot": "int32", "slot_confidence": "object", "first_ns": "int64", "last_ns": "int64",
        "count": "uint64", "per_second": "float64", "evidence": "uint64",
    }  # fmt: skip
    columns = dict(zip(types, zip(*rows, strict=True), strict=True)) if rows else {}
    # One array a column: a frame made of rows would pass 64-bit values through floats.
    return pd.DataFrame(
        {name: pd.Series(list(columns.get(name, ())), dtype=kind) for name, kind in types.items()}
    )
