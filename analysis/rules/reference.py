# SPDX-License-Identifier: MIT
"""docs/rules.md, made from the rules; its second line says how."""

from __future__ import annotations

import textwrap

from kvmprobe.analysis.rules import RULES
from kvmprobe.analysis.rules.model import Rule

_HEAD = """\
<!-- SPDX-License-Identifier: MIT -->
<!-- Made by: python -m kvmprobe.analysis.rules.reference > docs/rules.md -->
# Rules

Each rule is one file in `analysis/rules/`.  A finding of severity warning or critical proves its
fault, and the fault gets a verdict; info proves nothing.  Rules marked "no verdict" find symptoms
that have causes outside KVM.  A fault's verdict is as good as what its rules need: one of the
alternatives on each line must have been observed, and none of them lost.

| rule | fault | severity | finds |
|---|---|---|---|
"""


def markdown() -> str:
    """Return the whole page."""
    table = "".join(
        f"| [`{rule.id}`](#{rule.id}) | `{rule.fault}`{'' if rule.accuses else ', no verdict'} "
        f"| {rule.severity} | {rule.title} |\n"
        for rule in RULES
    )
    return _HEAD + table + "".join(_section(rule) for rule in RULES)


def _wrap(text: str, lead: str = "") -> str:
    return textwrap.fill(
        text,
        100,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_on_hyphens=False,
        break_long_words=False,
    )


def _section(rule: Rule) -> str:
    needs = [
        "shown by " + ", or ".join(str(wanted) for wanted in group) for group in rule.needs.convicts
    ]
    if rule.needs.acquits:
        needs.append("proven absent by " + ", or ".join(str(w) for w in rule.needs.acquits))
    parts = [
        f"## {rule.id}",
        _wrap(f"{rule.title}."),
        _wrap(f"**What goes wrong.** {rule.goes_wrong}"),
        _wrap(f"**What the guest notices.** {rule.guest_notices}"),
        _wrap(f"**What to do.** {rule.to_do[0].upper()}{rule.to_do[1:]}"),
        _wrap(f"**Proves.** {rule.proves}"),
        _wrap(f"**Severity.** {rule.severity}: {rule.severity_reason}"),
        _wrap(f"**Source.** {rule.source}"),
        "**Guards**",
        "\n".join(_wrap(guard, "* ") for guard in rule.guards),
        "**Needs**",
        "\n".join(_wrap(need, "* ") for need in needs),
    ]
    return "\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
