# SPDX-License-Identifier: MIT
"""What a trace could show, as a capture's plan: which tracepoints were recorded."""

from __future__ import annotations

from typing import Any

from kvmprobe.formats.points import TRACEPOINTS
from kvmprobe.formats.records import Point, Tally
from kvmprobe.probes.schema import Site, Type

_SHOWS = (
    (Type.FAULT, Site.PAGE_FAULT_TP, Point.PAGE_FAULT),
    (Type.FAULTIN, Site.SPTE_REQUESTED, Point.SPTE_REQUESTED),
    (Type.FILL, Site.MARK_MMIO_SPTE, Point.MARK_MMIO),
    (Type.FILL, Site.MMIO_SPTE, Point.HANDLE_MMIO),
    (Type.MATCH, Site.MATCH_MMIO, Point.MATCH),
    (Type.MMIO, Site.MMIO, Point.MMIO),
    (Type.EMULATE, Site.EMULATE_INSN, Point.EMULATE),
    (Type.SPTE, Site.MARK_MMIO_SPTE, Point.MARK_MMIO),
    (Type.SPTE, Site.CHECK_MMIO_SPTE, Point.CHECK_MMIO),
    (Type.NESTING, Site.NESTED_TP, Point.NESTED_ENTER),
    (Type.SMM, Site.NESTED_TP, Point.SMM),
)
_BLIND = (
    (Type.CACHE, "the MMIO cache is in no tracepoint"),
    (Type.MEMSLOT, "memslots are in no tracepoint"),
    (Type.GENERATION, "generations are in no tracepoint"),
)


def plan_of(tally: Tally) -> list[dict[str, Any]]:
    """The plan rows of a converted capture.

    A perf.data says which tracepoints were recorded.  Elsewhere a tracepoint that never occurred
    counts as recorded only where its whole system evidently was.
    """
    first = {tracepoint.point: tracepoint for tracepoint in reversed(TRACEPOINTS)}
    plan = []
    for kind, site, point in _SHOWS:
        tracepoint = first[point]
        if point in tally.seen:
            attached, reason = True, "in the trace"
        elif tally.enabled is not None and point in tally.enabled:
            attached, reason = True, "recorded, and never occurred"
        elif tracepoint.system in tally.systems:
            attached = True
            reason = f"presumed: the trace holds tracepoints of all of {tracepoint.system}"
        else:
            attached, reason = False, "not in the trace"
        plan.append(
            {
                "observation": kind.name,
                "site": site.name,
                "attachment": f"tracepoint {tracepoint.name}",
                "attached": attached,
                "reason": reason,
            }
        )
    plan += [
        {
            "observation": kind.name,
            "site": None,
            "attachment": None,
            "attached": False,
            "reason": reason,
        }
        for kind, reason in _BLIND
    ]
    return plan
