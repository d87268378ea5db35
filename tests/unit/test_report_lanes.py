# SPDX-License-Identifier: MIT
"""What the report draws: nothing disappears when time is cut into bins."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.probes.schema import NO_VCPU, SLOT_TSS, Flag, Type, columns
from kvmprobe.report.cells import MEMORY, STALE, UNSEEN, Held, Level
from kvmprobe.report.lanes import Lane, Lanes
from kvmprobe.report.memory import MAX_PAGES, Memory
from kvmprobe.report.rates import MAX_BINS, Rates
from tests.streams import APIC_GPA, L1, L2, RAM_GPA, UNKNOWN, ev, interleave, stream, vcpu_streams

Cuts = list[int]


def lanes_of(rows: NDArray[Any], cuts: Cuts = [], max_cells: int = 1 << 15) -> Lanes:  # noqa: B006
    lanes = Lanes(max_cells)
    for part in np.split(rows, sorted(cuts)):
        lanes.feed(columns(part))
    return lanes


def same(one: Lane, other: Lane) -> bool:
    arrays = ("bin", "held", "after", "levels", "level", "matches", "hits", "gfn")
    return (one.vm, one.vcpu) == (other.vm, other.vcpu) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


def moved(gen: int, **fields: int) -> dict[str, Any]:
    known = {"vcpu": NO_VCPU, "addr": 0, "slot": -1, "gen": gen, "value": gen - 2}
    return ev(Type.GENERATION, UNKNOWN, **{**known, **fields})


@st.composite
def rows_and_cuts(draw: st.DrawFn) -> tuple[NDArray[Any], Cuts]:
    rows = stream(interleave(draw(vcpu_streams()), draw(st.integers(0, 99))))
    if len(rows):
        gaps = st.sampled_from((0, 1, 1000, 10**6, 10**9, 1 << 40))
        steps = draw(st.lists(gaps, min_size=len(rows), max_size=len(rows)))
        rows["ts"] = 10**12 + np.cumsum(np.array(steps, np.uint64))
    return rows, draw(st.lists(st.integers(0, len(rows)), max_size=4))


@given(rows_and_cuts(), st.sampled_from((8, 24, 1 << 15)))
@settings(max_examples=12, deadline=None)
def test_lanes_keep_everything(given: tuple[NDArray[Any], Cuts], room: int) -> None:
    rows, cuts = given
    gathered = lanes_of(rows, cuts, room)
    lanes = gathered.lanes()
    whole = lanes_of(rows, [], room)
    assert len(whole.lanes()) == len(lanes)
    assert whole.shift == gathered.shift
    assert all(same(a, b) for a, b in zip(lanes, whole.lanes(), strict=True))
    assert sum(len(lane.bin) for lane in lanes) <= 2 * max(room, len(lanes))
    own = rows[(rows["vcpu"] != NO_VCPU) & (rows["vm"] != 0)]
    keys = sorted(set(zip(own["vm"].tolist(), own["vcpu"].tolist(), strict=True)))
    assert [(lane.vm, lane.vcpu) for lane in lanes] == keys
    for lane in lanes:
        mine = own[(own["vm"] == lane.vm) & (own["vcpu"] == lane.vcpu)]
        match = mine[mine["type"] == Type.MATCH]
        page = match["addr"] >> np.uint64(12)
        hit = (match["slot"] >= 0) & (page != 0) & (page != APIC_GPA >> 12)
        assert lane.events == len(mine)
        assert int(lane.matches.sum()) == len(match)
        assert int(lane.hits.sum()) == int(hit.sum())
        assert (np.diff(lane.bin) > 0).all()
        # Each believed access of memory lies in the bin of its time.
        at = (match["ts"][hit] >> np.uint64(gathered.shift)).astype(np.int64)
        assert set((at - gathered.first_bin).tolist()) == set(lane.bin[lane.hits > 0].tolist())


def test_a_cache_is_followed_from_fill_to_fill() -> None:
    rows = stream(
        [
            ev(Type.CACHE, L1, addr=0, slot=-1, gen=0),
            ev(Type.FILL, L1, addr=0xFE000000, slot=-1, gen=6),
            ev(Type.FILL, L2, gen=6),
            ev(Type.CACHE, L1, gen=6),
            ev(Type.MATCH, L1, gen=6),
            moved(8),
            ev(Type.EMULATE, L1, slot=-1),
        ]
    )
    (lane,) = lanes_of(rows).lanes()
    memory_by_l2 = Held.BY_L2 + MEMORY
    assert lane.bin.tolist() == [1000 * n for n in range(7)]
    assert lane.after.tolist() == [
        Held.EMPTY,
        Held.BY_L1,
        memory_by_l2,
        memory_by_l2,  # L1 finds what L2 filled
        memory_by_l2,
        memory_by_l2 + STALE,
        memory_by_l2 + STALE,
    ]
    assert lane.held[2] == 1 << Held.BY_L1 | 1 << memory_by_l2
    assert lane.held[5] == 1 << memory_by_l2 | 1 << (memory_by_l2 + STALE)
    assert lane.level.tolist() == [Level.L1, Level.L1, Level.L2] + [Level.L1] * 4
    assert lane.hits.tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert lane.gfn.tolist()[1:3] == [0xFE000, 0xFFFBD]


def test_the_other_address_space_leaves_an_entry_alone() -> None:
    rows = stream([ev(Type.FILL, L2, gen=6), moved(7, len=1), ev(Type.EMULATE, slot=-1)])
    (lane,) = lanes_of(rows).lanes()
    assert lane.after.tolist() == [Held.BY_L2 + MEMORY] * 2


def test_smm_is_told_from_what_it_left_behind() -> None:
    left = Flag.FILL_AS_KNOWN | Flag.OTHER_AS | Flag.AS_KNOWN
    rows = stream([ev(Type.CACHE, L1 | left, gen=6), ev(Type.NESTING, UNKNOWN, slot=-1)])
    (lane,) = lanes_of(rows).lanes()
    assert lane.after.tolist() == [Held.BY_SMM + MEMORY] * 2
    assert lane.level.tolist() == [Level.L1, Level.UNKNOWN]


def test_nothing_is_said_of_a_cache_that_was_not_seen() -> None:
    (lane,) = lanes_of(stream([ev(Type.FAULT, L1, slot=-1)])).lanes()
    assert lane.after.tolist() == [UNSEEN]
    assert lane.held.tolist() == [0]


def test_hostile_times_and_numbers() -> None:
    rows = stream([ev(Type.FILL, vm=n % 7 + 1, vcpu=n % 300) for n in range(3000)])
    rows["ts"][::2] = (1 << 64) - 1
    rows["ts"][1::4] = 0
    rows["vm"][5] = (1 << 32) - 1
    gathered = lanes_of(rows, [1000, 2000])
    assert sum(lane.events for lane in gathered.lanes()) == 3000
    rates = Rates()
    rates.feed(columns(rows))
    assert (rates.first_ts, rates.last_ts) == (0, (1 << 64) - 1)
    assert int(rates.counts()[Type.FILL].sum()) == 3000


@given(rows_and_cuts())
@settings(max_examples=12, deadline=None)
def test_rates_keep_every_event_and_every_loss(given: tuple[NDArray[Any], Cuts]) -> None:
    rows, cuts = given
    lost = rows["type"] == Type.LOSS
    rows["addr"][lost] = rows["seq"][lost] + 1
    rates = Rates()
    for part in np.split(rows, sorted(cuts)):
        rates.feed(columns(part))
    counts = rates.counts()
    for kind in Type:
        mine = rows[rows["type"] == kind]
        wanted = int(mine["addr"].sum()) if kind == Type.LOSS else len(mine)
        assert int(counts[kind].sum()) == wanted
        assert len(counts[kind]) <= MAX_BINS
    at = {(int(ts) >> rates.shift) - rates.first_bin for ts in rows["ts"][lost]}
    assert set(np.flatnonzero(counts[Type.LOSS]).tolist()) == at


def test_no_flood_of_device_pages_hides_memory() -> None:
    flood = stream(ev(Type.MMIO, slot=-1, addr=n << 12) for n in range(1, 2 * MAX_PAGES + 2000))
    hit = stream([ev(Type.MATCH, L1, addr=RAM_GPA, slot=3), ev(Type.FILL, L2, slot=SLOT_TSS)])
    memory = Memory()
    memory.feed(columns(np.concatenate([flood, flood, hit])))
    taken = [page for page in memory.pages(1) if page.slot >= 0]
    assert [(page.gfn << 12, page.matches, page.fills_l2) for page in taken] == [
        (RAM_GPA, 1, 0),
        (0xFFFBD000, 0, 1),
    ]
    assert memory.more_pages > 0
