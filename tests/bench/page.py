# SPDX-License-Identifier: MIT
"""docs/benchmarks.md: a section a part, of which a run replaces those that it measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tests.bench.result import Result

#: Stands before each section; it isn't shown.
_MARK = "<!-- part: {} -->"
_SECTION = re.compile(r"^<!-- part: (\w+) -->$", re.MULTILINE)

INTRODUCTION = """\
<!-- SPDX-License-Identifier: MIT -->
# Benchmarks

`make bench` measures and writes this page, `make bench-full` the part with 10^9 events, and
`python -m tests.bench PART...` single parts; each table says when it was measured, and how busy the
machine was before. What a table compares was measured in one run, in turns (A B A B), so that other
work on the machine meets all alike: trust the ratios, and take the figures as those of this
machine.

"""


def sections(text: str) -> dict[str, str]:
    """The sections of a page as it is, by part; none of a page that has no marks."""
    pieces = _SECTION.split(text)[1:]
    return {name: body.strip() for name, body in zip(pieces[::2], pieces[1::2], strict=True)}


def section(result: Result, note: str) -> str:
    """A section of what was just measured; `note` says when and how."""
    return f"{result.markdown().strip()}\n\n*{note}*"


def page(machine: str, parts: Mapping[str, str], order: Iterable[str]) -> str:
    """The whole page: the machine's table, and the sections there are, in order."""
    told = (f"{_MARK.format(name)}\n{parts[name]}\n" for name in order if name in parts)
    return INTRODUCTION + "\n".join((machine, *told))
