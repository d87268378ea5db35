# SPDX-License-Identifier: MIT
"""What captures are counted to: every rule by hand, and batches cut anywhere give the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.probes.schema import (
    NO_VCPU,
    SLOT_TSS,
    FaultinResult,
    Flag,
    MmioType,
    Site,
    SpteChange,
    Type,
)
from kvmprobe.stat import capture
from kvmprobe.stat.capture import count_captures
from kvmprobe.stat.model import SLOT_HOLE, SLOT_UNKNOWN, Counted, Fill, Key, Result, Table
from kvmprobe.store.reader import CaptureReader
from tests.batches import Batches
from tests.streams import L1, L2, UNKNOWN, ev, interleave, kept, noslot, stream, vcpu_streams

GOLDEN = Path(__file__).parents[1] / "data/golden/lab-6.1-amd-all.kvmprobe"
RSVD = 8


def count(events: list[dict[str, Any]], **options: Any) -> dict[Key, int]:  # noqa: ANN401
    return counts(count_captures([Batches(stream(events), **options)]))


def counts(counted: Counted) -> dict[Key, int]:
    assert all(cell.times is None for cell in counted.cells.values())
    return {key: cell.count for key, cell in counted.cells.items()}


def only(found: dict[Key, int], table: Table) -> dict[Key, int]:
    return {key: n for key, n in found.items() if key.table == table}


def at_exit(long: int, error: int = 0) -> dict[str, Any]:
    """The FAULT that is sent when kvm_mmu_page_fault() returns, `long` ns after it was called."""
    return ev(Type.FAULT, L1, value=error, gen=long, slot=-1)


def at_start(error: int = 0) -> dict[str, Any]:
    return ev(Type.FAULT, L1, value=error, site=Site.PAGE_FAULT_TP, slot=-1)


AT_START: dict[str, Any] = {"fault_site": Site.PAGE_FAULT_TP}
EMULATE = ev(Type.EMULATE, L1, slot=-1)
ERROR = ev(Type.FAULTIN, L1, slot=-1, kind=FaultinResult.ERROR)


# An event comes a microsecond after the one before it.
@pytest.mark.parametrize(
    ("before", "error", "result"),
    [
        ([noslot(L1), EMULATE], 0, Result.NO_SLOT),
        ([kept(L1)], 0, Result.FIXED),
        ([EMULATE], RSVD, Result.MMIO),
        ([EMULATE], 0, Result.EMULATED),
        ([ERROR], 0, Result.RETRY),
        ([], 0, Result.RETRY),
    ],
)
def test_fault_results(before: list[dict[str, Any]], error: int, result: Result) -> None:
    expected = {Key(Table.FAULT, 1, 0, 1, a=result): 1}
    long = 1000 * len(before) + 500
    assert only(count([EMULATE, *before, at_exit(long, error)]), Table.FAULT) == expected
    assert only(count([EMULATE, at_start(error), *before], **AT_START), Table.FAULT) == expected


def test_a_qualification_has_no_rsvd_bit() -> None:
    found = count([at_start(RSVD), EMULATE], vendor="intel", **AT_START)
    assert only(found, Table.FAULT) == {Key(Table.FAULT, 1, 0, 1, a=Result.EMULATED): 1}


def test_each_fault_has_its_own() -> None:
    found = count([at_start(), kept(L1), at_start(), noslot(L1), EMULATE, at_start()], **AT_START)
    results = [Result.FIXED, Result.NO_SLOT, Result.RETRY]
    assert only(found, Table.FAULT) == {Key(Table.FAULT, 1, 0, 1, a=r): 1 for r in results}


def test_pages_directions_and_memory() -> None:
    read = {"kind": MmioType.UNSATISFIED_READ, "addr": 0xF123}
    hole = L1 | Flag.SLOT_KNOWN
    found = count(
        [
            *[ev(Type.MMIO, hole, slot=-1, **read)] * 3,
            ev(Type.MMIO, hole, slot=-1, **read | {"kind": MmioType.READ}),
            ev(Type.MMIO, L2, addr=0xFFFBD008, kind=MmioType.WRITE),
            ev(Type.MMIO, L1 | Flag.UNSTABLE, addr=0xFFFBD008, kind=MmioType.WRITE),
        ]
    )
    assert found == {
        Key(Table.MMIO, 1, 0, 1, 0xF000, 0, SLOT_HOLE): 4,
        Key(Table.MMIO, 1, 0, 2, 0xFFFBD000, 1, SLOT_TSS): 1,
        Key(Table.MMIO, 1, 0, 1, 0xFFFBD000, 1, SLOT_UNKNOWN): 1,
    }


def test_hits_say_who_filled() -> None:
    hit, fill = ev(Type.MATCH, L1), ev(Type.FILL, L2)
    believed = ev(Type.MATCH, L1, site=Site.RSVD)  # KVM's own predicate, not the emulator's
    refill = ev(Type.FILL, L1, site=Site.MMIO_SPTE)
    found = count([hit, fill, hit, believed, hit, refill, hit])
    slot = SLOT_TSS
    assert found == {
        Key(Table.HIT, 1, 0, 1, 0, 0, slot): 1,
        Key(Table.HIT, 1, 0, 1, 0, 2, slot): 2,
        Key(Table.HIT, 1, 0, 1, 0, 1, slot): 1,
        Key(Table.FILL, 1, 0, 2, 0, Fill.FROM_FAULT, slot): 1,
        Key(Table.FILL, 1, 0, 1, 0, Fill.FROM_SPTE, slot): 1,
    }


def test_generations_are_counted_once_for_all_vcpus() -> None:
    seen = ev(Type.LIFECYCLE, UNKNOWN, kind=1, len=2, vcpu=NO_VCPU, slot=-1)
    moved = [
        ev(Type.GENERATION, UNKNOWN, value=first, gen=last, vcpu=vcpu, slot=-1)
        for first, last, vcpu in ((2, 6, 0), (2, 8, 1), (6, 10, 0), (10, 1 << 63, 1))
    ]
    found = count([seen, *moved])
    assert found == {Key(Table.GENERATION, 1, NO_VCPU, 0, a=0): 4}


def test_the_rest() -> None:
    found = count(
        [
            ev(Type.SPTE, L1, kind=SpteChange.STALE, slot=-1),
            ev(Type.NESTING, L2, kind=1, slot=-1),
            ev(Type.NESTING, L1, kind=0, slot=-1),
            ev(Type.EMULATE, L1 | Flag.FAILED, slot=-1),
            ev(Type.EMULATE, UNKNOWN, slot=-1),
        ]
    )
    assert found == {
        Key(Table.SPTE, 1, 0, 1, a=SpteChange.STALE): 1,
        Key(Table.NESTING, 1, 0, 2, a=1): 1,
        Key(Table.NESTING, 1, 0, 2, a=0): 1,
        Key(Table.EMULATE, 1, 0, 1, a=1): 1,
        Key(Table.EMULATE, 1, 0, 0, a=0): 1,
    }


@given(
    vcpu_streams(), st.integers(0, 1000), st.lists(st.integers(0, 40), max_size=4), st.booleans()
)
def test_cuts_change_nothing(
    streams: list[list[dict[str, Any]]], seed: int, cuts: list[int], start: bool
) -> None:
    rows = stream(interleave(streams, seed))
    site = Site.PAGE_FAULT_TP if start else Site.PAGE_FAULT
    whole = count_captures([Batches(rows, fault_site=site)])
    cuts = [cut for cut in cuts if cut < len(rows)]
    parts = count_captures([Batches(rows, cuts, fault_site=site)])
    assert counts(whole) == counts(parts)
    assert whole.lost == parts.lost


def test_a_million_pages_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_PAGES", 100)
    rows = stream([ev(Type.MMIO, L1, slot=-1)] * 3000)
    rows["addr"] = (np.arange(3000, dtype=np.uint64) // 2) << np.uint64(12)
    rows["addr"][::2] = 0x7000
    counted = count_captures([Batches(rows, range(0, 3000, 50))])
    assert len(counted.cells) <= 150
    assert counted.total(Table.MMIO) == 3000
    assert counted.evicted_rows > 1000
    # The page that is used most stays.
    assert max(cell.count for cell in counted.cells.values()) >= 1500


def test_golden() -> None:
    with CaptureReader(GOLDEN) as once, CaptureReader(GOLDEN) as again:
        single, both = count_captures([once]), count_captures([once, again])
    assert {vm.name for vm in single.vms.values()} >= {"tss-shadow", "two-vcpus", "hole"}
    assert sorted(both.vms) == list(range(1, 2 * len(single.vms) + 1))
    for table in Table:
        assert both.total(table) == 2 * single.total(table)
    # tss-shadow: L1 had 2 hits on what L2 had filled.
    assert counts(single)[Key(Table.HIT, 1, 0, 1, 0, 2, SLOT_TSS)] == 2
