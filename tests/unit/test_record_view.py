# SPDX-License-Identifier: MIT
"""The picture of a running recording: what it follows, and that it fits its terminal."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from kvmprobe.analysis.vms import named
from kvmprobe.cli.live import finding_line
from kvmprobe.cli.liveview import View, counts, told
from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, Type
from tests.streams import L1, L2, UNKNOWN, detect, ev, noslot, stream, vm_gone

SEEN = ev(Type.LIFECYCLE, UNKNOWN, slot=-1, kind=LifecycleChange.VM_SEEN, vcpu=NO_VCPU, aux=7)
EVIL = "[red]\x1b[2J\u202e\nx" + "y" * 90


def picture(view: View, rows: NDArray[Any] | None = None, width: int = 80, height: int = 24) -> str:
    found = tuple(detect(rows)[1]) if rows is not None else ()
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    drawn = view.picture(
        [counts("head")], found, lambda finding: told(finding, view.names), 2.0, height
    )
    console.print(drawn)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines(text: str) -> list[str]:
    return Text.from_ansi(text).plain.splitlines()


def test_rates_level_and_cache() -> None:
    view = View()
    view.feed(stream([SEEN, ev(Type.MATCH, L1), ev(Type.MATCH, L1), ev(Type.FILL, L2)]))
    view.feed(stream([ev(Type.CACHE, L1, vcpu=9, addr=0xFE000000, slot=-1)]))
    row, other = lines(picture(view))[2:4]
    assert row.split() == ["1", "0", "2", "L2", "1", "0xfffbd000,", "by", "L2,", "TSS"]
    assert other.split() == ["1", "9", "0", "L1", "0", "0xfe000000,", "by", "?"]
    view.feed(stream([ev(Type.CACHE, L1)]))
    assert lines(picture(view))[2].split()[2:4] == ["0", "L1"]
    assert "by L2" in lines(picture(view))[2]


def test_findings_stand_below() -> None:
    rows = stream([noslot(L2), ev(Type.MATCH, L1)])
    view = View()
    view.feed(rows)
    assert lines(picture(view, rows))[-2:] == [
        "critical internal-slot-hit: VM 1, vCPU 0, 0xfffbd000 (TSS)",
        "warning internal-slot-fill: VM 1, vCPU 0, 0xfffbd000 (TSS)",
    ]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 8), (200, 60)])
def test_it_fits_whatever_a_guest_is_called(width: int, height: int) -> None:
    rows = stream(e for n in range(300) for e in (noslot(L2, vcpu=n), ev(Type.MATCH, L1, vcpu=n)))
    view = View()
    view.feed(np.concatenate([stream([SEEN]), named(1, 7, EVIL, 1000), rows]))
    text = picture(view, rows, width, height)
    drawn = lines(text)
    assert len(drawn) < height
    assert max(map(len, drawn)) <= width
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    assert "quieter vCPUs" in text
    assert "more findings" in text
    assert width < 80 or "[red]" in drawn[-3]


def test_what_went_is_gone() -> None:
    view = View()
    view.feed(stream([ev(Type.MATCH, vcpu=3), ev(Type.MATCH, vm=2), vm_gone(1)]))
    assert [line.split()[:2] for line in lines(picture(view))[2:]] == [["2", "0"]]


def test_a_line_escapes_names() -> None:
    rows = np.concatenate([stream([SEEN]), named(1, 7, EVIL, 1000), stream([noslot(L2)], 2000)])
    view = View()
    view.feed(rows)
    (line,) = (finding_line(finding, view.names) for finding in detect(rows)[1])
    assert line.isprintable()
