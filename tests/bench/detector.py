# SPDX-License-Identifier: MIT
"""The detector, compiled and not, beside itself without rules and what pandas can answer of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis import steps
from kvmprobe.analysis.detector import Detector
from kvmprobe.analysis.jit import Scan, available
from kvmprobe.analysis.judge import Judge
from kvmprobe.errors import KvmprobeError
from kvmprobe.probes import schema
from kvmprobe.probes.schema import Columns, Flag, Type
from tests.bench.events import stream
from tests.bench.result import Result, millions

TURNS = 5
ROWS = 65536
BATCHES = 64
#: Batches for the ways that are too slow for all of them.
FEW = 4


@cache
def _scan_without_rules() -> Scan:
    """The compiled step loop with no rule to ask; kept nowhere: numba would mix the two up."""
    import numba
    from numba.extending import register_jitable

    def none(event: Any, words: Any, at: Any, rules: Any, codes: Any) -> int:  # noqa: ANN401
        return 0

    uncounted: dict[str, Any] = {"_nrt": False}  # as analysis.jit.compiled() has it
    for helper in (none, steps.find, steps.begin):
        register_jitable(forceinline=True, **uncounted)(helper)
    plain = FunctionType(steps.scan.__code__, {**vars(steps), "STEP_ALL": none})
    return cast(Scan, numba.njit(plain, nogil=True, **uncounted))


class _WithoutRules(Detector):
    """The same picking of events, and the same loop."""

    def _compile_when_due(self) -> None:
        self._scan = _scan_without_rules()


def _detect(batches: list[Columns], *, jit: bool, kind: type[Detector] = Detector) -> None:
    detector = kind(jit=jit)
    for batch in batches:
        detector.feed(batch)


def _judge(batches: list[Columns], *, jit: bool) -> None:
    judge = Judge((), jit=jit)
    for batch in batches:
        judge.feed(batch)


def _pandas(batches: list[Columns]) -> int:
    """Count the MMIO accesses at the gfn and generation that their vCPU cached last."""
    import pandas as pd

    # A key of its own per column: signed, for pandas makes floats of unsigned ones with gaps.
    frame = pd.DataFrame(
        {
            name: np.concatenate([batch[name] for batch in batches]).astype("i8")
            for name in ("vm", "vcpu", "type", "addr", "gen")
        }
    )
    fill = frame["type"] == Type.FILL
    cached = frame[["addr", "gen"]].where(fill)
    cached = cached.groupby([frame["vm"], frame["vcpu"]], sort=False).ffill()
    believed = (cached["addr"] == frame["addr"]) & (cached["gen"] == frame["gen"])
    return int((believed & (frame["type"] == Type.MMIO)).sum())


def _batches(rows: NDArray[Any]) -> list[Columns]:
    """Cut into batches of whole columns, as readers give them."""
    parts = (schema.columns(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS))
    return [{name: np.ascontiguousarray(part[name]) for name in part} for part in parts]


def run() -> Result:
    """Measure; KvmprobeError without numba."""
    if not available():
        raise KvmprobeError("numba is missing: install kvmprobe[fast]")
    calm = stream(BATCHES * ROWS)
    busy = calm.copy()
    busy["slot"] = 5
    busy["flags"] |= int(Flag.UNSTABLE)
    guilty = calm.copy()
    guilty["slot"] = 5
    streams = {
        "calm": _batches(calm),
        "memory behind every address": _batches(busy),
        "the fault at every access": _batches(guilty),
    }
    ways: list[tuple[str, str, int, Callable[[list[Columns]], object]]] = [
        ("detector, numba", "calm", BATCHES, lambda b: _detect(b, jit=True)),
        ("detector, no numba", "calm", BATCHES, lambda b: _detect(b, jit=False)),
        ("all of an analysis, numba", "calm", BATCHES, lambda b: _judge(b, jit=True)),
        ("all of an analysis, no numba", "calm", BATCHES, lambda b: _judge(b, jit=False)),
        ("pandas groupby", "calm", BATCHES, _pandas),
        (
            "detector, numba",
            "memory behind every address",
            BATCHES,
            lambda b: _detect(b, jit=True),
        ),
        (
            "detector, no numba",
            "memory behind every address",
            FEW,
            lambda b: _detect(b, jit=False),
        ),
        *(
            (f"detector, numba{of}", name, BATCHES, way)
            for name in streams
            for of, way in (
                (", no rules", lambda b: _detect(b, jit=True, kind=_WithoutRules)),
                (", all rules", lambda b: _detect(b, jit=True)),
            )
        ),
    ]
    rates: list[list[float]] = [[] for _ in ways]
    for kind in (Detector, _WithoutRules):
        _detect(streams["memory behind every address"][:2], jit=True, kind=kind)  # compiles
    _judge(streams["calm"][: BATCHES // 2], jit=True)  # compiles once there are many
    _pandas(streams["calm"][:1])  # imports
    for _ in range(TURNS):
        for (_, name, count, way), reached in zip(ways, rates, strict=True):
            batches = streams[name][:count]
            start = time.perf_counter()
            way(batches)
            reached.append(count * ROWS / (time.perf_counter() - start))
    medians = [statistics.median(reached) for reached in rates]
    costs = [
        f"{1 - each / without:.0%}"
        for without, each in zip(medians[-6::2], medians[-5::2], strict=True)
    ]
    return Result(
        "Detector",
        f"{len(calm) / 1e6:.1f} M made-up events of 16 vCPUs in batches of {ROWS} rows, {TURNS} "
        "turns, one thread, all rules. Calm: no memslot behind any address, which is what a "
        "healthy host shows; the other stream makes the rules look at every fill, match and "
        f"access. The interpreter gets {FEW * ROWS} of those. The third makes a finding of every "
        "match and access, as no real host does. pandas answers one question only: which accesses "
        "hit what their vCPU had cached last. No rules: the same events are picked and stepped "
        "over, each vCPU is found, and no rule is asked.",
        ("way", "stream", "median events/s"),
        [
            (way, name, millions(median))
            for (way, name, _, _), median in zip(ways, medians, strict=True)
        ],
        f"{millions(medians[0])} events/s with numba on the calm stream (wanted: 50 M), "
        f"{millions(medians[5])} on the other; {medians[0] / medians[4]:.0f} and "
        f"{medians[5] / medians[4]:.0f} times pandas. All rules together cost the detector "
        f"{costs[0]} of its speed on the calm stream, {costs[1]} on the other and {costs[2]} where "
        "every access is a finding (wanted: no more than a third)",
    )
