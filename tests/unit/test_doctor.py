# SPDX-License-Identifier: MIT
"""Exposure, livepatches and the report of `kvmprobe doctor`, from what a host may look like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from kvmprobe.capture.plan import Row
from kvmprobe.doctor.report import Report, VmState, document, json_schema
from kvmprobe.doctor.sample import SLOT_NAMES, Sample, SeenVm, _take
from kvmprobe.doctor.text import facts, rest
from kvmprobe.host.exposure import FIXED_FROM, exposures
from kvmprobe.host.facts import access, host_facts
from kvmprobe.host.livepatch import Livepatch, kvm_livepatches
from kvmprobe.host.vms import nested_runs
from kvmprobe.probes.schema import EVENT, Flag, LifecycleChange, MemslotChange, Type
from kvmprobe.verify.answers import Answer

INTEL = {"kvm_intel.unrestricted_guest": "N", "kvm_intel.nested": "Y", "kvm_intel.ept": "Y"}
AMD = {"kvm_amd.nested": "1", "kvm_amd.npt": "Y"}


def words(
    vendor: str | None,
    parameters: Mapping[str, str],
    *,
    smm: bool | None = True,
    nests: bool | None = True,
) -> tuple[str, ...]:
    found = exposures(vendor, parameters, smm=smm, nests=nests)
    assert [e.fault for e in found] == list(FIXED_FROM)
    assert all(e.reason for e in found)
    return tuple(e.word for e in found)


R, U = "reachable", "unreachable"


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (words("intel", INTEL), (R, R, R)),
        (words("intel", INTEL | {"kvm_intel.unrestricted_guest": "Y"}), (U, R, R)),
        (words("intel", INTEL | {"kvm_intel.nested": "N"}), (U, R, U)),
        (words("intel", INTEL | {"kvm_intel.nested": "N", "kvm_intel.ept": "N"}), (U, R, R)),
        (words("intel", {}), (R, R, R)),
        (words("amd", AMD), (U, R, R)),
        (words("amd", AMD | {"kvm_amd.nested": "0"}), (U, R, U)),
        (words("amd", AMD | {"kvm_amd.npt": "N", "kvm_amd.nested": "0"}), (U, R, R)),
        (words("amd", AMD, smm=False), (U, U, R)),
        (words("amd", AMD, smm=None), (U, R, R)),
        (words("pvm", {}, smm=False, nests=False), (U, U, R)),
        (words("pvm", {}, smm=None, nests=None), (R, R, R)),
    ],
    ids=str,
)
def test_only_a_known_condition_rules_a_fault_out(
    got: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert got == expected


def patch(root: Path, name: str, enabled: str, *functions: str) -> None:
    for function in functions:
        (root / "sys/kernel/livepatch" / name / function).mkdir(parents=True)
    (root / "sys/kernel/livepatch" / name / "enabled").write_text(f"{enabled}\n")
    (root / "sys/kernel/livepatch" / name / "transition").write_text("0\n")


def test_livepatches_that_touch_kvm(tmp_path: Path) -> None:
    patch(tmp_path, "livepatch_1", "1", "kvm/kvm_faultin_pfn,1", "vmlinux/do_exit,1")
    patch(tmp_path, "livepatch_2", "1", "ext4/ext4_read,1", "vmlinux/do_fork,1")
    patch(tmp_path, "livepatch_3", "0", "vmlinux/x86_emulate_insn,2", "kvm_amd/svm_vcpu_run,1")
    assert kvm_livepatches(tmp_path) == [
        Livepatch("livepatch_1", True, False, ("kvm:kvm_faultin_pfn",)),
        Livepatch(
            "livepatch_3", False, False, ("kvm_amd:svm_vcpu_run", "vmlinux:x86_emulate_insn")
        ),
    ]
    assert kvm_livepatches(tmp_path / "none") == []


def test_nested_runs_come_from_debugfs(tmp_path: Path) -> None:
    for vm, count in (("12-3", "4"), ("12-7", "1"), ("123-3", "9")):
        (tmp_path / vm).mkdir()
        (tmp_path / vm / "nested_run").write_text(f"{count}\n")
    assert nested_runs(12, tmp_path) == 5
    assert nested_runs(1, tmp_path) is None


def test_a_sample_knows_slots_and_nesting_by_vm() -> None:
    tss, identity = SLOT_NAMES
    rows = np.zeros(7, EVENT)
    rows["vm"] = [1, 2, 1, 2, 2, 1, 0]
    rows["type"] = [
        *(Type.LIFECYCLE, Type.LIFECYCLE, Type.MEMSLOT, Type.MEMSLOT, Type.MEMSLOT),
        *(Type.CACHE, Type.LOSS),
    ]
    rows["kind"][:2] = LifecycleChange.VM_SEEN
    rows["kind"][2:4] = MemslotChange.FOUND
    rows["kind"][4] = MemslotChange.DELETED
    rows["aux"][:2] = [100, 200]
    rows["slot"][2:5] = [tss, identity, identity]
    rows["addr"] = [0, 0, 0xFFFBD000, 0xFFFBC000, 0, 0, 3]
    rows["flags"][5] = Flag.L2 | Flag.LEVEL_KNOWN
    vms: dict[int, SeenVm] = {}
    assert _take(rows, vms) == 3
    assert vms == {1: SeenVm(100, {"hidden TSS": 0xFFFBD000}, True), 2: SeenVm(200, {}, False)}


def report(name: str) -> Report:
    row = Row(observation="CACHE", site="ENTRY", attachment="raw_tracepoint:kvm_entry",
              attached=True, reason="")  # fmt: skip
    return Report(
        host=host_facts(),
        access=access(),
        problems=(),
        sample=Sample(1.0, (row,), (SeenVm(7),), 0, None),
        vms=(
            VmState(7, name, "qemu", {"hidden TSS": 0xFFFBD000}, "in use"),
            VmState(8, None, name, None, None),
        ),
        livepatches=(Livepatch("livepatch_1", True, False, ("kvm:kvm_faultin_pfn",)),),
        exposures=tuple(exposures("intel", INTEL, smm=True, nests=True)),
        verified=(Answer("internal-slot", "fixed", "L1 and L2 read memory", ("one",)),),
    )


def test_document_is_what_the_schema_says() -> None:
    got = json.loads(json.dumps(document(report("web"))))
    jsonschema.validate(got, json_schema())
    assert got["exposure"]["internal-slot"]["verified"]["answer"] == "fixed"
    assert got["vms"][0]["slots"] == [{"name": "hidden TSS", "gpa": "0xfffbd000"}]


def test_text_is_narrow_and_a_vm_writes_nothing_to_the_terminal() -> None:
    hostile = report("\x1b[31m\nexposure:")
    lines = list(rest(hostile))
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    assert lines.count("exposure:") == 1
    assert "hidden TSS at 0xfffbd000" in " ".join(line.strip() for line in lines)
    assert dict(facts(hostile))["vendor"] == str(hostile.host["vendor"])
