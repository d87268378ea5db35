# SPDX-License-Identifier: MIT
"""The compiled way through whole batches: the same answers as without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.analysis import integrity as integrity_module
from kvmprobe.analysis import jit, sequences
from kvmprobe.analysis.integrity import Integrity
from kvmprobe.probes.schema import NO_VCPU, Flag, LifecycleChange, Type, columns
from tests.streams import L1, UNKNOWN, ev, stream, vm_gone

pytestmark = pytest.mark.skipif(
    not jit.available(), reason="numba is not installed, or KVMPROBE_NO_JIT is set"
)

PLAIN = ev(Type.FILL)
#: What makes a batch odd: one of these in some place.
ODD: tuple[dict[str, Any], ...] = (
    {"seq": 7},
    {"seq": 0},
    {"vm": 0},
    {"vm": 9},
    {"flags": Flag.L2},
    {"vcpu": NO_VCPU},
    {"type": Type.LOSS, "vm": 2, "addr": 5},
    {"type": Type.LIFECYCLE, "kind": LifecycleChange.VCPU_SEEN},
    {"type": Type.LIFECYCLE, "kind": LifecycleChange.VCPU_GONE},
    vm_gone(2),
)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity_module, "_COMPILE_AFTER", 0)


def _said(rows: NDArray[Any], batches: int, *, jit: bool) -> tuple[Any, ...]:
    follower = Integrity(jit=jit)
    for part in np.array_split(rows, batches):
        follower.feed(columns(part))
    return (
        follower.events, follower.lost, follower.gaps, follower.missing, follower.anomalies,
        follower.anomaly_counts, follower.vms, follower.gone,
        [follower.trusts(vm, vcpu) for vm in range(10) for vcpu in (0, 1, NO_VCPU)],
    )  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 199), st.sampled_from(ODD)), max_size=5),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=20, deadline=None)
def test_the_same_is_said(odd: list[tuple[int, dict[str, Any]]], batches: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    who = random.integers(0, 4, 200).tolist()
    events = [PLAIN | {"vm": 1 + n // 2, "vcpu": n % 2} for n in who]
    for place, change in odd:
        events[place] |= change
    rows = stream(events)
    assert _said(rows, batches, jit=True) == _said(rows, batches, jit=False)


def test_sequences_wrap() -> None:
    top = (1 << 32) - 3
    rows = stream([PLAIN | {"seq": (top + n) % (1 << 32)} for n in range(8)])
    said = _said(rows, 8, jit=True)
    assert said == _said(rows, 8, jit=False)
    assert said[3] == 0


def test_whole_batches_go_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    take = sequences.Sequences.take

    def noted(self: sequences.Sequences, batch: Any) -> Any:  # noqa: ANN401 - passed through
        answer = take(self, batch)
        taken.append(answer is not None)
        return answer

    monkeypatch.setattr(sequences.Sequences, "take", noted)
    rows = stream([PLAIN] * 40 + [ev(Type.LOSS, UNKNOWN, vm=0, vcpu=NO_VCPU, slot=-1, kind=3)])
    _said(np.concatenate([rows, stream([ev(Type.MMIO, L1, seq=40)])]), 42, jit=True)
    # The first batch of a vCPU and the one with a loss need a look.
    assert taken == [False] + [True] * 39 + [False, True]


def test_impossible_flags_are_told_the_same_way() -> None:
    flags = np.arange(1 << 10, dtype=np.uint32)
    spread = (flags & 0xF) | (flags & 0xF0) << 12 | (flags & 0x300) << 16
    assert (sequences.small(spread) == flags).all()
