# SPDX-License-Identifier: MIT
"""Verdicts: proof, silence, and what silence is worth."""

from __future__ import annotations

from typing import Any

import pytest

from kvmprobe.analysis.verdict import Coverage, Verdict, decide, merge, worst
from kvmprobe.analysis.words import FIXED, INCONCLUSIVE, NOT_EXERCISED, VULNERABLE
from kvmprobe.probes.schema import SLOT_APIC, Type
from tests import rule_cases
from tests.streams import APIC_GPA, L2, RAM_GPA, detect, ev, kept, noslot, stream

FULL = frozenset(
    {
        ("FAULTIN", "FAULTIN"),
        ("FILL", "NOSLOT"),
        ("FILL", "MMIO_SPTE"),
        ("CACHE", "ENTRY"),
        ("MATCH", "MATCH_MMIO"),
        ("MATCH", "RSVD"),
        ("MMIO", "MMIO"),
    }
)
HARM = ev(Type.MATCH)
PROOF = kept()


def _judge(
    *events: dict[str, Any],
    without: tuple[tuple[str, str], ...] = (),
    also: tuple[tuple[str, str], ...] = (),
    fault: str = "internal-slot",
    **coverage: Any,  # noqa: ANN401
) -> Verdict:
    detector, findings = detect(stream(events))
    coverage = {"lost": {}} | coverage
    seen = Coverage(FULL.difference(without).union(also), **coverage)
    return decide(findings, detector.acquittals(), seen)[fault]


def test_proof_of_the_fault() -> None:
    verdict = _judge(noslot(), HARM)
    assert verdict.verdict == VULNERABLE
    assert [b.split(":")[0] for b in verdict.basis] == ["internal-slot-fill", "internal-slot-hit"]
    assert verdict.missing == ()


def test_proof_of_the_fix() -> None:
    verdict = _judge(PROOF)
    assert verdict.verdict == FIXED
    assert verdict.basis[0].startswith("internal-slot-fill: 1 fault")
    verdict = _judge(PROOF, PROOF, kept(vm=2))
    assert verdict.basis[0].startswith("internal-slot-fill: 3 fault")


def test_silence() -> None:
    assert _judge().verdict == NOT_EXERCISED
    assert _judge(ev(Type.FILL, slot=-1)).verdict == NOT_EXERCISED


def test_information_convicts_nobody() -> None:
    apic = ev(Type.MMIO, L2, kind=1, addr=APIC_GPA, slot=SLOT_APIC)
    assert _judge(apic).verdict == NOT_EXERCISED


def test_presumed_slot_leaves_the_verdict_open() -> None:
    touch = noslot(rule_cases.DOUBT)
    verdict = _judge(touch, touch)
    assert (verdict.verdict, verdict.missing) == (INCONCLUSIVE, ())
    assert verdict.basis[0].startswith("internal-slot-presumed: 2 on 1 vCPU(s): ")
    # Proof either way closes it.
    assert _judge(touch, PROOF).verdict == FIXED
    assert _judge(touch, HARM).verdict == VULNERABLE
    assert _judge(touch, fault="cache-hits-memory").verdict == NOT_EXERCISED


def test_faults_are_judged_apart() -> None:
    user = ev(Type.MATCH, addr=RAM_GPA, slot=2)
    assert _judge(user).verdict == NOT_EXERCISED
    assert _judge(user, fault="cache-hits-memory").verdict == VULNERABLE
    assert _judge(HARM, fault="cache-hits-memory").verdict == NOT_EXERCISED


@pytest.mark.parametrize("proof", [(), (PROOF,)])
@pytest.mark.parametrize(
    "observation", ["FILL", "FAULTIN", "CACHE", "MATCH", "LIFECYCLE", "type-77"]
)
def test_loss_of_what_is_needed(observation: str, proof: tuple[dict[str, Any], ...]) -> None:
    verdict = _judge(*proof, lost={observation: 1})
    assert verdict.verdict == INCONCLUSIVE
    assert verdict.missing == (f"lost: 1 record of {observation}",)


@pytest.mark.parametrize("observation", ["EMULATE", "SPTE", "FAULT", "MMIO", "GENERATION"])
def test_loss_of_what_is_not_needed(observation: str) -> None:
    assert _judge(PROOF, lost={observation: 10}).verdict == FIXED


def test_no_loss_is_no_loss() -> None:
    assert _judge(PROOF, lost={"FILL": 0}).verdict == FIXED


@pytest.mark.parametrize(
    ("coverage", "word"),
    [
        ({"unexplained": 2}, "2 records of unknown"),
        ({"anomalies": 1}, "no kernel makes"),
        ({"unknown": 5}, "newer"),
        ({"damaged": 1}, "damaged"),
    ],
)
def test_doubt_about_the_capture(coverage: dict[str, Any], word: str) -> None:
    assert _judge(PROOF, **coverage).verdict == INCONCLUSIVE
    verdict = _judge(HARM, **coverage)
    assert verdict.verdict == VULNERABLE
    assert word in verdict.missing[0]


def test_a_cut_capture_counts_up_to_the_cut() -> None:
    verdict = _judge(PROOF, truncated="no end mark")
    assert verdict.verdict == FIXED
    assert verdict.missing == ("the capture ends early: no end mark",)


@pytest.mark.parametrize(
    "without",
    [
        (("MATCH", "MATCH_MMIO"),),
        (("FILL", "NOSLOT"), ("FAULTIN", "FAULTIN")),
        (("FILL", "NOSLOT"), ("CACHE", "ENTRY")),
    ],
)
@pytest.mark.parametrize("proof", [(), (PROOF,)])
def test_absence_of_what_is_needed(
    without: tuple[tuple[str, str], ...], proof: tuple[dict[str, Any], ...]
) -> None:
    verdict = _judge(*proof, without=without)
    assert verdict.verdict == INCONCLUSIVE
    assert all(m.startswith("not observed: ") for m in verdict.missing)
    assert _judge(HARM, without=without).verdict == VULNERABLE


@pytest.mark.parametrize(
    ("without", "also"),
    [
        ((("FILL", "NOSLOT"),), ()),
        ((("FAULTIN", "FAULTIN"),), ()),
        ((("FAULTIN", "FAULTIN"),), (("FAULTIN", "SPTE_REQUESTED"),)),
        ((("FILL", "NOSLOT"), ("CACHE", "ENTRY")), (("FILL", "MARK_MMIO_SPTE"),)),
        ((("MATCH", "RSVD"), ("MMIO", "MMIO")), ()),
    ],
)
def test_alternatives_do(
    without: tuple[tuple[str, str], ...], also: tuple[tuple[str, str], ...]
) -> None:
    assert _judge(without=without, also=also).verdict == NOT_EXERCISED


def test_memory_needs_the_cache_itself() -> None:
    fault = "cache-hits-memory"
    assert _judge(fault=fault).verdict == NOT_EXERCISED
    assert _judge(fault=fault, without=(("CACHE", "ENTRY"),)).verdict == INCONCLUSIVE
    assert _judge(fault=fault, lost={"FAULTIN": 9}).verdict == NOT_EXERCISED


def test_plan_rows() -> None:
    plan: list[dict[str, Any]] = [
        {"observation": "FILL", "site": "NOSLOT", "attached": True},
        {"observation": "MATCH", "site": "MATCH_MMIO", "attached": False},
        {"observation": "CACHE", "site": None, "attached": True},
    ]
    assert Coverage.attached_in(plan) == {("FILL", "NOSLOT"), ("CACHE", "")}


def test_the_worst_counts() -> None:
    assert worst([FIXED, NOT_EXERCISED, INCONCLUSIVE, VULNERABLE]) == VULNERABLE
    assert worst([FIXED, NOT_EXERCISED, INCONCLUSIVE]) == INCONCLUSIVE
    assert worst([FIXED, NOT_EXERCISED]) == NOT_EXERCISED
    assert worst([FIXED]) == FIXED
    assert worst([]) == NOT_EXERCISED
    with pytest.raises(ValueError):
        worst(["fine"])


def test_captures_are_merged_to_the_worst() -> None:
    one = {"internal-slot": Verdict("internal-slot", FIXED, ("a",), ())}
    two = {"internal-slot": Verdict("internal-slot", INCONCLUSIVE, (), ("b",))}
    merged = merge([one, two])["internal-slot"]
    assert (merged.verdict, merged.basis, merged.missing) == (INCONCLUSIVE, (), ("b",))
