# SPDX-License-Identifier: MIT
"""Each rule against streams of which the truth is known: the hit, and every near miss."""

from __future__ import annotations

from typing import Any

import pytest

from kvmprobe.analysis.rules import FAULTS, RULES, rule
from kvmprobe.analysis.rules.model import SEVERITIES
from kvmprobe.probes.schema import SLOT_APIC, SLOT_IDENTITY, Flag, Site, Type
from tests import rule_cases
from tests.streams import (
    APIC_GPA,
    IDENTITY_GPA,
    L1,
    L2,
    LIVE,
    RAM_GPA,
    UNKNOWN,
    detect,
    ev,
    gone,
    kept,
    noslot,
    stream,
)

Events = list[dict[str, Any]]

FILL, CACHE, MATCH, MMIO = Type.FILL, Type.CACHE, Type.MATCH, Type.MMIO
RAM: dict[str, Any] = {"addr": RAM_GPA, "slot": 3}
APIC: dict[str, Any] = {"addr": APIC_GPA, "slot": SLOT_APIC}
AT_IDENTITY: dict[str, Any] = {"addr": IDENTITY_GPA, "slot": SLOT_IDENTITY}
SMM_USED = Flag.TWO_AS | Flag.SMM_SEEN
RSVD: dict[str, Any] = {"site": Site.RSVD}

#: rule -> name of the case -> (events, occurrences).  Other rules may find things too.
HITS: dict[str, dict[str, tuple[Events, int]]] = {
    "internal-slot-fill": {
        "fill of the TSS": ([ev(FILL, L2)], 1),
        "fill of the identity map": ([ev(FILL, L2, **AT_IDENTITY)], 1),
        "fill seen by difference": ([ev(FILL, L2, site=Site.ENTRY)], 1),
        "presumed slot": ([ev(FILL, L2 | Flag.SLOT_PRESUMED)], 1),
        "no-slot fault alone": ([noslot()], 1),
        "fault, then its fill": ([noslot(), ev(FILL, L2)], 1),
        "fill, then its tracepoint": ([ev(FILL, L2), noslot(site=Site.SPTE_REQUESTED)], 1),
        "two faults with their fills": ([noslot(), ev(FILL, L2)] * 2, 2),
        "two fills": ([ev(FILL, L2)] * 2, 2),
        "generation known": ([ev(FILL, L2 | LIVE)], 1),
        "fault and fill of two pages": ([noslot(), ev(FILL, L2, **AT_IDENTITY)], 2),
        "a retried fault": ([noslot(), noslot(), ev(FILL, L2)], 2),
        "top of the address space": ([ev(FILL, L2, addr=(1 << 64) - 4096)], 1),
    },
    "internal-slot-armed": {
        "found live in L1": ([ev(CACHE, L1 | LIVE)], 1),
        "poisoned before the recording": ([ev(CACHE, L1 | LIVE, site=Site.ENTRY)], 1),
        "identity map": ([ev(CACHE, L1 | LIVE, **AT_IDENTITY)], 1),
        "in SMM, kernel not known to be fixed": (
            [ev(CACHE, L1 | Flag.SMM | Flag.AS_KNOWN | Flag.GEN_KNOWN | Flag.GEN_IS_AS0)], 1,
        ),
        "in SMM, filled outside": (
            [ev(CACHE, rule_cases.IN_SMM | rule_cases.AS0 | rule_cases.FILLED_THERE)], 1,
        ),
        "in SMM, entry of the vCPU's own generation": (
            [ev(CACHE, L1 | Flag.SMM | Flag.AS_KNOWN | Flag.GEN_KNOWN | Flag.GEN_IS_CURRENT)], 1,
        ),
    },
    "internal-slot-hit": {
        "match by gpa": ([ev(MATCH, L1 | Flag.BY_GPA)], 1),
        "match by gva": ([ev(MATCH, L1)], 1),
        "write": ([ev(MATCH, L1 | Flag.WRITE)], 1),
        "reserved-bit fault alone": ([ev(MATCH, L1, **RSVD)], 1),
        "reserved-bit fault, generation known": ([ev(MATCH, L1 | LIVE, **RSVD)], 1),
        "reserved-bit fault and its match": ([ev(MATCH, L1, **RSVD), ev(MATCH)], 1),
        "two accesses": ([ev(MATCH)] * 2, 2),
        "in SMM, filled outside": (
            [ev(MATCH, rule_cases.IN_SMM | rule_cases.AS0 | rule_cases.FILLED_THERE)], 1,
        ),
        "reserved-bit fault, then another page": (
            [ev(MATCH, L1, **RSVD), ev(MATCH, **AT_IDENTITY)], 2,
        ),
    },
    "noslot-from-l1": {
        "fill": ([ev(FILL, L1)], 1),
        "no-slot fault": ([noslot(L1)], 1),
        "both": ([noslot(L1), ev(FILL, L1)], 1),
        "identity map": ([noslot(L1, **AT_IDENTITY)], 1),
    },
    "cache-hits-memory": {
        "held": ([ev(CACHE, L1 | LIVE, **RAM)], 1),
        "filled": ([ev(FILL, L1 | LIVE, **RAM)], 1),
        "believed": ([ev(MATCH, L1, **RAM)], 1),
        "reserved-bit fault and its match": ([ev(MATCH, L1, **RSVD, **RAM), ev(MATCH, **RAM)], 1),
        "in SMM before, but filled here": (
            [ev(MATCH, L1 | LIVE | SMM_USED | Flag.AS_KNOWN | Flag.FILL_AS_KNOWN, **RAM)], 1,
        ),
        "two address spaces, never in SMM": ([ev(MATCH, L1 | Flag.TWO_AS, **RAM)], 1),
        "slot 0": ([ev(MATCH, L1, addr=RAM_GPA, slot=0)], 1),
        "the highest user slot": ([ev(MATCH, L1, addr=RAM_GPA, slot=32763)], 1),
    },
    "apic-page-emulated": {
        "read": ([ev(MMIO, L2, kind=1, **APIC)], 1),
        "writes": ([ev(MMIO, L2, kind=2, **APIC)] * 3, 3),
    },
}  # fmt: skip

#: rule -> name of the case -> events in which the rule must find nothing.
MISSES: dict[str, dict[str, Events]] = {
    "internal-slot-fill": {
        "L1": [ev(FILL, L1), noslot(L1)],
        "level unknown": [ev(FILL, UNKNOWN), noslot(UNKNOWN)],
        "L2 without knowing it": [ev(FILL, Flag.L2)],
        "memslots changed meanwhile": [ev(FILL, L2 | Flag.UNSTABLE), noslot(L2 | Flag.UNSTABLE)],
        "slot on its way out": [ev(FILL, L2 | Flag.SLOT_INVALID), noslot(L2 | Flag.SLOT_INVALID)],
        "APIC page": [ev(FILL, L2, **APIC), noslot(**APIC)],
        "TSS slot at the APIC's address": [ev(FILL, L2, addr=APIC_GPA)],
        "gfn 0": [ev(FILL, L2, addr=0), noslot(addr=0xFFF)],
        "true hole": [ev(FILL, L2, slot=-1), noslot(slot=-1)],
        "user slot": [ev(FILL, L2, **RAM), noslot(**RAM)],
        "fault kept": [kept()],
        "fault failed": [ev(Type.FAULTIN, L2, kind=3)],
        "fault's exit not seen": [ev(Type.FAULTIN, L2, kind=0)],
        "match only": [ev(MATCH, L2)],
        "fill read back too late": [ev(FILL, L2 | Flag.GEN_KNOWN)],
    },
    "internal-slot-armed": {
        "L2": [ev(CACHE, L2 | LIVE)],
        "level unknown": [ev(CACHE, LIVE)],
        "memslots changed meanwhile": [ev(CACHE, L1 | LIVE | Flag.UNSTABLE)],
        "slot on its way out": [ev(CACHE, L1 | LIVE | Flag.SLOT_INVALID)],
        "old generation": [ev(CACHE, L1 | Flag.GEN_KNOWN)],
        "generation not known": [ev(CACHE, L1 | Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT)],
        "APIC page": [ev(CACHE, L1 | LIVE, **APIC)],
        "gfn 0": [ev(CACHE, L1 | LIVE, addr=0)],
        "true hole": [ev(CACHE, L1 | LIVE, slot=-1)],
        "user slot": [ev(CACHE, L1 | LIVE, **RAM)],
        "a fill": [ev(FILL, L1 | LIVE)],
        "filled in SMM, seen outside": [
            ev(CACHE, L1 | SMM_USED | LIVE | rule_cases.FILLED_THERE),
        ],
        "filled in SMM, seen there": [
            ev(CACHE, rule_cases.IN_SMM | rule_cases.AS0 | rule_cases.FILLED_HERE),
        ],
    },
    "internal-slot-hit": {
        "L2": [ev(MATCH, L2)],
        "level unknown": [ev(MATCH, UNKNOWN)],
        "memslots changed meanwhile": [ev(MATCH, L1 | Flag.UNSTABLE)],
        "slot on its way out": [ev(MATCH, L1 | Flag.SLOT_INVALID)],
        "APIC page": [ev(MATCH, L1, **APIC)],
        "gfn 0": [ev(MATCH, L1, addr=0x10)],
        "true MMIO": [ev(MATCH, L1, slot=-1)],
        "user slot": [ev(MATCH, L1, **RAM)],
        "MMIO without a match": [ev(MMIO, L1, kind=0)],
        "believed fault without its slot": [ev(Type.FAULT, L1 | Flag.BELIEVED, slot=-1)],
        "fill by L2 and nothing more": [ev(FILL, L2)],
        "filled in SMM": [
            ev(MATCH, L1 | SMM_USED | LIVE | rule_cases.FILLED_THERE),
            ev(MATCH, rule_cases.IN_SMM | rule_cases.AS0 | rule_cases.FILLED_HERE),
        ],
        "reserved-bit fault in SMM that may not believe it": [
            ev(MATCH, rule_cases.IN_SMM | rule_cases.AS0, **RSVD),
        ],
    },
    "noslot-from-l1": {
        "L2": [ev(FILL, L2), noslot(L2)],
        "level unknown": [ev(FILL, UNKNOWN), noslot(UNKNOWN)],
        "memslots changed meanwhile": [noslot(L1 | Flag.UNSTABLE)],
        "KVM_MEMSLOT_INVALID race": [noslot(L1 | Flag.SLOT_INVALID)],
        "APIC page": [noslot(L1, **APIC), ev(FILL, L1, **APIC)],
        "gfn 0": [noslot(L1, addr=0)],
        "true hole": [noslot(L1, slot=-1), ev(FILL, L1, slot=-1)],
        "user slot": [noslot(L1, **RAM)],
        "fault kept": [kept(L1)],
        "fill read back too late": [ev(FILL, L1 | Flag.GEN_KNOWN)],
    },
    "cache-hits-memory": {
        "L2": [ev(MATCH, L2, **RAM), ev(CACHE, L2 | LIVE, **RAM)],
        "level unknown": [ev(MATCH, UNKNOWN, **RAM)],
        "memslots changed meanwhile": [ev(MATCH, L1 | Flag.UNSTABLE, **RAM)],
        "slot on its way out": [ev(MATCH, L1 | Flag.SLOT_INVALID, **RAM)],
        "held with an old generation": [ev(CACHE, L1 | Flag.GEN_KNOWN, **RAM)],
        "held with an unknown generation": [ev(CACHE, L1, **RAM), ev(FILL, L1, **RAM)],
        "SMM can explain it": [
            ev(MATCH, L1 | SMM_USED, **RAM),
            ev(CACHE, L1 | LIVE | SMM_USED, **RAM),
            ev(FILL, L1 | LIVE | SMM_USED, **RAM),
            ev(MATCH, L1 | SMM_USED | LIVE | Flag.FILL_AS_KNOWN | Flag.OTHER_AS, **RAM),
        ],
        "an older generation of SMM's": [
            ev(MATCH, rule_cases.IN_SMM | Flag.GEN_KNOWN | Flag.FILL_AS_KNOWN, **RAM),
        ],
        "internal slot": [ev(MATCH, L1), ev(CACHE, L1 | LIVE)],
        "APIC page": [ev(MATCH, L1, addr=APIC_GPA, slot=3)],
        "gfn 0": [ev(CACHE, L1 | LIVE, addr=0, slot=0)],
        "true MMIO": [ev(MATCH, L1, slot=-1), ev(CACHE, L1 | LIVE, slot=-1)],
        "write to ROM": [ev(MMIO, L1 | Flag.SLOT_READONLY, kind=2, **RAM)],
    },
    "apic-page-emulated": {
        "L1": [ev(MMIO, L1, kind=1, **APIC)],
        "level unknown": [ev(MMIO, UNKNOWN, kind=1, **APIC)],
        "no slot there": [ev(MMIO, L2, kind=1, addr=APIC_GPA, slot=-1)],
        "user slot there": [ev(MMIO, L2, kind=1, addr=APIC_GPA, slot=3)],
        "slot elsewhere": [ev(MMIO, L2, kind=1, addr=RAM_GPA, slot=SLOT_APIC)],
        "memslots changed meanwhile": [ev(MMIO, L2 | Flag.UNSTABLE, kind=1, **APIC)],
        "fill of the page": [ev(FILL, L2, **APIC)],
    },
}

HITS |= rule_cases.HITS
MISSES |= rule_cases.MISSES


@pytest.mark.parametrize(("rule_id", "case"), [(r, c) for r, cases in HITS.items() for c in cases])
def test_hit_is_found(rule_id: str, case: str) -> None:
    events, occurrences = HITS[rule_id][case]
    _, findings = detect(stream(events))
    (found,) = [f for f in findings if f.rule.id == rule_id]
    assert found.count == occurrences
    assert found.gpa == events[0]["addr"]
    slot = events[0]["slot"]
    assert found.slot == (None if slot < 0 else slot)
    presumed = "presumed" if events[0]["flags"] & Flag.SLOT_PRESUMED else "observed"
    assert found.slot_confidence == (None if slot < 0 else presumed)
    assert (found.vm, found.vcpu) == (1, events[0]["vcpu"])
    assert found.has_gpa == (rule_id != "stale-spte-storm")


@pytest.mark.parametrize(
    ("rule_id", "case"), [(r, c) for r, cases in MISSES.items() for c in cases]
)
def test_near_miss_is_not_found(rule_id: str, case: str) -> None:
    _, findings = detect(stream(MISSES[rule_id][case]))
    assert [f.rule.id for f in findings if f.rule.id == rule_id] == []


def test_every_rule_has_hits_and_misses() -> None:
    ids = [r.id for r in RULES]
    assert sorted(ids) == sorted(HITS) == sorted(MISSES)
    assert all(len(MISSES[r.id]) >= len(r.guards) for r in RULES)


def test_hit_is_attributed_to_the_newest_fill() -> None:
    events = [noslot(), ev(FILL, L2, seq=7), ev(FILL, L2, seq=9), ev(MATCH), ev(MMIO, kind=0)]
    _, findings = detect(stream(events))
    (hit,) = [f for f in findings if f.rule.id == "internal-slot-hit"]
    assert hit.cause is not None
    assert (hit.cause.rule, hit.cause.event["seq"]) == ("internal-slot-fill", 9)
    assert (hit.cause.age_ns, hit.cause.count) == (1000, 2)
    kinds = [(Type(e["type"]).name, int(e["seq"])) for e in hit.evidence]
    assert [name for name, _ in kinds] == ["FILL", "MATCH", "MMIO"]
    assert hit.first["type"] == MATCH


def test_cause_is_cited_once_for_many_hits_and_again_when_new() -> None:
    events = [ev(FILL, L2), ev(MATCH), ev(MATCH), ev(FILL, L2), ev(MATCH)]
    _, findings = detect(stream(events))
    (hit,) = [f for f in findings if f.rule.id == "internal-slot-hit"]
    assert [Type(e["type"]).name for e in hit.evidence] == [
        "FILL", "MATCH", "MATCH", "FILL", "MATCH",
    ]  # fmt: skip
    assert (hit.count, hit.evidence_total) == (3, 5)


def test_hit_without_a_fill_has_no_cause() -> None:
    _, findings = detect(stream([ev(MATCH)]))
    assert findings[0].cause is None


def test_fill_of_another_vcpu_is_no_cause() -> None:
    _, findings = detect(stream([ev(FILL, L2, vcpu=1), ev(FILL, L2, vm=2), ev(MATCH)]))
    (hit,) = [f for f in findings if f.rule.id == "internal-slot-hit"]
    assert hit.cause is None


def test_fill_of_an_earlier_vcpu_of_the_same_number_is_no_cause() -> None:
    _, findings = detect(stream([ev(FILL, L2), gone(), ev(MATCH)]))
    (hit,) = [f for f in findings if f.rule.id == "internal-slot-hit"]
    assert hit.cause is None


def test_mmio_elsewhere_is_no_evidence() -> None:
    _, findings = detect(stream([ev(MATCH), ev(MMIO, kind=1, **AT_IDENTITY), ev(MMIO, L2, kind=1)]))
    assert [len(f.evidence) for f in findings] == [1]


def test_proof_of_a_fixed_kernel() -> None:
    detector, findings = detect(stream([kept(), kept(site=Site.SPTE_REQUESTED), kept(L1)]))
    assert findings == []
    (proof,) = detector.acquittals()
    assert (proof.rule.fault, proof.count, proof.first["seq"]) == ("internal-slot", 2, 0)


@pytest.mark.parametrize(
    "event",
    [
        kept(L1),
        kept(UNKNOWN),
        kept(L2 | Flag.UNSTABLE),
        kept(L2 | Flag.SLOT_INVALID),
        kept(**APIC),
        kept(**RAM),
        kept(addr=0),
    ],
)
def test_no_proof_of_a_fixed_kernel(event: dict[str, Any]) -> None:
    detector, _ = detect(stream([event]))
    assert detector.acquittals() == []


def test_apic_page_has_a_rate() -> None:
    _, (found,) = detect(stream([ev(MMIO, L2, kind=1, **APIC)] * 11))
    assert found.rate == pytest.approx(1e6)
    assert found.rule.severity == "info"
    assert not found.rule.convicts


def test_rules_are_complete() -> None:
    assert len({r.id for r in RULES}) == len(RULES)
    assert FAULTS == ("internal-slot", "cache-hits-memory", "address-space", "spte-overwrite")
    for r in RULES:
        assert rule(r.id) is r
        assert r.severity in SEVERITIES
        assert r.guards
        assert r.needs.convicts
        for text in (
            r.title, r.source, r.proves, r.severity_reason, r.goes_wrong, r.guest_notices, r.to_do,
        ):  # fmt: skip
            assert text.isascii()
            assert len(text) > 20
        assert r.explain == f"{r.goes_wrong}  {r.guest_notices}  What to do: {r.to_do}"
        assert bool(r.acquittal) == bool(r.needs.acquits)


def test_severity_is_checked() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="severity"):
        replace(RULES[0], severity="terrible")
    with pytest.raises(KeyError):
        rule("no-such-rule")
