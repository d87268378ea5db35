# SPDX-License-Identifier: MIT
"""Many runs in one stream: the detector sees them all, and each run's answer is taken out again.

One call of the detector costs the same for one event and for a thousand, so a campaign puts its
runs side by side, each with VM numbers of its own.  A run's `base` itself stands for "no VM" in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.detector import Detector
from kvmprobe.analysis.integrity import Integrity, name_of
from kvmprobe.analysis.verdict import Coverage, decide
from kvmprobe.probes.schema import Type, columns
from tests.model.check import Said, join, plan
from tests.model.runs import Run
from tests.streams import tell


@dataclass
class Batch:
    """Runs with a range of VM numbers each."""

    runs: Sequence[Run]
    bases: Sequence[int]

    @staticmethod
    def of(runs: Sequence[Run]) -> Batch:
        """Give each run its VM numbers, one more than it has VMs."""
        sizes = [1 + len(run.number) for run in runs]
        return Batch(runs, [1 + sum(sizes[:n]) for n in range(len(sizes))])

    def stream(self, parts: Sequence[NDArray[Any]], random: Random | None = None) -> NDArray[Any]:
        """Join the rows of all runs, one run after the other, or mixed by `random`."""
        rows = join(parts)
        rows["vm"] += np.repeat(self.bases, [len(part) for part in parts]).astype(np.uint32)
        if random is None:
            return rows
        source = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        mixed = np.random.default_rng(random.randrange(1 << 32)).permutation(source)
        # The nth row of a run goes where the run's number comes up for the nth time.
        out = np.empty_like(rows)
        out[np.argsort(mixed, kind="stable")] = rows
        return out

    def say(self, rows: NDArray[Any], cuts: Iterable[int] = (), *, jit: bool = True) -> BatchSaid:
        """Analyse a stream of all runs, cut into batches."""
        detector, integrity = Detector(jit=jit), Integrity()
        for part in np.split(rows, sorted(cuts)):
            detector.feed(columns(part))
            integrity.feed(columns(part))
        return BatchSaid(self, detector, integrity)


class BatchSaid:
    """What was said of a stream of many runs."""

    def __init__(self, batch: Batch, detector: Detector, integrity: Integrity) -> None:
        """Take the answer apart by run."""
        self._batch, self._integrity = batch, integrity
        ends = [*batch.bases[1:], 1 << 32]
        self._findings: list[list[Any]] = [[] for _ in ends]
        self._acquittals: list[list[Any]] = [[] for _ in ends]
        found, acquitted = detector.findings(), detector.acquittals()
        self.told = tell(found, acquitted)
        for answers, own in ((found, self._findings), (acquitted, self._acquittals)):
            for answer in answers:
                n = int(np.searchsorted(ends, answer.vm, "right"))
                if integrity.trusts(answer.vm, getattr(answer, "vcpu", -1)):
                    own[n].append(replace(answer, vm=answer.vm - batch.bases[n]))

    def of(self, n: int) -> Said:
        """Return what was said of run number `n` of the batch."""
        findings, acquittals = self._findings[n], self._acquittals[n]
        verdicts = decide(findings, acquittals, self._coverage(n))
        return Said(tuple(findings), tuple(acquittals), verdicts)

    def _coverage(self, n: int) -> Coverage:
        run, base, vms = self._batch.runs[n], self._batch.bases[n], self._integrity.vms
        doubts = [vms[vm] for vm in range(base, base + 1 + len(run.number)) if vm in vms]
        lost: dict[str, int] = {}
        for doubt in doubts:
            for kind, records in doubt.lost.items():
                lost[name_of(Type, kind)] = lost.get(name_of(Type, kind), 0) + records
        missing = sum(doubt.missing for doubt in doubts)
        return Coverage(
            attached=Coverage.attached_in(plan(run)),
            lost=lost,
            unexplained=max(0, missing - sum(lost.values())),
            anomalies=sum(doubt.anomalies for doubt in doubts),
        )
