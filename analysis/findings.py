# SPDX-License-Identifier: MIT
"""What the detector says: findings and acquittals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules.model import Rule
from kvmprobe.probes.schema import Flag, Type


def level_of(flags: int) -> str:
    """Name the level that an event belongs to: L1, L2 or unknown."""
    if not flags & Flag.LEVEL_KNOWN:
        return "unknown"
    return "L2" if flags & Flag.L2 else "L1"


def confidence_of(event: np.void) -> str | None:
    """Say how an event's slot is known: observed, presumed, or None for no slot."""
    if event["slot"] < 0:
        return None
    return "presumed" if int(event["flags"]) & Flag.SLOT_PRESUMED else "observed"


@dataclass(frozen=True)
class Cause:
    """What a finding is attributed to: the newest cause on its vCPU before the first occurrence."""

    rule: str
    event: np.void
    age_ns: int
    count: int


@dataclass(frozen=True, eq=False)
class Finding:
    """One rule's occurrences on one vCPU.

    `first` is the first event that convicted (dtype `schema.EVENT`); gpa, slot and level are its.
    `evidence` has dtype `schema.EVENT`, in sequence, at most 100 of `evidence_total`.
    Times are CLOCK_MONOTONIC, ns.
    """

    rule: Rule
    vm: int
    vcpu: int
    first: np.void
    first_ts: int
    last_ts: int
    count: int
    evidence: NDArray[Any]
    evidence_total: int
    cause: Cause | None

    @property
    def level(self) -> str:
        """L1, L2 or unknown."""
        return level_of(int(self.first["flags"]))

    @property
    def gpa(self) -> int:
        """The guest physical address of the first occurrence; a gva if a shadow MMU faulted on it.

        It means something only where `has_gpa`.
        """
        return int(self.first["addr"])

    @property
    def has_gpa(self) -> bool:
        """Whether there is an address: a change of the memslots has none."""
        return bool(self.first["type"] != Type.GENERATION)

    @property
    def slot(self) -> int | None:
        """The memslot at `gpa`."""
        slot = int(self.first["slot"])
        return slot if slot >= 0 else None

    @property
    def slot_confidence(self) -> str | None:
        """Observed, presumed, or None without a slot."""
        return confidence_of(self.first)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """What findings are sorted by."""
        return (self.first_ts, self.vm, self.vcpu, int(self.first["seq"]))

    @property
    def rate(self) -> float | None:
        """Occurrences per second between the first and the last; None for fewer than two."""
        span = self.last_ts - self.first_ts
        return (self.count - 1) * 1e9 / span if self.count > 1 and span > 0 else None


@dataclass(frozen=True, eq=False)
class Acquittal:
    """What one VM showed of a kernel that does what a rule would convict the opposite of."""

    rule: Rule
    vm: int
    first: np.void
    count: int
