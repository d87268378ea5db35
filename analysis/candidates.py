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
_ANY = np.uint32(
    Flag.PRESENT | Flag.BELIEVED | Flag.STUCK | Flag.SMM | Flag.OTHER_AS | Flag.SMM_SEEN
)
_MATCH_IN_DOUBT = np.uint32(Flag.SMM_SEEN | Flag.GEN_IS_CURRENT)
_SMM_SEEN = np.uint32(Flag.SMM_SEEN)


def _tables() -> tuple[NDArray[np.int16], NDArray[np.uint32]]:
    """For each type, what the slot must be above, or the flags any of which is enough."""
    above = np.full(256, _ALWAYS, np.int16)
    flags = np.zeros(256, np.uint32)
    for kind, flag in (
        (Type.EMULATE, Flag.PRESENT),
        (Type.SPTE, Flag.PRESENT),
        (Type.FAULT, Flag.BELIEVED | Flag.STUCK),
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


class Selection:
    """Picks candidates out of batches, of some types only."""

    def __init__(self, types: Iterable[int] = range(256)) -> None:
        """Pick among events of `types`."""
        chosen = np.zeros(256, np.bool_)
        chosen[list(types)] = True
        self._above = np.where(chosen, _ABOVE, _NEVER).astype(np.int16)
        self._flags = np.where(chosen, _FLAGS, 0).astype(np.uint32)
        self._matches = bool(chosen[Type.MATCH])

    def mask(self, columns: Columns) -> NDArray[np.bool_]:
        """Say for each event whether it is to be picked.

        Args:
            columns: a batch; `type`, `flags` and `slot` are used.

        Returns:
            A mask of the batch's length.

        """
        kind, flags, slot = columns["type"], columns["flags"], columns["slot"]
        mask: NDArray[np.bool_] = slot > self._above.take(kind)
        if np.bitwise_or.reduce(flags) & _ANY:
            mask |= (flags & self._flags.take(kind)) != 0
            if self._matches:
                mask |= (kind == Type.MATCH) & ((flags & _MATCH_IN_DOUBT) == _SMM_SEEN)
        return mask


_ALL = Selection()
_EVERY = (_ABOVE == _ALWAYS) & (_FLAGS == 0)


def candidates(columns: Columns) -> NDArray[np.bool_]:
    """Say for each event whether it could matter to a rule, whatever came before it.

    Args:
        columns: a batch; `type`, `flags` and `slot` are used.

    Returns:
        A mask of the batch's length.

    """
    mask = _ALL.mask(columns)
    mask |= _EVERY.take(columns["type"])
    return mask
