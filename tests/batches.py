# SPDX-License-Identifier: MIT
"""Events in memory, read like a capture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import Columns, Site, columns


@dataclass
class Batches:
    """What `kvmprobe.analysis.run.Reader` asks for; `cuts` says where a batch begins."""

    rows: NDArray[Any]
    cuts: Sequence[int] = ()
    vendor: str = "amd"
    fault_site: Site = Site.PAGE_FAULT
    path: str = "made by hand"
    truncated: str | None = None
    damaged: Sequence[object] = ()
    unknown_events: Mapping[int, int] = field(default_factory=dict)

    @property
    def header(self) -> Mapping[str, Any]:
        row = {"observation": "FAULT", "site": self.fault_site.name, "attached": True}
        return {"host": {"vendor": self.vendor}, "plan": [row]}

    def batches(self, names: Sequence[str] | None = None) -> Iterator[Columns]:
        for part in np.split(self.rows, sorted(self.cuts)):
            yield columns(part)
