# SPDX-License-Identifier: MIT
"""`kvmprobe rules`: the rules, their sources, and what each one proves."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from kvmprobe.errors import UsageError

_WIDTH = 79


def rules(
    rule_id: Annotated[
        str | None, typer.Argument(metavar="[RULE]", help="Explain this rule.")
    ] = None,
) -> None:
    """List the rules, or explain one."""
    from kvmprobe.analysis.rules import RULES, rule
    from kvmprobe.cli.tables import columns

    if rule_id is None:
        print("\n".join(columns([(r.id, r.severity, r.title) for r in RULES])))
        return
    try:
        found = rule(rule_id)
    except KeyError:
        known = ", ".join(r.id for r in RULES)
        raise UsageError(f"no rule is called {rule_id!r}; there are {known}") from None
    print(f"{found.id} ({found.severity}): {found.title}\n")
    for name, text in (
        ("What goes wrong", found.goes_wrong),
        ("What the guest notices", found.guest_notices),
        ("What to do", found.to_do),
    ):
        print(textwrap.fill(f"{name}: {text[0].upper()}{text[1:]}", _WIDTH) + "\n")
    print(_entry("fault", found.fault))
    print(_entry("why", f"{found.severity}: {found.severity_reason}"))
    print(_entry("source", found.source))
    print(_entry("proves", found.proves))
    for group in found.needs.convicts:
        print(_entry("needs", " or ".join(str(wanted) for wanted in group)))
    for guard in found.guards:
        print(_entry("guard", guard))


def _entry(name: str, text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), _WIDTH, initial_indent=f"{name + ':':<9}", subsequent_indent=" " * 9
    )
