# SPDX-License-Identifier: MIT
"""Captures that the lab made on real kernels: what kvmprobe finds in each, VM by VM.

lab-vms.json says which process was which scenario; tests/lab/scenarios.py, what that did.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmprobe.analysis.run import analyze
from kvmprobe.probes.schema import Flag, LifecycleChange, Type
from kvmprobe.store.reader import CaptureReader
from tests.lab.scenarios import FAULT, NOT_EXERCISED, SCENARIOS

GOLDEN = Path(__file__).parents[1] / "data/golden"
CAPTURES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "lab-vms.json").read_text())
BY_VM = {name: scenario for scenario in SCENARIOS for name in scenario.vms}


def analysis_of(stem: str) -> dict[str, Any]:
    with CaptureReader(GOLDEN / f"{stem}.kvmprobe") as reader:
        return analyze([reader], jit=False).to_document()


def test_every_capture_of_the_lab_is_described() -> None:
    assert {path.stem for path in GOLDEN.glob("lab-*.kvmprobe")} == set(CAPTURES)


@pytest.mark.parametrize("stem", CAPTURES)
def test_each_vm_has_the_findings_of_its_scenario_and_no_other(stem: str) -> None:
    about, document = CAPTURES[stem], analysis_of(stem)
    for vm, pid in about["vms"].items():
        findings = [each for each in document["findings"] if each["vm"]["pid"] == pid]
        expected, found = BY_VM[vm].check(
            findings, vm, about["vendor"], about["kernel"], caching=about["caching"]
        )
        assert (vm, found) == (vm, expected)
    assert {each["vm"]["pid"] for each in document["findings"]} <= set(about["vms"].values())


@pytest.mark.parametrize("stem", CAPTURES)
def test_the_verdict_is_what_is_known_of_the_kernel(stem: str) -> None:
    about, document = CAPTURES[stem], analysis_of(stem)
    known = {BY_VM[vm].verdict(about["kernel"]) for vm in about["vms"]}
    if len(known) > 1:
        known -= {NOT_EXERCISED}
    assert {document["verdicts"][FAULT]["verdict"]} == known
    assert document["lost"] == 0


@pytest.mark.parametrize("stem", CAPTURES)
def test_each_vm_is_in_the_capture_with_its_process(stem: str) -> None:
    with CaptureReader(GOLDEN / f"{stem}.kvmprobe") as reader:
        batches = list(reader.batches())
    kind, pid = (np.concatenate([batch[name] for batch in batches]) for name in ("kind", "aux"))
    types = np.concatenate([batch["type"] for batch in batches])
    seen = pid[(types == int(Type.LIFECYCLE)) & (kind == int(LifecycleChange.VM_SEEN))]
    assert sorted(seen.tolist()) == sorted(CAPTURES[stem]["vms"].values())


def test_the_fault_on_intel() -> None:
    document = analysis_of("lab-6.1-intel")
    assert document["verdict"] == "vulnerable"
    rules = {each["rule"]: each for each in document["findings"]}
    assert set(rules) == {"internal-slot-fill", "internal-slot-armed", "internal-slot-hit"}
    for rule, level, count in (("internal-slot-fill", "L2", 1), ("internal-slot-hit", "L1", 2)):
        finding = rules[rule]
        assert (finding["gpa"], finding["slot"], finding["slot_confidence"]) == (
            "0xfffbd000",
            32764,
            "observed",
        )
        assert (finding["vcpu"], finding["level"], finding["count"]) == (0, level, count)


def test_the_fix_on_intel() -> None:
    document = analysis_of("lab-6.12-intel")
    assert document["findings"] == []
    assert document["verdicts"][FAULT]["verdict"] == "fixed"


def test_lookups_while_memslots_change_are_marked_and_prove_nothing() -> None:
    with CaptureReader(GOLDEN / "lab-6.1-amd-toggled.kvmprobe") as reader:
        flags = np.concatenate([batch["flags"] for batch in reader.batches()])
    assert np.count_nonzero(flags & Flag.UNSTABLE) == 810
    assert analysis_of("lab-6.1-amd-toggled")["findings"] == []
