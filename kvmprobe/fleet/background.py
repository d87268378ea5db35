# SPDX-License-Identifier: MIT
"""What a simulated host's VMs do all day, with nothing wrong in it: made once, and repeated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import EVENT, NO_VCPU, Columns, Flag, Type

#: Events that are made; those of all simulated hosts are repetitions of them.
ROUND = 1 << 18
_HOLES = np.array([0xFE000, 0xFE001, 0xFEC00, 0xFED00, 0xFEE00, 0xE0000], "u8") << np.uint64(12)
_L1 = Flag.LEVEL_KNOWN | Flag.AS_KNOWN | Flag.DIRECT
_CACHED = _L1 | Flag.SLOT_KNOWN | Flag.GEN_KNOWN | Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT
#: type: (parts of 10,000, flags, kind, length of the access)
_MIX = {
    Type.FAULT: (2399, _L1, 1, 0),
    Type.FAULTIN: (600, _L1 | Flag.SLOT_KNOWN, 2, 0),
    Type.FILL: (600, _CACHED, 3, 0),
    Type.MMIO: (3200, _CACHED | Flag.TO_USERSPACE | Flag.MATCHED, 2, 4),
    Type.EMULATE: (2800, _L1, 0, 0),
    Type.SPTE: (400, _L1, 2, 0),
    Type.GENERATION: (1, Flag.CANDIDATE, 0, 0),
}


class Background:
    """Calm events of VMs 1 to `vms` with vCPUs 0 to `vcpus` - 1; sequence numbers begin at 1."""

    def __init__(self, vms: int, vcpus: int, seed: int) -> None:
        """Make one round of them."""
        random = np.random.default_rng(seed)
        rows = np.zeros(ROUND, EVENT)
        parts = [part for part, *_ in _MIX.values()]
        chosen = np.repeat(np.arange(len(_MIX)), parts)[random.integers(0, sum(parts), ROUND)]
        for column, name in enumerate(("flags", "kind", "len"), 1):
            rows[name] = np.array([int(each[column]) for each in _MIX.values()])[chosen]
        rows["type"] = np.array(list(_MIX))[chosen]
        rows["vm"] = random.integers(1, vms + 1, ROUND)
        rows["vcpu"] = random.integers(0, vcpus, ROUND)
        rows["slot"] = -1
        rows["addr"] = _HOLES[random.integers(0, len(_HOLES), ROUND)]
        rows["addr"] |= random.integers(0, 64, ROUND, "u8") << np.uint64(3)
        rows["value"] = random.integers(0, 1 << 10, ROUND)
        moved = rows["type"] == Type.GENERATION
        faults = rows["type"] == Type.FAULT
        rows["gen"][faults] = random.gamma(4, 500, np.count_nonzero(faults)).astype("u8")
        rows["vcpu"][moved] = NO_VCPU
        #: What a round adds to each event's sequence number, and to its VM's generation.
        self._seq_step, self._gen_step = np.zeros(ROUND, "u4"), np.zeros(ROUND, "u8")
        self._key = np.where(moved, 0, rows["vm"].astype("i8") * vcpus + rows["vcpu"])
        for key in np.unique(self._key[~moved]).tolist():
            own = self._key == key
            rows["seq"][own] = np.arange(np.count_nonzero(own))
            self._seq_step[own] = np.count_nonzero(own)
        for vm in range(1, vms + 1):
            own = (rows["vm"] == vm) & ~faults
            moves = moved & own
            rows["gen"][own] = 2 * np.cumsum(moves)[own]
            self._gen_step[own] = 2 * np.count_nonzero(moves)
        rows["addr"][moved] = 0
        self._columns = {name: np.ascontiguousarray(rows[name]) for name in EVENT.names or ()}
        self._moved, self._faults = moved, faults
        #: Less than 1: where between its neighbours an event lies.
        self._jitter = random.random(ROUND, "f4")

    def take(
        self, offset: int, first: int, events: int, start: int, step: int
    ) -> Iterator[Columns]:
        """Give events of one recording.

        Args:
            offset: where in the round the recording begins; sequence numbers begin there with 1.
            first: how many events of the recording were taken before.
            events: how many to give.
            start: the time at which the first may be, ns.
            step: time from one to the next, ns; each is in the first half of its own.

        """
        before = np.zeros(int(self._key.max()) + 1, "u4")
        keys, counts = np.unique(self._key[:offset], return_counts=True)
        before[keys] = counts
        done = 0
        while done < events:
            rounds, begin = divmod(offset + first + done, ROUND)
            end = min(begin + events - done, ROUND)
            at = slice(begin, end)
            columns: dict[str, NDArray[Any]] = {n: c[at] for n, c in self._columns.items()}
            seq = columns["seq"] + np.uint32(rounds) * self._seq_step[at]
            seq += np.uint32(1) - before[self._key[at]]
            seq[self._moved[at]] = 0
            gen = columns["gen"] + np.uint64(rounds) * self._gen_step[at]
            gen += np.where(self._faults[at], np.uint64(0), np.uint64(100))
            ts = np.arange(done, done + end - begin, dtype="u8") * np.uint64(step)
            ts += np.uint64(start) + (self._jitter[at] * (step // 2)).astype("u8")
            aux = np.where(self._faults[at], np.uint32(1), gen.astype("u4"))
            yield columns | {"seq": seq, "gen": gen, "aux": aux, "ts": ts}
            done += end - begin
