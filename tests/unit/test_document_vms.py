# SPDX-License-Identifier: MIT
"""Who a VM and a vCPU are, as LIFECYCLE events say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.analysis.integrity import Integrity
from kvmprobe.analysis.vms import VmNames, named, printable
from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, Type, columns
from tests.streams import UNKNOWN, ev, stream


def _seen(comm: bytes = b"qemu-system-x86", pid: int = 4711) -> dict[str, Any]:
    value, gen = np.frombuffer(comm.ljust(16, b"\0"), "<u8").tolist()
    return ev(
        Type.LIFECYCLE, UNKNOWN, slot=-1, vcpu=NO_VCPU, kind=LifecycleChange.VM_SEEN,
        value=value, gen=gen, aux=pid,
    )  # fmt: skip


def _names(*parts: Any) -> VmNames:  # noqa: ANN401
    names = VmNames()
    for rows in parts:
        names.feed(columns(rows))
    return names


def test_the_process_is_the_name_where_no_other_is_known() -> None:
    vm = _names(stream([_seen()])).get(1)
    assert (vm.name, vm.pid) == ("qemu-system-x86", 4711)
    assert (_names().get(3).id, _names().get(3).name, _names().get(3).pid) == (3, None, None)


@pytest.mark.parametrize(
    "name", ["web", "exactly-16-bytes", "a longer name: web frontend 2", "z\u00fc" * 60]
)
def test_the_vmms_name_comes_first(name: str) -> None:
    rows = named(1, 4711, name, 5)
    for order in (rows, rows[::-1]):
        for cut in (0, 1):
            vm = _names(stream([_seen()]), order[:cut], order[cut:]).get(1)
            assert (vm.name, vm.pid) == (name, 4711)


def test_a_name_with_a_part_missing_is_none() -> None:
    rows = named(1, 4711, "a name of more than thirty-two bytes, this one", 5)
    assert len(rows) == 3
    assert _names(stream([_seen()]), rows[[0, 2]]).get(1).name == "qemu-system-x86"


def test_names_are_bounded_and_nothing_is_made_of_nothing() -> None:
    assert _names(named(1, 1, "x" * 5000, 5)).get(1).name == "x" * 256
    assert len(named(1, 1, "", 5)) == 0


def test_events_of_a_name_are_no_anomaly() -> None:
    integrity = Integrity()
    integrity.feed(columns(named(2, 7, "a name that takes two events", 5)))
    assert (integrity.anomaly_counts, integrity.gaps, integrity.total) == ({}, [], 2)


@given(st.text(max_size=80))
def test_any_name_is_told_printable(name: str) -> None:
    told = _names(named(9, 1, name, 5)).get(9).name
    expected = printable(
        name.encode("utf-8", "replace")[:256].split(b"\0")[0].decode("utf-8", "replace")
    )
    assert told == (expected or None)


def test_threads_of_vcpus() -> None:
    kind = LifecycleChange.VCPU_SEEN
    seen = [ev(Type.LIFECYCLE, UNKNOWN, slot=-1, vcpu=n, kind=kind, aux=100 + n) for n in (0, 3)]
    names = _names(stream([_seen(), *seen]))
    assert [names.thread(1, n) for n in (0, 1, 3)] == [100, None, 103]
