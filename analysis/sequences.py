# SPDX-License-Identifier: MIT
"""The fast way through a batch that has nothing odd in it: one compiled loop.

Nearly every batch is whole.  The loop only finds out whether this one is; if not, it takes nothing
in, and `Integrity` looks at the batch as it does without numba.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis import steps
from kvmprobe.probes.schema import NO_VCPU, Columns, Type

_LOSS = int(Type.LOSS)
_LIFECYCLE = int(Type.LIFECYCLE)
#: Flags that integrity looks at, as one small number: the low four, four from bit 16, two from 24.
_LOW, _MIDDLE, _HIGH = 0xF, 0xF0, 0x300
_NAMES = ("vm", "vcpu", "seq", "type", "flags")


def small(flags: Any) -> Any:  # noqa: ANN401 - one number, or an array of them
    """Return the flags that can contradict each other as one number below 1024."""
    return flags & _LOW | flags >> 12 & _MIDDLE | flags >> 16 & _HIGH


class Table(NamedTuple):
    """The last sequence number of each vCPU; a VM itself has the key of NO_VCPU.

    `hashes`, `seed` and `key` are those of `steps.Places`; a place without a number has -1.
    """

    hashes: NDArray[np.int32]
    seed: NDArray[np.int64]
    key: NDArray[np.int64]
    last: NDArray[np.int64]


class Batch(NamedTuple):
    """The columns that are looked at, and which small numbers of flags are impossible."""

    vm: NDArray[np.uint32]
    vcpu: NDArray[np.uint16]
    seq: NDArray[np.uint32]
    type: NDArray[np.uint8]
    flags: NDArray[np.uint32]
    impossible: NDArray[np.uint8]


def follow(batch: Batch, table: Table, counts: NDArray[np.int64]) -> bool:
    """Go through a batch; False at the first row that needs a closer look.

    Args:
        batch: the columns.
        table: brought up to date row by row.
        counts: events by type, added to.

    """
    for i in range(len(batch.vm)):
        kind = batch.type[i]
        if kind in (_LOSS, _LIFECYCLE) or batch.vm[i] == 0:
            return False
        if batch.impossible[small(batch.flags[i])] != 0:
            return False
        counts[kind] += 1
        place = table.hashes[steps.find(table, np.int64(batch.vm[i]) << 16 | batch.vcpu[i])]
        if place < 0:
            return False
        if batch.vcpu[i] != NO_VCPU:
            seq = np.int64(batch.seq[i])
            if seq != (table.last[place] + 1) & 0xFFFFFFFF:
                return False
            table.last[place] = seq
    return True


@cache
def _compiled() -> Any:  # noqa: ANN401 - numba has no types
    from kvmprobe.analysis.jit import compiled

    return compiled(follow, (small, steps.find), counted=False)


class Sequences:
    """Keeps the table, and gives batches back that the loop doesn't take."""

    def __init__(self, impossible: NDArray[np.uint8]) -> None:
        """Begin with an empty table; `impossible`: not 0 for small numbers that can't be."""
        self._impossible = impossible
        self._seed = np.array([secrets.randbits(29) * 2 + 1 for _ in range(2)], np.int64)
        self.load({}, ())

    def take(self, columns: Columns) -> NDArray[np.int64] | None:
        """Take a batch in, if it is whole.

        Returns:
            Events by type, shape (256,); None: nothing was taken in.

        """
        before = self._table.last.copy()
        counts = np.zeros(256, np.int64)
        whole = {name: np.ascontiguousarray(columns[name]) for name in _NAMES}
        batch = Batch(**whole, impossible=self._impossible)
        if _compiled()(batch, self._table, counts):
            return counts
        self._table.last[:] = before
        return None

    def last(self) -> dict[int, int]:
        """Return the last sequence number by vm << 16 | vcpu."""
        own = self._table.key & NO_VCPU != NO_VCPU
        keys, last = self._table.key[own].tolist(), self._table.last[own].tolist()
        return dict(zip(keys, last, strict=True))

    def load(self, last: Mapping[int, int], vms: Mapping[int, object] | tuple[()]) -> None:
        """Start from these numbers, and these VMs."""
        key = np.array([*last, *(vm << 16 | NO_VCPU for vm in vms if vm)], np.int64)
        size = 1 << (2 * len(key) + 2).bit_length()
        self._table = Table(np.full(size, -1, np.int32), self._seed, key, np.full(len(key), -1))
        self._table.last[: len(last)] = list(last.values())
        for place, own in enumerate(key.tolist()):
            self._table.hashes[steps.find(self._table, own)] = place
