# SPDX-License-Identifier: MIT
"""A made-up but lifelike stream of events for the benches that need no kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import EVENT, Flag, Type

VMS = 4
VCPUS = 4
_HOLES = np.array([0xFE000, 0xFE001, 0xFEC00, 0xFED00, 0xFEE00, 0xE0000], "u8")
_CALM = (Flag.LEVEL_KNOWN | Flag.AS_KNOWN | Flag.DIRECT | Flag.SLOT_KNOWN) | (
    Flag.GEN_KNOWN | Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT
)
#: What a busy host emits when nothing is wrong, in parts of `_PARTS`.
_MIX = {
    Type.FAULT: 2000,
    Type.FAULTIN: 600,
    Type.FILL: 600,
    Type.MATCH: 2000,
    Type.MMIO: 2399,
    Type.EMULATE: 2000,
    Type.SPTE: 400,
    Type.GENERATION: 1,
}
_PARTS = sum(_MIX.values())


def stream(n: int, seed: int = 1) -> NDArray[Any]:
    """`n` events of dtype `EVENT` in order of time, of 4 VMs with 4 vCPUs each, without a fault."""
    random = np.random.default_rng(seed)
    rows = np.zeros(n, EVENT)
    rows["ts"] = 10**12 + np.cumsum(random.integers(200, 2000, n, dtype="u8"))
    rows["vm"] = random.integers(1, VMS + 1, n)
    rows["vcpu"] = random.integers(0, VCPUS, n)
    rows["type"] = np.repeat(list(_MIX), list(_MIX.values()))[random.integers(0, _PARTS, n)]
    generation = rows["type"] == Type.GENERATION
    rows["vcpu"][generation] = 0xFFFF
    for vm in range(1, VMS + 1):
        mine = rows["vm"] == vm
        rows["gen"][mine] = 100 + 2 * np.cumsum(generation[mine])
        for vcpu in range(VCPUS):
            of_vcpu = mine & (rows["vcpu"] == vcpu)
            rows["seq"][of_vcpu] = np.arange(1, np.count_nonzero(of_vcpu) + 1)
    rows["aux"] = rows["gen"]
    rows["addr"] = _HOLES[random.integers(0, len(_HOLES), n)] << np.uint64(12)
    rows["value"] = random.integers(0, 2**32, n, dtype="u8") << np.uint64(16)
    rows["flags"] = _CALM
    rows["flags"][generation] = Flag.CANDIDATE
    rows["slot"] = -1
    rows["kind"] = np.where(rows["type"] == Type.FAULT, 1, 2)
    rows["len"] = 4
    return rows
