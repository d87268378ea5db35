# SPDX-License-Identifier: MIT
"""What the script draws: lanes, rates and the places of findings, as JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.vms import printable
from kvmprobe.probes.schema import Type
from kvmprobe.report.findings import RuleGroup
from kvmprobe.report.gather import Gathered
from kvmprobe.report.lanes import Lane

#: vCPUs drawn: those with findings first, then the busiest.
MAX_DRAWN = 128
_U32 = (1 << 32) - 1
_PAGE_SHIFT = 12


def packed(values: NDArray[Any], dtype: str) -> str:
    """Return numbers as base64 of little-endian `dtype`, which the script unpacks."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode("ascii")


def drawing(found: Gathered, groups: Sequence[RuleGroup]) -> dict[str, Any]:
    """Return what is drawn over time.

    Times are ns from the first event, as numbers; `start` is that of the first event since the
    recording began.  Bins are numbers of bins of `width` ns from `offset` on.
    """
    rates, lanes = found.rates, found.lanes.lanes()
    first = rates.first_ts
    suspects = {(c.vm, c.vcpu) for group in groups for c in group.cards}
    ranked = sorted(lanes, key=lambda lane: ((lane.vm, lane.vcpu) not in suspects, -lane.events))
    drawn = sorted(ranked[:MAX_DRAWN], key=lambda lane: (lane.vm, lane.vcpu))
    pages: NDArray[np.uint64] = np.unique(
        np.concatenate([np.zeros(1, np.uint64), *(x.gfn for x in drawn)])
    )
    width = 1 << found.lanes.shift
    return {
        "start": found.capture.since_start(first) if rates.seen else 0,
        "span": rates.last_ts - first,
        "lanes": {
            "width": width,
            "offset": (found.lanes.first_bin << found.lanes.shift) - first,
            "undrawn": len(lanes) - len(drawn) + found.lanes.crowd,
            "pages": [f"0x{gfn << _PAGE_SHIFT:x}" for gfn in pages.tolist()],
            "all": [_lane(found, lane, pages) for lane in drawn],
        },
        "rates": {
            "width": 1 << rates.shift,
            "offset": (rates.first_bin << rates.shift) - first,
            "all": [
                {"name": kind.name, "total": int(counts.sum()), "counts": packed(counts, "<f8")}
                for kind, counts in rates.counts().items()
                if counts.any()
            ],
        },
        "findings": [
            {
                "id": card.anchor,
                "rule": group.rule.id,
                "severity": group.rule.severity,
                "vm": card.vm,
                "vcpu": card.vcpu,
                "first": card.first_ts - first,
                "last": card.last_ts - first,
                "marks": [ts - first for ts in card.marks],
            }
            for group in groups
            for card in group.cards
        ],
        "losses": int(rates.counts()[Type.LOSS].sum()),
    }


def _lane(found: Gathered, lane: Lane, pages: NDArray[np.uint64]) -> dict[str, Any]:
    name = found.capture.names.get(lane.vm).name
    return {
        "vm": lane.vm,
        "vcpu": lane.vcpu,
        "name": printable(name or ""),
        "events": lane.events,
        "bin": packed(lane.bin, "<u4"),
        "held": packed(lane.held, "<u4"),
        "after": packed(lane.after, "u1"),
        "levels": packed(lane.levels, "u1"),
        "level": packed(lane.level, "u1"),
        "matches": packed(np.minimum(lane.matches, _U32), "<u4"),
        "hits": packed(np.minimum(lane.hits, _U32), "<u4"),
        "page": packed(np.searchsorted(pages, lane.gfn), "<u2"),
    }
