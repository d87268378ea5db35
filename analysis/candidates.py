# SPDX-License-Identifier: MIT
"""Which events could matter to a rule: kvmprobe_candidate() of probes/events.h, over columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import SLOT_TSS, Columns, Flag, Type

_NEVER = 1 << 16  # above any slot
_ALWAYS = -(1 << 16)  # below any slot


def _tables() -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
    """For each type, the lowest slot and the flags that make an event a candidate."""
    slots = np.full(256, _ALWAYS, np.int32)
    flags = np.zeros(256, np.uint32)
    for kind, flag in (
        (Type.EMULATE, Flag.PRESENT),
        (Type.SPTE, Flag.PRESENT),
        (Type.FAULT, Flag.BELIEVED),
    ):
        slots[kind] = _NEVER
        flags[kind] = flag
    slots[Type.FAULTIN] = SLOT_TSS
    for kind in (Type.FILL, Type.CACHE, Type.MATCH, Type.MMIO):
        slots[kind] = 0
    return slots, flags


_LOWEST_SLOT, _FLAGS = _tables()


def candidates(columns: Columns) -> NDArray[np.bool_]:
    """Say for each event whether it could matter to a rule, whatever came before it.

    Args:
        columns: a batch; `type`, `flags` and `slot` are used.

    Returns:
        A mask of the batch's length.

    """
    kind = columns["type"]
    mask: NDArray[np.bool_] = columns["slot"] >= _LOWEST_SLOT.take(kind)
    mask |= (columns["flags"] & _FLAGS.take(kind)) != 0
    return mask
