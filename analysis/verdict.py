# SPDX-License-Identifier: MIT
"""From findings, proofs and what could be observed to one verdict a fault.

`vulnerable` rests on proof and outranks everything.  Without proof, silence is worth what could be
observed: an observation that the fault's rules need and that was lost, or never attached, makes the
verdict `inconclusive`, proof of a right kernel or not.  Then proof gives `fixed`, and no proof
`not exercised`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from kvmprobe.analysis.findings import Acquittal, Finding
from kvmprobe.analysis.rules import FAULTS, RULES
from kvmprobe.analysis.rules.model import Observation, Rule
from kvmprobe.analysis.words import FIXED, INCONCLUSIVE, NOT_EXERCISED, VERDICTS, VULNERABLE


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one fault, what it rests on, and what was not to be seen."""

    fault: str
    verdict: str
    basis: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """What a stream of events could show, of all VMs or of one.

    `attached` are (observation, site) names; `lost` records by observation's name; `unexplained`
    records missing from the sequence without a LOSS event; `unknown` events of types this version
    doesn't know; `damaged` batches that were refused; `truncated` why the capture ends early.
    """

    attached: frozenset[tuple[str, str]]
    lost: Mapping[str, int]
    unexplained: int = 0
    anomalies: int = 0
    unknown: int = 0
    damaged: int = 0
    truncated: str | None = None

    @staticmethod
    def attached_in(plan: Iterable[Mapping[str, Any]]) -> frozenset[tuple[str, str]]:
        """Return what a capture's header says was attached."""
        return frozenset((row["observation"], row["site"] or "") for row in plan if row["attached"])

    @property
    def whole(self) -> bool:
        """Whether nothing is known to be missing or wrong in what was recorded."""
        doubts = self.unexplained, self.anomalies, self.unknown, self.damaged
        return not any(self.lost.values()) and not any(doubts)

    def sees(self, wanted: Observation) -> bool:
        """Whether an observation was attached at one of the sites that give it in full."""
        if not wanted.sites:
            return any(name == wanted.type.name for name, _ in self.attached)
        return any((wanted.type.name, site.name) in self.attached for site in wanted.sites)


def _records(count: int) -> str:
    return f"{count} record{'' if count == 1 else 's'}"


@cache
def _needed(fault: str) -> frozenset[str]:
    """Name the observations of which a loss may hide the fault, or the proof of its absence."""
    # A new VM or vCPU that isn't told from the old one confuses what is remembered of it.
    needed = {"LIFECYCLE"}
    for rule in RULES:
        if rule.fault == fault and rule.convicts:
            needed.update(wanted.type.name for group in rule.needs.convicts for wanted in group)
            needed.update(wanted.type.name for wanted in rule.needs.acquits)
    return frozenset(needed)


@lru_cache(maxsize=64)
def _unseen(fault: str, attached: frozenset[tuple[str, str]]) -> tuple[str, ...]:
    """Say which observations the fault's rules need and nothing gives."""
    coverage = Coverage(attached, {})
    unseen: dict[str, None] = {}
    for rule in RULES:
        if rule.fault != fault or not rule.convicts:
            continue
        for group in rule.needs.convicts:
            if not any(coverage.sees(wanted) for wanted in group):
                names = ", nor ".join(str(wanted) for wanted in group)
                unseen[f"not observed: {names} ({rule.id})"] = None
    return tuple(unseen)


def _missing(fault: str, coverage: Coverage) -> tuple[str, ...]:
    """Say what must be known and isn't, before silence about the fault means anything."""
    needed = _needed(fault)
    missing = dict.fromkeys(_unseen(fault, coverage.attached))
    for observation, records in coverage.lost.items():
        if records and (observation in needed or observation.startswith("type-")):
            missing[f"lost: {_records(records)} of {observation}"] = None
    if coverage.unexplained:
        missing[f"lost: {_records(coverage.unexplained)} of unknown observations"] = None
    if coverage.anomalies:
        missing[f"no kernel makes: {_records(coverage.anomalies)}"] = None
    if coverage.unknown:
        missing[f"not understood: {_records(coverage.unknown)} of a newer kvmprobe"] = None
    if coverage.damaged:
        missing[f"refused: {coverage.damaged} damaged part(s) of the capture"] = None
    return tuple(missing)


def decide(
    findings: Sequence[Finding],
    acquittals: Sequence[Acquittal],
    coverage: Coverage,
    shown: Collection[str] = (),
) -> dict[str, Verdict]:
    """Return the verdict on each fault, of a whole stream or of one VM, by the fault's name.

    Args:
        findings: what the detector found.
        acquittals: the detector's proofs of a right kernel.
        coverage: what could be seen.
        shown: faults that another VM shows this kernel to have.

    """
    return {fault: _decide(fault, findings, acquittals, coverage, shown) for fault in FAULTS}


def _decide(
    fault: str,
    findings: Sequence[Finding],
    acquittals: Sequence[Acquittal],
    coverage: Coverage,
    shown: Collection[str],
) -> Verdict:
    missing = _missing(fault, coverage)
    basis = _basis(fault, findings, lambda rule: rule.convicts)
    proven: Counter[Rule] = Counter()
    for acquittal in acquittals:
        if acquittal.rule.fault == fault:
            proven[acquittal.rule] += acquittal.count
    proofs = tuple(f"{rule.id}: {count} {rule.acquittal}" for rule, count in proven.items())
    if basis:
        verdict = VULNERABLE
    elif missing:
        verdict, basis = INCONCLUSIVE, proofs
    elif fault in shown:
        verdict = NOT_EXERCISED
        basis = (
            "nothing happened to this VM, but another one shows that the kernel has the fault",
        )
    elif proofs:
        verdict, basis = FIXED, proofs
    elif doubts := _basis(fault, findings, lambda rule: rule.doubts):
        verdict, basis = INCONCLUSIVE, doubts
    else:
        verdict = NOT_EXERCISED
        basis = ("nothing happened that shows the fault or proves the kernel free of it",)
    if coverage.truncated:
        # What is there was checked to the last whole batch, losses included: it says as much as a
        # recording that was stopped there.
        missing = (*missing, f"the capture ends early: {coverage.truncated}")
    return Verdict(fault, verdict, basis, missing)


def _basis(
    fault: str, findings: Sequence[Finding], wanted: Callable[[Rule], bool]
) -> tuple[str, ...]:
    """Say what the findings of those rules on a fault show."""
    return tuple(
        f"{rule.id}: {sum(f.count for f in own)} on {len(own)} vCPU(s): {rule.proves}"
        for rule in RULES
        if rule.fault == fault
        and wanted(rule)
        and (own := [f for f in findings if f.rule.id == rule.id])
    )


def worst(verdicts: Iterable[str]) -> str:
    """Return the worst of some verdicts; `not exercised` for none.

    Raises:
        ValueError: one of them is no verdict.

    """
    ranked = sorted(verdicts, key=VERDICTS.index)
    return ranked[0] if ranked else NOT_EXERCISED


def merge(verdicts: Sequence[Mapping[str, Verdict]]) -> dict[str, Verdict]:
    """Join several captures' verdicts: each fault's worst one, with what that one rests on.

    Proof from one capture isn't proof for another, which may be of another kernel.
    """
    merged = {}
    for fault in FAULTS:
        each = [v[fault] for v in verdicts if fault in v]
        verdict = worst(v.verdict for v in each)
        basis = dict.fromkeys(b for v in each if v.verdict == verdict for b in v.basis)
        missing = dict.fromkeys(m for v in each for m in v.missing)
        merged[fault] = Verdict(fault, verdict, tuple(basis), tuple(missing))
    return merged
