# SPDX-License-Identifier: MIT
"""What the detector must say of a run, and whether it does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.findings import Acquittal, Finding
from kvmprobe.analysis.judge import Judge
from kvmprobe.analysis.rules import RULES
from kvmprobe.analysis.verdict import Verdict
from kvmprobe.capture.points import FUNCTIONS, TRACEPOINTS
from kvmprobe.probes.schema import EVENT, NO_VCPU, LossCause, Site, Type, columns
from tests.model.runs import Run
from tests.model.truth import APIC_GFN, HIDDEN_SLOTS, Happening, What

Key = tuple[int, int, str]  # vm, vcpu, rule


@dataclass
class Expected:
    """What one rule must find on one vCPU: occurrences within bounds, on these pages and slots."""

    least: int = 0
    most: int = 0
    bounded: bool = True
    where: set[tuple[int, int]] = field(default_factory=set)

    def add(self, h: Happening, *, counted: bool, sure: bool) -> None:
        """Take in a happening; `counted`: each is one occurrence, not only a sign of some."""
        self.where.add((h.gfn, h.slot))
        self.bounded &= counted
        self.most += 1
        if h.clean and sure:
            self.least = self.least + 1 if counted else max(self.least, 1)


def rule_of(h: Happening) -> str | None:
    """Name the rule that a happening is found by."""
    hidden = h.slot in HIDDEN_SLOTS
    if h.what is What.HIDDEN:
        return "internal-slot-fill" if h.l2 else "noslot-from-l1"
    if h.what is What.APIC:
        return "apic-page-emulated"
    if h.l2:
        return None
    if h.what is What.ARMED and hidden:
        return "internal-slot-armed"
    if h.what is What.MISREAD and hidden:
        return "internal-slot-hit"
    if h.what in (What.ARMED, What.MISREAD) and not h.smm_seen:
        return "cache-hits-memory"
    return None


def expected(run: Run) -> dict[Key, Expected]:
    """Return what is to be found by the rules of which the count is known."""
    found: dict[Key, Expected] = defaultdict(Expected)
    unsure: dict[Key, int] = defaultdict(int)
    for h in run.truth.happenings:
        rule = rule_of(h)
        if rule is None or h.vm not in run.number:
            continue
        key = run.number[h.vm], h.vcpu, rule
        # Without function probes a fill that makes no MMIO SPTE at once shows late or not at all.
        late = (h.vm, h.vcpu) in run.truth.retried or not run.kind.mmio_caching
        sure = run.probes.functions or not late or h.what is not What.HIDDEN
        # An entry that is a fill of L1's own shows as that until something else changes.
        sure &= h.what is not What.ARMED or not (run.kind.hides_from_l1 or run.kind.keeps_entries)
        found[key].add(h, counted=h.what is not What.ARMED, sure=sure)
        unsure[key] += not h.clean
    for key, e in found.items():
        # One open question may join two occurrences into one; tracepoints alone can join more.
        if unsure[key] or not run.probes.functions:
            e.least = min(e.least, 1)
    return dict(found)


def plan(run: Run) -> list[dict[str, Any]]:
    """Return what the recording's header says was attached."""
    return _plan(run.probes.functions)


@cache
def _plan(functions: bool) -> list[dict[str, Any]]:
    points = [*(FUNCTIONS if functions else ())]
    sees = [s for p in points for s in p.sees]
    played = {p.role for p in points}
    sees += [s for p in TRACEPOINTS if p.instead_of not in played for s in p.sees]
    return [{"observation": t.name, "site": s.name, "attached": True} for t, s in sees]


@dataclass
class Said:
    """What the detector and the verdicts say of rows."""

    findings: tuple[Finding, ...]
    acquittals: tuple[Acquittal, ...]
    verdicts: Mapping[str, Verdict]


def say(run: Run, rows: NDArray[Any], cuts: Iterable[int] = ()) -> Said:
    """Analyse rows, cut into batches, as analyze() does."""
    judge = Judge(plan(run))
    for part in np.split(rows, sorted(cuts)):
        judge.feed(columns(part))
    report = judge.report()
    return Said(report.findings, report.acquittals, report.verdicts)


def _own_evidence(f: Finding) -> set[tuple[int, int]]:
    """Where the finding's own evidence lies: causes that it cites lie elsewhere."""
    cites = f.rule.id in ("internal-slot-armed", "internal-slot-hit")
    rows = [r for r in f.evidence if not (cites and r["type"] in (Type.FILL, Type.FAULTIN))]
    return {(int(r["addr"]) >> 12, int(r["slot"])) for r in rows}


def problems(run: Run, said: Said, *, whole: bool) -> list[str]:
    """Compare what was said with what happened; `whole`: nothing was lost."""
    wanted = expected(run)
    wrong = []
    known = {rule.id for rule in RULES}
    covered = {"internal-slot-fill", "noslot-from-l1", "apic-page-emulated",
               "internal-slot-armed", "internal-slot-hit", "cache-hits-memory"}  # fmt: skip
    got: set[Key] = set()
    for f in said.findings:
        key = f.vm, f.vcpu, f.rule.id
        if f.rule.id not in covered:
            wrong += _sibling_problems(run, f)
            continue
        got.add(key)
        e = wanted.get(key)
        if e is None:
            wrong.append(f"false finding {key} at {f.gpa:#x}")
            continue
        if e.bounded and f.count > e.most:
            wrong.append(f"{key}: {f.count} times, at most {e.most} happened")
        if whole and f.count < e.least:
            wrong.append(f"{key}: {f.count} times, at least {e.least} happened")
        if not _own_evidence(f) <= e.where:
            wrong.append(f"{key}: evidence elsewhere: {_own_evidence(f) - e.where}")
        level = "L2" if f.rule.id in ("internal-slot-fill", "apic-page-emulated") else "L1"
        if f.level != level:
            wrong.append(f"{key}: level {f.level}")
    if whole:
        missed = [k for k, e in wanted.items() if e.least and k not in got and k[2] in known]
        wrong += [f"missed {key}" for key in missed]
        wrong += _missed_siblings(run, said)
    return wrong + _verdict_problems(run, said, whole=whole)


def _verdict_problems(run: Run, said: Said, *, whole: bool) -> list[str]:
    seen = [h for h in run.truth.happenings if h.vm in run.number]
    bad = [h for h in seen if rule_of(h) and rule_of(h) not in ("apic-page-emulated",)
           and h.slot in HIDDEN_SLOTS]  # fmt: skip
    good = [h for h in seen if h.what is What.KEPT]
    verdict = said.verdicts["internal-slot"].verdict
    sure_bad = any(h.clean for h in bad) and any(
        e.least for k, e in expected(run).items() if k[2] in _INTERNAL
    )
    allowed: set[str] = set()
    if bad:
        allowed.add("vulnerable")
    if not sure_bad:
        if good:
            allowed.add("fixed")
        if not any(h.clean for h in good):
            allowed.add("not exercised")
    wrong = []
    if whole:
        kept = sum(a.count for a in said.acquittals if a.rule.id == "internal-slot-fill")
        if not sum(h.clean for h in good) <= kept <= len(good):
            wrong.append(f"{kept} acquittals of {len(good)}")
    else:
        allowed |= {"inconclusive"}
        if not sure_bad:  # what proved the kernel right may be what was lost
            allowed.add("not exercised")
    if verdict not in allowed:
        wrong.append(f"internal-slot: {verdict}, not of {sorted(allowed)}")
    if run.kind.hides_internal and verdict == "fixed":
        wrong.append("internal-slot: fixed, of a kernel that has the fault")
    for fault, v in said.verdicts.items():
        convicted = any(f.rule.fault == fault and f.rule.convicts for f in said.findings)
        if (v.verdict == "vulnerable") != convicted:
            wrong.append(f"{fault}: {v.verdict}")
    return wrong


_INTERNAL = tuple(rule.id for rule in RULES if rule.fault == "internal-slot" and rule.convicts)


def _sibling_problems(run: Run, f: Finding) -> list[str]:
    """Findings of rules for other faults: only on kernels and in runs that have them."""
    what = {h.what for h in run.truth.happenings if run.number.get(h.vm) == f.vm}
    allowed = {
        "address-space-mixup": run.kind.as0_generation,
        "address-space-generation": run.kind.as0_generation,
        "spte-overwrite": run.kind.overwrites_spte and What.OVERWROTE in what,
        "unexplained-mmio": What.UNEXPLAINED in what,
    }
    return [] if allowed.get(f.rule.id, False) else [f"false finding {f.rule.id} at {f.gpa:#x}"]


def _missed_siblings(run: Run, said: Said) -> list[str]:
    """What rules for other faults must have found, where there are such rules.

    A harmless hit at the APIC page need not show: KVM emulates that page without asking the cache.
    """
    by_what = {
        What.MIXED_UP: "address-space-mixup",
        What.HARMLESS: "address-space-generation",
        What.OVERWROTE: "spte-overwrite",
        What.UNEXPLAINED: "unexplained-mmio",
    }
    rules = {rule.id for rule in RULES}
    wanted = {
        (run.number[h.vm], h.vcpu, by_what[h.what])
        for h in run.truth.happenings
        if h.what in by_what
        and h.clean
        and h.vm in run.number
        and by_what[h.what] in rules
        and not (h.what is What.HARMLESS and h.gfn == APIC_GFN)
    }
    got = {(f.vm, f.vcpu, f.rule.id) for f in said.findings}
    return [f"missed {key}" for key in sorted(wanted - got)]


# Losses, cuts and orders.


def lose(run: Run, random: Random, *, counted: bool) -> NDArray[Any]:
    """Drop records: told by LOSS events, or only by the gaps they leave in a vCPU's sequence."""
    rows = run.rows
    share = random.choice((0.01, 0.1, 0.5))
    drop = np.array([random.random() < share for _ in range(len(rows))], np.bool_)
    if not counted:
        drop &= _between(rows)
    parts: list[NDArray[Any]] = []
    for part, lost in _drains(rows, drop, random):
        parts.append(part[~lost])
        if counted:
            parts.append(_loss_rows(_count(part[lost]), random.choice((1, 3, 6))))
    return join([*parts, _loss_rows(run.probes.lost, None)])


def join(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Join rows; as plain bytes, for numpy takes long to find that the fields are the same."""
    whole: NDArray[Any] = np.concatenate([part.view(_BYTES) for part in parts])
    return whole.view(EVENT)


_BYTES = np.dtype((np.void, EVENT.itemsize))


def with_losses(run: Run) -> NDArray[Any]:
    """Return a run's rows, and what its probes know to have missed."""
    return join([run.rows, _loss_rows(run.probes.lost, None)])


def _between(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Rows of vCPUs that leave a gap: not the first and not the last of their vCPU."""
    key = rows["vm"].astype(np.int64) << 16 | rows["vcpu"]
    inner = np.zeros(len(rows), np.bool_)
    for k in np.unique(key).tolist():
        own = np.flatnonzero(key == k)
        inner[own[1:-1]] = k & 0xFFFF != NO_VCPU
    return inner


def _drains(
    rows: NDArray[Any], drop: NDArray[np.bool_], random: Random
) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
    cuts = sorted(random.randrange(len(rows) + 1) for _ in range(3))
    return list(zip(np.split(rows, cuts), np.split(drop, cuts), strict=True))


def _count(rows: NDArray[Any]) -> dict[tuple[int, int], int]:
    kinds, counts = np.unique(rows["type"], return_counts=True)
    return {(int(k), 0): int(n) for k, n in zip(kinds, counts, strict=True)}


def _loss_rows(lost: dict[tuple[int, int], int], cause: int | None) -> NDArray[Any]:
    out = np.zeros(len(lost), EVENT)
    for row, ((kind, own), records) in zip(out, sorted(lost.items()), strict=True):
        row["type"], row["site"], row["vcpu"] = Type.LOSS, Site.DRAIN, NO_VCPU
        row["kind"], row["addr"], row["slot"] = kind, records, -1
        row["len"] = LossCause(own if cause is None else cause)
    return out


def reorder(rows: NDArray[Any], random: Random) -> NDArray[Any]:
    """Interleave vCPUs in another way: each keeps its own order, and a VM's end comes last."""
    own: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (vm, vcpu) in enumerate(zip(rows["vm"].tolist(), rows["vcpu"].tolist(), strict=True)):
        own[vm, vcpu].append(i)
    queues = [v[::-1] for k, v in own.items() if k[1] != NO_VCPU]
    ends = [i for k, v in own.items() if k[1] == NO_VCPU for i in v]
    order = []
    while queues:
        queue = random.choice(queues)
        order.append(queue.pop())
        if not queue:
            queues.remove(queue)
    return rows[order + ends]
