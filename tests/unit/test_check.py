# SPDX-License-Identifier: MIT
"""`kvmprobe check`: what outranks what, the line, the text file, captures and a watch's status."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kvmprobe.analysis.rules import FAULTS
from kvmprobe.analysis.words import VERDICTS
from kvmprobe.check.ask import ask_watch
from kvmprobe.check.model import Code, Found, Seen, VmSeen, conclude, vm_label
from kvmprobe.check.output import document, json_schema, line, textfile
from kvmprobe.check.sources import read_capture
from kvmprobe.cli.main import main
from kvmprobe.host.exposure import Exposure
from kvmprobe.host.facts import process_age
from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, Type
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter
from kvmprobe.watch import status as statuses
from kvmprobe.watch.status import FaultVerdict, Latched, Status, WatchedVm
from tests.streams import ev, stream

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/golden"
QUIET = dict.fromkeys(FAULTS, "not exercised")
LOST = dict.fromkeys(FAULTS, "inconclusive")
CRITICAL = Found(("internal-slot-hit",), "critical", "internal-slot", "web (pid 7)", 2)
WARNING = replace(CRITICAL, rules=("internal-slot-fill",), severity="warning")
INFO = replace(CRITICAL, rules=("apic-page-emulated",), severity="info")


def vm(label: str, *, lost: bool = False) -> VmSeen:
    return VmSeen(label, LOST, ("lost: 9 records of MATCH",)) if lost else VmSeen(label, QUIET, ())


def seen(*vms: VmSeen, **changes: object) -> Seen:
    verdicts = LOST if any(each.missing for each in vms) else QUIET
    base = Seen("live", seconds=8.0, vms=len(vms), verdicts=verdicts, each=vms)
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (seen(), Code.OK),
        (seen(vm("a")), Code.OK),
        (seen(vm("a"), found=[INFO]), Code.OK),
        (seen(vm("a"), found=[WARNING]), Code.WARNING),
        (seen(vm("a"), found=[WARNING, CRITICAL]), Code.CRITICAL),
        (seen(vm("a"), verdicts=QUIET | {"internal-slot": "vulnerable"}), Code.WARNING),
        (seen(vm("a", lost=True), vm("b")), Code.UNKNOWN),
        (seen(vm("a", lost=True), found=[CRITICAL]), Code.CRITICAL),
        (seen(vm("a", lost=True), found=[WARNING]), Code.WARNING),
        (seen(verdicts=LOST, missing=("not observed: MATCH",)), Code.UNKNOWN),
        (seen(error="not root"), Code.UNKNOWN),
        (seen(vm("a"), found=[replace(CRITICAL, ignored="known")]), Code.OK),
        (
            seen(
                vm("a"),
                verdicts=QUIET | {"internal-slot": "vulnerable"},
                found=[replace(CRITICAL, ignored="known")],
            ),
            Code.OK,
        ),
        (seen(vm("a", lost=True), unreachable=dict.fromkeys(FAULTS, "why")), Code.OK),
    ],
)
def test_the_code(state: Seen, code: Code) -> None:
    assert conclude(state).code == code


def test_a_vm_that_floods_is_named_and_the_others_keep_their_verdict() -> None:
    result = conclude(seen(vm("flood (pid 1)", lost=True), vm("web (pid 2)"), vm("db (pid 3)")))
    assert [each.label for each in result.unknown_vms] == ["flood (pid 1)"]
    assert "not known: flood (pid 1): lost: 9 records of MATCH" in result.text
    assert "web" not in result.text
    assert f"not exercised: {', '.join(FAULTS)}" in result.text


def test_a_loss_of_all_names_no_verdict() -> None:
    result = conclude(seen(vm("a", lost=True), vm("b", lost=True)))
    assert "not known of any VM: lost: 9 records of MATCH: a, b" in result.text
    assert "exercised" not in result.text


words = st.sampled_from(VERDICTS)
verdicts = st.fixed_dictionaries(dict.fromkeys(FAULTS, words))
hostile = st.text(st.characters(codec="utf-8"), max_size=60)
anything = st.builds(
    Seen,
    source=st.sampled_from(("live", "watch", "capture")),
    seconds=st.floats(0, 1e6),
    vms=st.integers(0, 9),
    events=st.integers(0, 1 << 40),
    lost=st.dictionaries(st.sampled_from(("MATCH", "CACHE")), st.integers(0, 99)),
    found=st.lists(st.sampled_from((CRITICAL, WARNING, INFO, replace(WARNING, ignored="known")))),
    verdicts=verdicts,
    each=st.lists(st.builds(VmSeen, hostile.map(lambda t: vm_label(t, 1)), verdicts, st.just(()))),
    unreachable=st.dictionaries(st.sampled_from(FAULTS), st.just("proof")),
    notes=st.lists(hostile, max_size=2).map(tuple),
    error=st.none() | hostile,
)


SCHEMA = jsonschema.Draft202012Validator(json_schema())


@settings(max_examples=40)
@given(anything)
def test_every_answer_is_one_line_a_valid_document_and_metrics(state: Seen) -> None:
    result = conclude(state)
    said = line(result, state)
    assert said.isprintable()
    assert said.count("|") == 1
    assert said.startswith(f"KVMPROBE {result.code.name} - ")
    SCHEMA.validate(json.loads(json.dumps(document(result, state))))
    metrics = list(text_string_to_metric_families(textfile(result, state, 1.5)))
    assert {m.name: m.samples for m in metrics}["kvmprobe_check_status"][0].value == result.code


@given(anything)
def test_losses_never_turn_into_fine_and_findings_outrank_them(state: Seen) -> None:
    result = conclude(state)
    alarms = {f.severity for f in state.found if f.ignored is None}
    if "critical" in alarms:
        assert result.code == Code.CRITICAL
    elif "warning" in alarms:
        assert result.code == Code.WARNING
    elif state.error is not None or result.unknown_vms:
        assert result.code in (Code.UNKNOWN, Code.WARNING)
    if result.code == Code.OK:
        active = set(FAULTS) - set(state.unreachable)
        assert not any(each.verdicts[f] == "inconclusive" for each in state.each for f in active)


def test_long_names_and_bars_do_not_break_the_line() -> None:
    label = vm_label("a|b" * 99, 5)
    assert "|" not in label
    assert len(label) < 60


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("lab-6.1-intel.kvmprobe", 2, "internal-slot-hit"),
        ("lab-6.12-intel.kvmprobe", 0, "fixed: internal-slot"),
        ("siblings-6.12.107.kvmprobe", 2, "address-space-mixup"),
        ("siblings-6.12.117.kvmprobe", 0, "unreachable: internal-slot"),
        ("intel-6.12-tss.kvmprobe", 3, "not observed: CACHE"),
    ],
)
def test_captures_have_the_codes_of_their_hosts(name: str, code: int, says: str) -> None:
    result = conclude(read_capture(GOLDEN / name))
    assert result.code == code
    assert says in result.text


def test_a_loss_of_one_vm_in_a_capture_degrades_only_that_vm(tmp_path: Path) -> None:
    born = [
        ev(Type.LIFECYCLE, kind=LifecycleChange.VM_SEEN, vm=n, vcpu=NO_VCPU, aux=100 + n, slot=-1)
        for n in (1, 2)
    ]
    lost = ev(Type.LOSS, vm=2, vcpu=NO_VCPU, addr=5, kind=int(Type.MATCH), slot=-1)
    with CaptureReader(GOLDEN / "siblings-6.12.117.kvmprobe") as reader:
        header = reader.header
    path = tmp_path / "a.kvmprobe"
    with CaptureWriter(path, header) as writer:
        writer.write(stream([*born, ev(Type.CACHE, vm=1), ev(Type.CACHE, vm=2), lost]))
    state = read_capture(path)
    result = conclude(state)
    assert (result.code, len(state.each)) == (Code.UNKNOWN, 2)
    (unknown,) = result.unknown_vms
    assert "102" in unknown.label
    assert "5 records of MATCH" in result.text


def status(**changes: object) -> Status:
    base = Status(
        schema=statuses.SCHEMA,
        version="0.1.0",
        boot_id=statuses.boot_id(),
        pid=1,
        written_ns=statuses.now_ns(),
        since="2026-01-01T00:00:00Z",
        seconds=60.0,
        state="watching",
        reason=None,
        verdict="not exercised",
        verdicts={fault: FaultVerdict("not exercised", (), ()) for fault in FAULTS},
        vms=(WatchedVm(1, "web", 12, "not exercised", QUIET, {}),),
        vms_seen=1,
        vms_left_out=0,
        findings=(),
        findings_left_out=0,
        events={"MMIO": 3},
        lost={},
        attached=(("MMIO", "MMIO"),),
        metrics=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


LATCHED = Latched(
    *("abc", "internal-slot", "critical", {"internal-slot-hit": 2}, "web", 12, 2, "", "", None),
    capture=None,
)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, Code.OK),
        ({"findings": (LATCHED,)}, Code.CRITICAL),
        ({"findings": (replace(LATCHED, ignored="known"),)}, Code.OK),
        (
            {
                "vms": (WatchedVm(1, "web", 12, "inconclusive", LOST, {"MATCH": 4}),),
                "verdicts": {f: FaultVerdict("inconclusive", (), ()) for f in FAULTS},
            },
            Code.UNKNOWN,
        ),
        (
            {
                "state": "detached",
                "vms": (),
                "verdicts": {
                    f: FaultVerdict("inconclusive", (), ("not attached: x",)) for f in FAULTS
                },
            },
            Code.UNKNOWN,
        ),
    ],
)
def test_a_running_watch_answers(tmp_path: Path, changes: dict[str, object], code: Code) -> None:
    statuses.write(status(**changes), tmp_path)
    exposed = [Exposure("address-space", "unreachable", "no SMM")]
    state, notes = ask_watch(tmp_path, exposed)
    assert state is not None
    assert notes == ()
    result = conclude(state)
    assert result.code == code
    assert result.verdicts["address-space"] == "unreachable"


def test_an_old_or_damaged_status_is_told_and_not_believed(tmp_path: Path) -> None:
    assert ask_watch(tmp_path, []) == (None, ())
    statuses.write(status(written_ns=statuses.now_ns() - 61 * 10**9), tmp_path)
    state, (note,) = ask_watch(tmp_path, [])
    assert state is None
    assert note.startswith("kvmprobe watch hangs: its status is ")
    (tmp_path / statuses.FILE_NAME).write_text("{")
    state, (note,) = ask_watch(tmp_path, [])
    assert state is None
    assert "damaged" in note


#: Call `kvmprobe check` in this process: (status, stdout, stderr).
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvmprobe", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run


def test_the_command_answers_from_the_status_of_a_watch(tmp_path: Path, check: Call) -> None:
    statuses.write(status(findings=(LATCHED,)), tmp_path)
    metrics = tmp_path / "kvmprobe.prom"
    code, out, err = check("--runtime-directory", tmp_path, "--textfile", metrics)
    assert (code, err) == (2, "")
    assert out.startswith("KVMPROBE CRITICAL - internal-slot-hit on web (pid 12) 2 times")
    assert out.count("\n") == 1
    assert "kvmprobe_check_status 2" in metrics.read_text()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["kvmprobe.prom", "status.json"]


@pytest.mark.parametrize("arguments", [["--colour"], ["-d", "inf"], ["-d", "nan"]], ids=str)
def test_wrong_usage_is_unknown(arguments: list[str], check: Call) -> None:
    code, out, err = check(*arguments)
    assert (code, out) == (3, "")
    assert err.count("\n") == 1


def test_a_failure_inside_is_unknown(check: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmprobe.check.model.conclude", None)
    code, out, err = check(GOLDEN / "lab-6.12-intel.kvmprobe")
    assert (code, out) == (3, "")
    assert "Traceback" in err


def test_a_capture_that_cannot_be_read_and_a_text_file_that_cannot_be_written(
    tmp_path: Path, check: Call
) -> None:
    code, out, _ = check(tmp_path / "none.kvmprobe", "--json")
    answer = json.loads(out)
    assert (code, answer["status"]) == (3, "UNKNOWN")
    assert "could not run" in answer["text"]
    statuses.write(status(), tmp_path)
    code, out, _ = check("--runtime-directory", tmp_path, "--textfile", tmp_path / "no/where")
    assert code == 3
    assert "not written: No such file or directory" in out


def test_documents_are_plain() -> None:
    state = seen(vm("a"), found=[CRITICAL])
    assert document(conclude(state), state)["findings"] == [asdict(CRITICAL)]


def test_age_of_a_process_whose_name_has_blanks(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    began = int((time.clock_gettime(time.CLOCK_BOOTTIME) - 5) * ticks)
    stat = tmp_path / "proc/self/stat"
    stat.parent.mkdir(parents=True)
    stat.write_text(f"7 (a) b (c) {' '.join(['S', *['0'] * 18])} {began} 0 0\n")
    assert process_age(tmp_path) >= 5
    assert process_age() > 0
