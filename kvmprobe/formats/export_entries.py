# SPDX-License-Identifier: MIT
"""From events to entries of the MMIO caches: where each one begins and ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, Type

#: The fields of an event that are looked at and kept.
FIELDS = ("ts", "vm", "vcpu", "seq", "type", "flags", "addr", "value", "gen", "slot", "kind")
#: What makes two observations of a cache the same entry.
_CONTENT = ("addr", "value", "gen", "kind")


def key_of(rows: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """VM and vCPU in one number: vm << 16 | vcpu."""
    key: NDArray[np.int64] = rows["vm"].astype(np.int64) << 16 | rows["vcpu"]
    return key


class Entries:
    """The entry that each vCPU's cache holds: one, from its fill to the next.

    Memory is bounded by the vCPUs that live.
    """

    def __init__(self) -> None:
        """Know of no vCPU."""
        #: By `key_of`: the FILL or CACHE event that the entry was first seen by, its `FIELDS`.
        self.open: dict[int, dict[str, Any]] = {}

    def follow(self, rows: dict[str, NDArray[Any]]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Follow each vCPU's entry: which rows end the one before, and which begin one.

        A FILL always begins an entry; a CACHE only when it isn't the one that is known.
        """
        closes = np.zeros(len(rows["ts"]), np.bool_)
        begins = closes.copy()
        kinds = rows["type"]
        at = np.flatnonzero(
            (kinds == Type.FILL)
            | (kinds == Type.CACHE)
            | (kinds == Type.LIFECYCLE) & (rows["vcpu"] != NO_VCPU)
        )
        if not len(at):
            return closes, begins
        at = at[np.argsort(key_of(rows)[at], kind="stable")]
        own = {name: values[at] for name, values in rows.items()}
        key, life = key_of(own), own["type"] == Type.LIFECYCLE
        first = np.flatnonzero(np.diff(key, prepend=-1))
        was_open = np.roll(~life, 1)
        same = np.logical_and.reduce(
            [values == np.roll(values, 1) for values in (own[name] for name in _CONTENT)]
        )
        for i in first.tolist():
            entry = self.open.get(int(key[i]))
            was_open[i] = entry is not None
            same[i] = entry is not None and all(int(own[n][i]) == entry[n] for n in _CONTENT)
        same &= was_open & (own["type"] == Type.CACHE)
        closes[at] = was_open & ~same
        begins[at] = ~life & ~same
        for i in np.append(first[1:], len(at)).tolist():
            if life[i - 1]:
                self.open.pop(int(key[i - 1]), None)
            else:
                self.open[int(key[i - 1])] = {name: own[name][i - 1] for name in FIELDS}
        return closes, begins

    def leave(self, rows: dict[str, NDArray[Any]]) -> list[tuple[int, int]]:
        """Forget the entries of VMs that went: (key, time) of each."""
        gone = (rows["type"] == Type.LIFECYCLE) & (rows["kind"] == LifecycleChange.VM_GONE)
        if not gone.any():
            return []
        left = {int(rows["vm"][i]): int(rows["ts"][i]) for i in np.flatnonzero(gone).tolist()}
        ended = [(key, left[key >> 16]) for key in self.open if key >> 16 in left]
        for key, _ in ended:
            del self.open[key]
        return ended
