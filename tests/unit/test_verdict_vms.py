# SPDX-License-Identifier: MIT
"""The judge: what a stream shows of the host and of each VM, at any time."""

from __future__ import annotations

from typing import Any

import pytest

from kvmprobe.analysis import judge as judge_module
from kvmprobe.analysis.detector import STEPPED
from kvmprobe.analysis.judge import Judge, Reading, Report, further
from kvmprobe.analysis.words import FIXED, INCONCLUSIVE, NOT_EXERCISED, VULNERABLE
from kvmprobe.probes.schema import EVENT, NO_VCPU, LifecycleChange, Type, columns
from tests.streams import UNKNOWN, ev, kept, noslot, stream, vm_gone

FAULT = "internal-slot"
PLAN = [
    {"observation": o, "site": s, "attached": True}
    for o, s in (
        ("FAULTIN", "FAULTIN"), ("FILL", "NOSLOT"), ("CACHE", "ENTRY"), ("MATCH", "MATCH_MMIO"),
    )
]  # fmt: skip
QUIET = ev(Type.FAULTIN, slot=2, addr=0x1000)


def _lost(vm: int, kind: Type = Type.FILL, records: int = 3) -> dict[str, Any]:
    return ev(Type.LOSS, UNKNOWN, vm=vm, vcpu=NO_VCPU, slot=-1, addr=records, kind=kind, len=1)


def _report(*events: dict[str, Any], reading: Reading | None = None) -> Report:
    judge = Judge(PLAN)
    for row in stream(events):
        judge.feed(columns(row.reshape(1)))
    return judge.report(reading)


def _by_vm(report: Report) -> dict[int, str]:
    return {n: vm.verdicts[FAULT].verdict for n, vm in report.vms.items()}


def test_loss_of_one_vm_degrades_it_alone() -> None:
    report = _report(QUIET, QUIET | {"vm": 2}, _lost(vm=2))
    assert _by_vm(report) == {1: NOT_EXERCISED, 2: INCONCLUSIVE}
    assert report.verdicts[FAULT].verdict == INCONCLUSIVE
    assert report.vms[2].verdicts[FAULT].missing == ("lost: 3 records of FILL",)
    assert report.vms[1].verdicts[FAULT].missing == ()


def test_loss_of_nobody_degrades_all() -> None:
    report = _report(QUIET, QUIET | {"vm": 2}, _lost(vm=0))
    assert _by_vm(report) == {1: INCONCLUSIVE, 2: INCONCLUSIVE}


def test_a_gap_degrades_its_vm() -> None:
    report = _report(QUIET, QUIET | {"seq": 5}, QUIET | {"vm": 2})
    assert _by_vm(report) == {1: INCONCLUSIVE, 2: NOT_EXERCISED}
    assert report.vms[1].verdicts[FAULT].missing == ("lost: 4 records of unknown observations",)


def test_a_gap_that_is_told_counts_once() -> None:
    gap = (QUIET, QUIET | {"seq": 5})
    (missing,) = _report(*gap, _lost(vm=1, records=4)).vms[1].verdicts[FAULT].missing
    assert missing == "lost: 4 records of FILL"
    # What another VM lost doesn't explain this one's gap.
    report = _report(*gap, QUIET | {"vm": 2}, _lost(vm=2, records=4))
    assert len(report.vms[1].verdicts[FAULT].missing) == 1
    assert len(report.verdicts[FAULT].missing) == 2


def test_records_before_the_first_are_missing_where_sequences_begin_at_0() -> None:
    for from_first, verdict in ((True, INCONCLUSIVE), (False, NOT_EXERCISED)):
        judge = Judge(PLAN, from_first=from_first)
        judge.feed(columns(stream([QUIET | {"seq": 2}, QUIET | {"vm": 2}])))
        assert judge.integrity.missing == (2 if from_first else 0)
        assert _by_vm(judge.report()) == {1: verdict, 2: NOT_EXERCISED}


def test_an_anomaly_degrades_its_vm() -> None:
    report = _report(QUIET, QUIET | {"seq": 0}, QUIET | {"vm": 2})
    assert _by_vm(report) == {1: INCONCLUSIVE, 2: NOT_EXERCISED}
    homeless = _report(QUIET | {"vm": 0}, QUIET)
    assert _by_vm(homeless) == {1: INCONCLUSIVE}


def test_a_finding_outranks_loss() -> None:
    report = _report(noslot(vm=2), _lost(vm=2), QUIET)
    assert _by_vm(report) == {1: NOT_EXERCISED, 2: VULNERABLE}
    assert report.verdicts[FAULT].verdict == VULNERABLE


def test_proof_of_the_fix_is_for_all_vms() -> None:
    assert _by_vm(_report(kept(), QUIET | {"vm": 2})) == {1: FIXED, 2: FIXED}


def test_proof_of_the_fix_does_not_come_from_a_vm_with_losses() -> None:
    report = _report(kept(), _lost(vm=1), QUIET | {"vm": 2})
    assert _by_vm(report) == {1: INCONCLUSIVE, 2: NOT_EXERCISED}


def test_proof_of_the_fix_does_not_come_from_a_vm_with_a_gap() -> None:
    report = _report(kept(), QUIET | {"seq": 5}, QUIET | {"vm": 2})
    assert _by_vm(report) == {1: INCONCLUSIVE, 2: NOT_EXERCISED}


def test_no_vm_is_fixed_on_a_kernel_shown_vulnerable() -> None:
    report = _report(kept(), noslot(vm=2), QUIET | {"vm": 3})
    assert _by_vm(report) == {1: NOT_EXERCISED, 2: VULNERABLE, 3: NOT_EXERCISED}
    assert "another one shows" in report.vms[1].verdicts[FAULT].basis[0]


@pytest.mark.parametrize("reading", [Reading(damaged=1), Reading(unknown=1)])
def test_damage_concerns_all(reading: Reading) -> None:
    report = _report(kept(), QUIET | {"vm": 2}, reading=reading)
    assert _by_vm(report) == {1: INCONCLUSIVE, 2: INCONCLUSIVE}


@pytest.mark.parametrize("reading", [Reading(damaged=1), Reading(unknown=1)])
def test_what_could_not_be_read_is_not_lost_too(reading: Reading) -> None:
    report = _report(QUIET, QUIET | {"seq": 5}, reading=reading)
    for verdicts in (report.verdicts, report.vms[1].verdicts):
        (missing,) = verdicts[FAULT].missing
        assert "lost" not in missing


def test_proof_of_the_fix_by_no_vm_is_none() -> None:
    report = _report(kept(vm=0), QUIET)
    assert _by_vm(report) == {1: INCONCLUSIVE}
    assert report.vms[1].verdicts[FAULT].basis == ()


def test_no_events_are_no_vms() -> None:
    report = _report()
    assert (report.vms, report.verdict) == ({}, INCONCLUSIVE)  # not all was attached
    assert report.verdicts[FAULT].verdict == NOT_EXERCISED


def test_answers_at_any_time() -> None:
    judge = Judge(PLAN)
    rows = stream([noslot(), _lost(vm=1), noslot()])
    judge.feed(columns(rows[:1]))
    first = judge.report()
    judge.feed(columns(rows[1:]))
    assert (first.findings[0].count, judge.report().findings[0].count) == (1, 2)
    assert first.vms[1].coverage.whole
    assert not judge.report().vms[1].coverage.whole


def test_vms_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "GONE_LIMIT", 10)
    judge = Judge(PLAN)
    for vm in range(1, 101):
        seen = ev(Type.LIFECYCLE, UNKNOWN, slot=-1, vm=vm, vcpu=NO_VCPU, aux=vm,
                  kind=LifecycleChange.VM_SEEN)  # fmt: skip
        events = [seen, kept(vm=vm)]
        if vm in (5, 6):
            events += [QUIET | {"vm": vm, "seq": 9}]
        if vm == 7:
            events += [noslot(vm=vm)]
        judge.feed(columns(stream([*events, vm_gone(vm)], start=1000 * vm)))
    report = judge.report()
    assert list(report.vms) == list(range(91, 101))
    assert all(vm.gone for vm in report.vms.values())
    # What was lost of a VM stays lost, and what was found stays found, with its name.
    assert judge.integrity.unexplained == 2 * 8
    assert [f.vm for f in report.findings] == [7]
    assert (judge.names.get(7).pid, judge.names.get(8).pid) == (7, None)
    assert {a.vm for a in report.acquittals} == set(report.vms)


CHANGE = ev(Type.GENERATION, vcpu=NO_VCPU, slot=-1)
MEMORY = ev(Type.MATCH, slot=5)


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([QUIET], ()),
        ([QUIET, CHANGE, vm_gone()], STEPPED),
        ([CHANGE, MEMORY], EVENT.names),
        ([QUIET, _lost(1)], EVENT.names),
        ([MEMORY, _lost(1)], EVENT.names),
    ],
)
def test_columns_that_will_be_needed(events: list[dict[str, Any]], wanted: tuple[str, ...]) -> None:
    assert further(columns(stream(events))) == wanted
