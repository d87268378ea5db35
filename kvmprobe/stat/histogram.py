# SPDX-License-Identifier: MIT
"""Log-linear histograms of times: 8 buckets to every power of two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: 8 buckets of 32 ns up to 256 ns, then 8 to each of 31 powers of two: up to 550 s.  A power of
#: two, so that a mask is enough for the kernel's verifier.
BUCKETS = 256
_STEPS = 8
_FIRST_POWER = 8


def bucket_start(bucket: int) -> int:
    """The least time in ns of a bucket; of BUCKETS, the end of the last."""
    octave, step = divmod(bucket, _STEPS)
    if octave == 0:
        return step << 5
    return (_STEPS + step) << (octave + _FIRST_POWER - 4)


@dataclass(frozen=True, eq=False)
class Times:
    """A distribution of times in ns; `histogram` has shape (BUCKETS,), dtype int64."""

    count: int
    total: int
    min: int
    max: int
    histogram: NDArray[np.int64]

    def __add__(self, other: Times) -> Times:
        return Times(
            self.count + other.count,
            self.total + other.total,
            min(self.min, other.min),
            max(self.max, other.max),
            self.histogram + other.histogram,
        )

    @property
    def mean(self) -> float:
        """The mean, exact."""
        return self.total / self.count

    def quantile(self, part: float) -> float:
        """The time that `part` (0 to 1) of all times don't exceed, to an eighth of it.

        Inside a bucket times are taken as spread evenly; the result is never outside min and max.
        """
        seen = np.cumsum(self.histogram)
        wanted = part * seen[-1]
        bucket = int(np.searchsorted(seen, wanted))
        before = seen[bucket] - self.histogram[bucket]
        start, end = bucket_start(bucket), bucket_start(bucket + 1)
        inside = (wanted - before) / max(self.histogram[bucket], 1)
        return float(min(max(start + (end - start) * inside, self.min), self.max))
