# SPDX-License-Identifier: MIT
"""A simulated fleet's events are those of the reference model, and calm where nothing is wrong."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.analysis.rules import FAULTS
from kvmprobe.analysis.run import analyze
from kvmprobe.errors import UsageError
from kvmprobe.fleet import scenario
from kvmprobe.fleet.background import ROUND, Background
from kvmprobe.fleet.simulate import Fleet, simulate_host
from kvmprobe.probes.schema import EVENT, NO_VCPU, SLOT_TSS
from kvmprobe.store.reader import CaptureReader
from tests.model.kernel import Vcpu
from tests.model.memslots import Change, Kind, Slot, Vm
from tests.model.probes import Probes
from tests.model.terms import How
from tests.model.truth import PFN_ERROR, Truth, What

TSS_GFN = scenario.TSS_GPA >> 12


def model(hides: bool, hits: int) -> tuple[NDArray[Any], list[What]]:
    """The reference model's rows of a VM whose L2, and then L1, touch the TSS; what happened."""
    kind = Kind(hides_internal=hides, address_spaces=1, first_pfn=0 if hides else PFN_ERROR)
    truth = Truth()
    probes = Probes(functions=True, start=0, skip_exits=0.0, random=Random(1))
    vm = Vm(1, kind, probes, truth, (0, 0), apicv=True)
    # As VMMs do, memory comes first; the simulation leaves its two rows out.
    vm.begin(Change(0, None, Slot(0, 0x180, 0x40)), Change(0, None, Slot(SLOT_TSS, TSS_GFN, 3)))
    vm.settle()
    vcpu = Vcpu(vm, 0)
    vcpu.idle()
    vcpu.enter_l2(False)
    vcpu.access(How.PLAIN, vcpu.gva(TSS_GFN) + 8, False)
    vcpu.leave_l2()
    vcpu.idle()
    for n in range(hits):
        vcpu.access(How.STRING, vcpu.gva(TSS_GFN) + 8, bool(n % 2))
    rows = probes.finish()
    return np.delete(rows, (1, 2)), [happening.what for happening in truth.happenings]


@pytest.mark.parametrize("hits", [0, 1, 5])
def test_a_fault_is_what_the_model_makes(hits: int) -> None:
    rows, happened = model(hides=True, hits=hits)
    own = scenario.seen() + scenario.filled() + scenario.armed()
    for n in range(hits):
        own += scenario.hit(write=bool(n % 2))
    made = scenario.rows(own, 1, 0, rows["ts"])
    assert made.tolist() == rows.tolist()
    assert happened.count(What.HIDDEN) == 1
    assert What.ARMED in happened
    # L2's own access is misread too.
    assert happened.count(What.MISREAD) == 1 + hits


def test_proof_of_a_fixed_kernel_is_what_the_model_makes() -> None:
    rows, happened = model(hides=False, hits=0)
    own = scenario.seen() + scenario.kept()
    assert scenario.rows(own, 1, 0, rows["ts"]).tolist() == rows.tolist()
    assert happened == [What.KEPT]


@settings(max_examples=20, deadline=None)
@given(
    offset=st.integers(0, ROUND - 1),
    cuts=st.lists(st.integers(1, ROUND), min_size=1, max_size=3),
)
def test_the_background_goes_on_wherever_it_is_cut(offset: int, cuts: list[int]) -> None:
    parts, taken = [], 0
    for many in cuts:
        parts += list(BACKGROUND.take(offset, taken, many, 1000 * taken, 1000))
        taken += many
    rows = {name: np.concatenate([part[name] for part in parts]) for name in EVENT.names or ()}
    assert len(rows["ts"]) == sum(cuts)
    assert (np.diff(rows["ts"].astype("i8")) > 0).all()
    own = rows["vcpu"] != NO_VCPU
    for vm, vcpu in ((1, 0), (2, 1)):
        seq = rows["seq"][(rows["vm"] == vm) & (rows["vcpu"] == vcpu) & own]
        assert seq.tolist() == list(range(1, len(seq) + 1))


BACKGROUND = Background(vms=2, vcpus=2, seed=3)


def test_a_calm_host_is_calm(tmp_path: Path) -> None:
    fleet = Fleet(hosts=1, days=1, events=300_000, vulnerable=0, hit=0, lossy=0)
    truth = simulate_host(fleet, tmp_path, 0)
    assert truth["kind"] == "calm"
    (path,) = tmp_path.rglob("*.parquet")
    with CaptureReader(path) as reader:
        analysis = analyze([reader])
    (capture,) = analysis.captures
    assert {v.verdict for v in analysis.verdicts.values()} == {"not exercised"}
    assert list(analysis.verdicts) == list(FAULTS)
    assert analysis.findings == []
    assert capture.coverage.whole
    assert analysis.events == truth["events"] > 300_000


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        ({"vulnerable": 0.1, "hit": 0.2}, "--hit"),
        ({"vulnerable": 0.5, "hit": 0.1, "lossy": 0.6}, "--lossy"),
        ({"events": 9}, "--events"),
    ],
)
def test_what_can_not_be_is_refused(shares: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Fleet(**({"hosts": 2, "days": 5, "events": 100} | shares))
