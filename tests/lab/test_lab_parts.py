# SPDX-License-Identifier: MIT
"""The lab's own logic, as far as it needs no emulator and no network."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from kvmprobe import __version__
from tests.lab import base, vm
from tests.lab.base import LabError, MissingError, built
from tests.lab.kernels import parse_spec
from tests.lab.matrix import Cell, _differing_backends, render, select_scenarios
from tests.lab.mirror import Mirror, parse_uris
from tests.lab.packages import _parse_depends
from tests.lab.results import read_result, run_kvmprobe
from tests.lab.rootfs import make_disk
from tests.lab.scenarios import FIXED, NOT_EXERCISED, SCENARIOS, VULNERABLE, listed_kernels
from tests.lab.wheel import get_installed

URIS = """\
'https://packages.example.com/apt/dists/cloud-bookworm/InRelease' cloud_InRelease 0
'http://mirror.example.org/debian/dists/bookworm/InRelease' mirror_InRelease 0
'http://mirror.example.org/debian/dists/bookworm-updates/InRelease' updates_InRelease 0
'http://mirror.example.org/security/dists/bookworm-security/InRelease' security_InRelease 0
'https://node.example.com/dists/nodistro/InRelease' node_InRelease 0
"""


def test_mirror_is_debians_among_others() -> None:
    mirror = parse_uris(URIS)
    assert mirror == Mirror(
        "http://mirror.example.org/debian", "http://mirror.example.org/security"
    )
    assert "security trixie-security main" in mirror.sources("trixie")
    assert mirror.sources("sid").count("\n") == 1


def test_no_debian_mirror_is_told() -> None:
    with pytest.raises(MissingError, match="no Debian mirror"):
        parse_uris("'https://node.example.com/dists/nodistro/InRelease' node_InRelease 0\n")


def test_dependencies_keep_exact_versions() -> None:
    field = "linux-modules-7.2.13-amd64 (= 7.2.13-1), gcc-14 | gcc, libc6 (>= 2.34), python3:any"
    assert _parse_depends(field) == [
        ("linux-modules-7.2.13-amd64", "7.2.13-1"),
        ("gcc-14", None),
        ("libc6", None),
        ("python3", None),
    ]


def test_kernel_specifications() -> None:
    assert parse_spec("6.1") == ("bookworm", "linux-image-amd64", None)
    spec = "bookworm/linux-image-6.1.0-50-amd64=6.1.176-1"
    assert parse_spec(spec) == ("bookworm", "linux-image-6.1.0-50-amd64", "6.1.176-1")
    with pytest.raises(LabError, match=r"unknown kernel '5\.4'"):
        parse_spec("5.4")


def test_a_build_that_breaks_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = tmp_path / "things" / "thing"

    def build(text: str, error: Exception | None) -> None:
        with built(target, 0) as scratch:
            assert scratch is not None
            (scratch / "thing").write_text(text)
            if error:
                raise error

    with pytest.raises(LabError, match="broke"):
        build("half", LabError("broke"))
    assert not target.exists()
    build("whole", None)
    with built(target, 0) as scratch:
        assert scratch is None
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == []


def test_only_what_nobody_uses_is_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = base.cache_dir()
    long_ago = time.time() - (base.KEPT_DAYS + 1) * 86400
    for name in ("roots/old.ext4", "roots/used.ext4", "results/old/output", "results/new/output"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).touch()
    for name in ("roots/old.ext4", "roots/used.ext4", "results/old"):
        os.utime(cache / name, (long_ago, long_ago))
    with built(cache / "roots/used.ext4", 0) as scratch:
        assert scratch is None
    base.prune_cache()
    assert [path.name for path in (cache / "results").iterdir()] == ["new"]
    assert [path.name for path in (cache / "roots").glob("*.ext4")] == ["used.ext4"]


def test_too_little_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingError, match="MiB free"):
        base.need_space(1 << 40)


def test_a_hang_ends_at_the_limit_and_a_dead_kernel_before(tmp_path: Path) -> None:
    serial = tmp_path / "serial"
    serial.write_text("booting\n")
    with pytest.raises(LabError, match="not done after 1 s"):
        vm._watch(["sleep", "600"], serial, tmp_path / "log", 1.0)
    serial.write_text("Kernel panic - not syncing: no init\n")
    with pytest.raises(LabError, match="kernel stopped"):
        vm._watch(["sleep", "600"], serial, tmp_path / "log", 600.0)


def test_runs_of_other_threads_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm, "_stopping", threading.Event())
    vm.stop_runs()
    (tmp_path / "serial").write_text("booting\n")
    with pytest.raises(LabError, match="stopped"):
        vm._watch(["sleep", "600"], tmp_path / "serial", tmp_path / "log", 600.0)


def test_what_goes_into_a_vm_is_the_installed_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = get_installed(base.CHECKOUT)
    assert (folder / "kvmprobe/probes/events.h").is_file()
    assert (folder / "kvmprobe/analysis/detector.py").is_file()
    assert [path.name for path in folder.glob("*.dist-info")] == [
        f"kvmprobe-{__version__}.dist-info"
    ]


def test_a_disk_goes_in_and_comes_out(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "out" / "deep").mkdir(parents=True)
    (tree / "out" / "deep" / "file").write_bytes(b"result")
    (tree / "status").write_text("7\n")
    (tree / "output").write_text("said\n")
    make_disk(tree, tmp_path / "disk", 16)
    results = tmp_path / "results"
    results.mkdir()
    assert vm._take_results(tmp_path / "disk", tmp_path, results) == (7, "said\n")
    assert (results / "out" / "deep" / "file").read_bytes() == b"result"


def finding(rule: str, level: str, count: int = 1, **fields: object) -> dict[str, object]:
    known = {"rule": rule, "level": level, "count": count, "severity": "warning"}
    return (
        known | {"fault": "internal-slot", "gpa": "0xfffbd000", "slot": 32764, "vcpu": 0} | fields
    )


def test_scenarios_tell_right_from_wrong() -> None:
    (tss,) = select_scenarios(["tss-shadow"])

    def right(classified: str, *findings: dict[str, object]) -> bool:
        expected, found = tss.check(findings, "tss-shadow", "intel", classified)
        return expected == found

    fill, hit = finding("internal-slot-fill", "L2"), finding("internal-slot-hit", "L1", 2)
    armed = finding("internal-slot-armed", "L1")
    assert right(VULNERABLE, fill, hit)
    assert right(VULNERABLE, hit, armed, fill)
    assert right(FIXED)
    assert right(FIXED, finding("other", "L1", severity="info", fault="other"))
    assert not right(VULNERABLE)
    assert not right(VULNERABLE, fill)
    assert not right(VULNERABLE, fill, hit, finding("other", "L1"))
    assert not right(VULNERABLE, fill, finding("internal-slot-hit", "L1", 3))
    for wrong in ({"vcpu": 1}, {"slot": 3}, {"gpa": "0xfffbc000"}, {"level": "L1"}):
        assert not right(VULNERABLE, fill | wrong, hit)
    assert not right(FIXED, armed)
    with pytest.raises(LabError, match="unknown scenario"):
        select_scenarios(["tss"])


def test_a_kernel_gets_the_backends_that_differ_on_it() -> None:
    kernels = {kernel.name: kernel for kernel in listed_kernels()}
    assert _differing_backends("intel", kernels["6.12"]) == ("default",)
    assert _differing_backends("amd", kernels["6.12"]) == ("default", "fentry", "tracepoint")
    assert _differing_backends("amd", kernels["6.1"]) == ("default", "tracepoint")


def test_the_clean_vm_beside_may_have_no_finding() -> None:
    (two,) = select_scenarios(["two-vms"])
    fill = finding("internal-slot-fill", "L2")
    assert two.check([], two.vms[1], "intel", VULNERABLE) == ("nothing", "nothing")
    assert two.check([fill], two.vms[1], "intel", VULNERABLE)[0] == "nothing"
    assert two.check([fill], two.vms[1], "intel", VULNERABLE)[1] != "nothing"


def test_an_entry_from_before_the_recording_is_seen_at_first_sight() -> None:
    (late,) = select_scenarios(["recorded-late"])
    hit = finding("internal-slot-hit", "L1")
    for site, right in (("FIRST_SIGHT", True), ("ENTRY", False)):
        armed = finding("internal-slot-armed", "L1", evidence={"events": [{"site": site}]})
        expected, found = late.check([armed, hit], late.name, "amd", VULNERABLE)
        assert (expected == found) is right
    assert late.verdict(FIXED) == NOT_EXERCISED


def test_scenarios_and_kernels_are_consistent() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    for kernel in listed_kernels():
        assert parse_spec(kernel.spec)[2] == kernel.version
        assert kernel.internal_slot in (VULNERABLE, FIXED)


def test_table_marks_what_differs() -> None:
    right = Cell("6.1", "amd", "hole", "default", "a", "a")
    wrong = Cell("6.1", "amd", "hole", "default", "a", "b")
    broken = Cell("6.1", "amd", "hole", "default", "", "", "the VM was not done after 9 s")
    lines = render([right, wrong, broken]).splitlines()
    assert lines[1].endswith("as expected")
    assert lines[2].endswith("DIFFERS")
    assert lines[3].endswith("NO RESULT")
    assert "not done" in lines[3]


def test_a_boot_s_results_are_read_and_checked(tmp_path: Path) -> None:
    golden = base.CHECKOUT / "tests/data/golden"
    pids = json.loads((golden / "lab-vms.json").read_text())["lab-6.1-amd-all"]["vms"]
    (tmp_path / "out").mkdir()
    capture = tmp_path / "out" / "main.kvmprobe"
    shutil.copy(golden / "lab-6.1-amd-all.kvmprobe", capture)
    document = run_kvmprobe(base.CHECKOUT, "analyze", "--json", str(capture))
    capture.with_suffix(".json").write_text(json.dumps(document))
    lines = [f"vm {name} {pid}\nload: got 0x00\n" for name, pid in pids.items()]
    (tmp_path / "output").write_text("".join(lines))
    result = read_result(tmp_path, "main", list(pids), base.CHECKOUT)
    assert result.verdict == VULNERABLE
    assert result.findings("two-vms-beside") == []
    scenarios = [each for each in SCENARIOS if each.vms[0] in pids]
    compared = {
        name: (wanted, found)
        for name, wanted, found in result.compare(scenarios, "amd", VULNERABLE)
    }
    assert set(compared) == {*pids, "(main)"}
    assert all(wanted == found for wanted, found in compared.values())
    assert compared["(main)"] == ("verdict vulnerable", "verdict vulnerable")
    fixed = {name: wanted for name, wanted, _ in result.compare(scenarios, "amd", FIXED)}
    assert fixed["tss-shadow"] == "nothing"
    assert {each["rule"] for each in result.findings("killed")} >= {"internal-slot-fill"}
    with pytest.raises(LabError, match="VMs are in the capture"):
        read_result(tmp_path, "main", list(pids)[1:], base.CHECKOUT)
    (tmp_path / "output").write_text("".join([*lines, "failed hole\n"]))
    with pytest.raises(LabError, match="did not run: hole"):
        read_result(tmp_path, "main", list(pids), base.CHECKOUT)
    (tmp_path / "output").write_text("".join(lines))
    capture.with_suffix(".json").write_text(json.dumps(document | {"findings": []}))
    with pytest.raises(LabError, match="differ"):
        read_result(tmp_path, "main", list(pids), base.CHECKOUT)
