# SPDX-License-Identifier: MIT
"""docs/rules.md says what the rule files say."""

from pathlib import Path

from kvmprobe.analysis.rules import RULES
from kvmprobe.analysis.rules.reference import markdown

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"


def test_page_is_made_from_the_rules() -> None:
    again = "python -m kvmprobe.analysis.rules.reference > docs/rules.md"
    assert PAGE.read_text(encoding="utf-8") == markdown(), f"run: {again}"


def test_page_names_every_rule_once() -> None:
    headings = [line[3:] for line in markdown().splitlines() if line.startswith("## ")]
    assert headings == [rule.id for rule in RULES]
