# SPDX-License-Identifier: MIT
"""The picture of a running watch: from its status, what it was sent, and the flight recorder."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from kvmprobe.analysis.vms import named, printable
from kvmprobe.cli.watchview import WatchView
from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, Type
from kvmprobe.watch.status import FaultVerdict, Latched, Status, WatchedVm
from tests.streams import L1, L2, UNKNOWN, ev, stream

EVIL = "[red]\x1b[2J\u202e\n</b>" + "y" * 90
STATUS = Status(
    schema="", version="", boot_id="", pid=1, written_ns=0, since="", seconds=61.5,
    state="watching", reason=None, verdict="not exercised",
    verdicts={"internal-slot": FaultVerdict("not exercised", (), ())},
    vms=(WatchedVm(1, "a", 7, "not exercised", {}, {}),), vms_seen=1, vms_left_out=0,
    findings=(), findings_left_out=0, events={"MMIO": 1234}, lost={"MMIO": 0}, attached=(),
    metrics=None,
)  # fmt: skip
FOUND = Latched(
    id="0123456789", fault="internal-slot", severity="critical", rules={"internal-slot-hit": 2},
    vm="a", pid=7, count=2, first="2026-01-01T00:00:00Z", last="2026-01-01T00:00:01Z",
    ignored=None, capture=None,
)  # fmt: skip
SEEN = ev(Type.LIFECYCLE, UNKNOWN, slot=-1, kind=LifecycleChange.VM_SEEN, vcpu=NO_VCPU, aux=7)
NONE = stream([])


def met(*vcpus: int) -> NDArray[Any]:
    kind = LifecycleChange.VCPU_SEEN
    return stream(ev(Type.LIFECYCLE, UNKNOWN, slot=-1, kind=kind, vcpu=vcpu) for vcpu in vcpus)


def drawn(
    view: WatchView,
    status: Status = STATUS,
    flight: NDArray[Any] = NONE,
    width: int = 80,
    height: int = 24,
) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    console.print(view.picture(status, flight, 2.0, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(text: str) -> list[str]:
    return Text.from_ansi(text).plain.splitlines()


def test_the_flight_recorder_tells_rate_level_and_cache() -> None:
    view = WatchView()
    view.feed(met(0, 1))
    flight = stream([ev(Type.FILL, L2), ev(Type.EMULATE, L2, slot=-1), ev(Type.MMIO, L1, slot=-1)])
    assert "no memory seen" in drawn(view)
    drawn(view, flight=flight)
    flight["seq"] += 400
    head, verdict, _, row, other = lines(drawn(view, flight=flight))
    assert head.split("  ") == ["62 s", "1 VMs", "1,234 events sent", "0 lost", "0 findings"]
    assert verdict == "verdict: not exercised"
    told = ["1", "0", "200", "L1", "not", "exercised", "0xfffbd000,", "by", "L2,", "TSS"]
    assert row.split() == told
    assert other.split()[:2] == ["1", "1"]


def test_what_the_recorder_has_of_gone_vcpus_is_not_shown() -> None:
    view = WatchView()
    view.feed(met(0))
    text = drawn(view, flight=stream([ev(Type.MMIO, L1), ev(Type.MMIO, L1, vcpu=9)]))
    assert len(lines(text)) == 4
    assert len(lines(drawn(view, replace(STATUS, vms=())))) == 3


def test_findings_stand_below_with_what_ack_wants() -> None:
    other = replace(FOUND, id="abc", last="2026-01-01T00:00:09Z", ignored="known")
    found = lines(drawn(WatchView(), replace(STATUS, findings=(other, FOUND))))[-2:]
    assert found == [
        "abc critical internal-slot-hit: a, 2 times",
        "0123456789 critical internal-slot-hit: a, 2 times",
    ]


def test_why_nothing_is_known() -> None:
    verdicts = {"internal-slot": FaultVerdict("inconclusive", (), ("3 records of MMIO were lost",))}
    doubted = replace(STATUS, verdict="inconclusive", verdicts=verdicts)
    assert "3 records of MMIO were lost" in lines(drawn(WatchView(), doubted))
    told = lines(drawn(WatchView(), replace(doubted, state="detached", reason="SIGUSR1")))
    assert "detached: SIGUSR1" in told


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 8), (200, 60)])
def test_it_fits_whatever_a_guest_is_called(width: int, height: int) -> None:
    view = WatchView()
    view.feed(np.concatenate([stream([SEEN]), named(1, 7, EVIL, 1000), met(*range(300))]))
    # The watch gives names that are printable.
    name = printable(EVIL)
    found = tuple(replace(FOUND, id=f"{n}", vm=name) for n in range(99))
    status = replace(STATUS, findings=found, vms=(replace(STATUS.vms[0], name=name),), reason=name)
    text = drawn(view, status, width=width, height=height)
    assert len(lines(text)) <= height
    assert max(map(len, lines(text))) <= width
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    assert "quieter vCPUs" in text
    assert "more findings" in text
