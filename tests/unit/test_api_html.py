# SPDX-License-Identifier: MIT
"""What a notebook shows of captures, analyses and findings: nothing of them is markup."""

from pathlib import Path

import numpy as np
import pytest

import kvmprobe
from kvmprobe.analysis.vms import named
from kvmprobe.frames import FindingsFrame
from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, Type
from kvmprobe.store import format as fmt
from kvmprobe.store.writer import CaptureWriter
from tests.streams import L1, L2, UNKNOWN, ev, noslot, stream

EVIL = "<script>alert(1)</script>\u202e"


@pytest.fixture
def capture(tmp_path: Path) -> kvmprobe.Capture:
    seen = ev(Type.LIFECYCLE, UNKNOWN, slot=-1, kind=LifecycleChange.VM_SEEN, vcpu=NO_VCPU, aux=7)
    header = fmt.new_header("live")
    header["host"]["kernel"] = EVIL
    path = tmp_path / "<b>.kvmprobe"
    with CaptureWriter(path, header) as writer:
        rows = stream([noslot(L2), ev(Type.MATCH, L1)], 2000)
        writer.write(np.concatenate([stream([seen]), named(1, 7, EVIL, 1000), rows]))
    return kvmprobe.open(path)


def test_html_is_escaped(capture: kvmprobe.Capture) -> None:
    analysis = capture.analysis()
    findings = capture.findings()
    shown = [capture._repr_html_(), analysis._repr_html_(), FindingsFrame._repr_html_(findings)]
    for text in shown:
        assert "&lt;script&gt;" in text
        assert "<script" not in text
        assert "<b>" not in text
        assert "\u202e" not in text


def test_findings_stay_findings(capture: kvmprobe.Capture) -> None:
    findings = capture.findings()
    critical = findings[findings["severity"] == "critical"]
    assert isinstance(critical, FindingsFrame)
    assert "<td>0xfffbd000</td>" in FindingsFrame._repr_html_(critical)
    assert critical["gpa"].dtype == np.uint64
    assert repr(capture.analysis()) == "<kvmprobe analysis: vulnerable, 2 finding(s)>"


def test_an_unknown_filter(capture: kvmprobe.Capture) -> None:
    with pytest.raises(TypeError, match="no filter 'cpu'; there are vm, vcpu, since, until"):
        capture.findings(cpu=1)  # type: ignore[call-arg]


def test_vms_are_told_apart_where_they_differ(capture: kvmprobe.Capture, tmp_path: Path) -> None:
    assert "VMs</caption>" not in capture.analysis()._repr_html_()
    path = tmp_path / "two.kvmprobe"
    with CaptureWriter(path, fmt.new_header("live")) as writer:
        lost = ev(Type.LOSS, UNKNOWN, slot=-1, vm=2, vcpu=NO_VCPU, addr=3, kind=Type.FILL)
        writer.write(stream([noslot(L2), ev(Type.MATCH, L1), ev(Type.MMIO, vm=2, slot=-1), lost]))
    shown = kvmprobe.open(path).analysis()._repr_html_()
    assert "<caption>2 VMs</caption>" in shown
    first, second = shown.partition("<td>VM 1</td>")[2].partition("<td>VM 2</td>")[::2]
    assert first.startswith("<td>vulnerable</td>")
    assert second.startswith("<td>inconclusive</td>")
