# SPDX-License-Identifier: MIT
"""What one measurement gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """A table and what it says, ready for docs/benchmarks.md."""

    title: str
    method: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    conclusion: str

    def markdown(self) -> str:
        """The section of the page."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"## {self.title}\n\n{self.method}\n\n{table}\n\n**{self.conclusion}**\n"


def millions(rate: float) -> str:
    """A rate in millions a second, with three digits that count."""
    return f"{rate / 1e6:.3g} M"
