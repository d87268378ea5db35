# SPDX-License-Identifier: MIT
"""Which events could matter to a rule: kvmprobe_candidate() of probes/events.h, over columns."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import SLOT_TSS, Columns, Flag, Type

_NEVER = (1 << 15) - 1  # no slot is above
_ALWAYS = -(1 << 15)  # every slot is above


#: Without one of these in a batch, only slots make candidates.
_ANY = np.uint32(Flag.PRESENT | Flag.STUCK | Flag.SMM | Flag.OTHER_AS | Flag.SMM_SEEN)
_MATCH_IN_DOUBT = np.uint32(Flag.SMM_SEEN | Flag.GEN_IS_CURRENT)
_SMM_SEEN = np.uint32(Flag.SMM_SEEN)


def _tables() -> tuple[NDArray[np.int16], NDArray[np.uint32]]:
    """For each type, what the slot must be above, or the flags any of which is enough."""
    above = np.full(256, _ALWAYS, np.int16)
    flags = np.zeros(256, np.uint32)
    for kind, flag in (
        (Type.EMULATE, Flag.PRESENT),
        (Type.SPTE, Flag.PRESENT),
        (Type.FAULT, Flag.STUCK),
        (Type.FILL, Flag.SMM),
        (Type.MATCH, Flag.OTHER_AS),
    ):
        above[kind] = _NEVER
        flags[kind] = flag
    above[Type.FAULTIN] = SLOT_TSS - 1
    for kind in (Type.FILL, Type.CACHE, Type.MATCH, Type.MMIO):
        above[kind] = -1
    return above, flags


_ABOVE, _FLAGS = _tables()


_EVERY = (_ABOVE == _ALWAYS) & (_FLAGS == 0)


def _by_flags(columns: Columns, wanted: NDArray[np.uint32]) -> NDArray[np.bool_] | None:
    """Say which events are candidates for their flags; None: no event is."""
    kind, flags = columns["type"], columns["flags"]
    if not np.bitwise_or.reduce(flags) & _ANY:
        return None
    mask: NDArray[np.bool_] = (flags & wanted.take(kind)) != 0
    if wanted[Type.MATCH]:
        mask |= (kind == Type.MATCH) & ((flags & _MATCH_IN_DOUBT) == _SMM_SEEN)
    return mask


def candidates(columns: Columns) -> NDArray[np.bool_]:
    """Say for each event whether it could matter to a rule, whatever came before it.

    Args:
        columns: a batch; `type`, `flags` and `slot` are used.

    Returns:
        A mask of the batch's length.

    """
    kind = columns["type"]
    mask: NDArray[np.bool_] = columns["slot"] > _ABOVE.take(kind)
    mask |= _EVERY.take(kind)
    flagged = _by_flags(columns, _FLAGS)
    if flagged is not None:
        mask |= flagged
    return mask


def beliefs(columns: Columns) -> NDArray[np.bool_]:
    """Say for each event whether it tells that the MMIO cache was believed, each belief once.

    A MATCH that matters to no rule is not sent: the MMIO that follows says it (MATCHED) and takes
    its place (on_match() in probes/mmio.bpf.c).  A capture that has such MATCHes counts them twice.

    Args:
        columns: a batch; `type`, `flags` and `slot` are used.

    Returns:
        A mask of the batch's length.

    """
    kind, flags = columns["type"], columns["flags"]
    alone: NDArray[np.bool_] = (kind == Type.MMIO) & ((flags & np.uint32(Flag.MATCHED)) != 0)
    alone &= (columns["slot"] < 0) & ((flags & np.uint32(Flag.OTHER_AS)) == 0)
    alone &= (flags & _MATCH_IN_DOUBT) != _SMM_SEEN
    alone |= kind == Type.MATCH
    return alone


class Selection:
    """Picks the candidates of a few types, fast where no slot stands behind most events."""

    def __init__(self, types: Iterable[int]) -> None:
        """Pick among events of `types`."""
        chosen = np.zeros(256, np.bool_)
        chosen[list(types)] = True
        self._every = np.flatnonzero(chosen & _EVERY).astype(np.uint8)
        self._above = np.where(chosen & ~_EVERY, _ABOVE, _NEVER).astype(np.int16)
        self._flags = np.where(chosen, _FLAGS, 0).astype(np.uint32)

    def pick(self, columns: Columns) -> NDArray[np.intp]:
        """Return the indices of the events to pick.

        Args:
            columns: a batch; `type`, `flags` and `slot` are used.

        """
        kind, slot = columns["type"], columns["slot"]
        mask: NDArray[np.bool_] = slot >= 0
        if mask.any():
            # Every type that goes by its slot wants one of at least 0.
            mask &= slot > self._above.take(kind)
        for each in self._every:
            mask |= kind == each
        flagged = _by_flags(columns, self._flags)
        if flagged is not None:
            mask |= flagged
        return np.flatnonzero(mask)
