# SPDX-License-Identifier: MIT
"""What is run on each kernel under a recording, and what kvmprobe must then find."""

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS_FILE = Path(__file__).with_name("kernels.toml")
VULNERABLE, FIXED, UNCLASSIFIED = "vulnerable", "fixed", "unclassified"

_FILL, _ARMED, _HIT = "internal-slot-fill", "internal-slot-armed", "internal-slot-hit"
_TSS, _IDENTITY_MAP, _HOLE = 0xFFFBD000, 0xFFFBC000, 0xD0000000


@dataclass(frozen=True)
class Scenario:
    """Steps of nested.py at one gpa, on the vendors where they mean something.

    `rules` must all be found on a vulnerable kernel, and no rule outside `rules` and `allowed`;
    on a fixed one none.  `internal` says that the gpa is in an internal slot, so that a fixed
    kernel gives proof of it; else nothing is proved anywhere.
    """

    name: str
    steps: str
    target: int = _TSS
    vendors: tuple[str, ...] = ("amd", "intel")
    nested_paging: bool = False
    internal: bool = True
    rules: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()

    def command(self, vendor: str) -> str:
        """Return the command line of nested.py in the VM; AMD's internal slot is the module's."""
        words = ["python3", "/lab/nested/nested.py", "--target", hex(self.target)]
        if self.nested_paging:
            words.append("--nested-paging")
        if vendor == "amd" and self.internal and "slot" not in self.steps.split():
            words.append("--slot")
        return shlex.join([*words, *self.steps.split()])

    def check(self, document: Mapping[str, Any], classified: str) -> tuple[str, str]:
        """Return what was expected and what an `analyze --json` document shows; equal if right.

        Rules that are allowed but not required are left out of what was found.
        """
        rules, verdict = frozenset[str](), "not exercised"
        if self.internal and classified == VULNERABLE:
            rules, verdict = self.rules, "vulnerable"
        elif self.internal:
            verdict = "fixed"
        allowed = self.allowed if rules else frozenset()
        found = {finding["rule"] for finding in document["findings"]} - allowed
        said = document["verdicts"]["internal-slot"]["verdict"]
        return _describe(verdict, rules), _describe(said, found)


def _describe(verdict: str, rules: frozenset[str] | set[str]) -> str:
    return f"{verdict}: {' '.join(sorted(rules)) or 'nothing'}"


_WHOLE = "load string-out l2-load l2-store load string-out string-in"

SCENARIOS = (
    Scenario("tss-shadow", _WHOLE, rules=frozenset({_FILL, _HIT}), allowed=frozenset({_ARMED})),
    Scenario(
        "tss-nested-paging",
        _WHOLE,
        nested_paging=True,
        rules=frozenset({_FILL, _HIT}),
        allowed=frozenset({_ARMED}),
    ),
    Scenario(
        "identity-map",
        "string-out l2-load string-out",
        target=_IDENTITY_MAP,
        vendors=("intel",),
        rules=frozenset({_FILL, _HIT}),
        allowed=frozenset({_ARMED}),
    ),
    Scenario(
        "slots-change-between",
        "load l2-load flags string-out",
        rules=frozenset({_FILL}),
        allowed=frozenset({_ARMED}),
    ),
    Scenario(
        "slot-made-late",
        "load slot l2-load load string-out",
        vendors=("amd",),
        rules=frozenset({_FILL, _HIT}),
        allowed=frozenset({_ARMED}),
    ),
    Scenario("hole", "load l2-load load string-out string-in", target=_HOLE, internal=False),
)


@dataclass(frozen=True)
class Listed:
    """One kernel of kernels.toml; `spec` is what kernels.get_kernel takes."""

    name: str
    spec: str
    version: str
    internal_slot: str
    slot_module: bool


def listed_kernels() -> list[Listed]:
    """Return the kernels of kernels.toml in its order, the newest of each name first."""
    with KERNELS_FILE.open("rb") as file:
        entries = tomllib.load(file)["kernel"]
    return [
        Listed(
            entry["name"],
            f"{entry['release']}/{entry['package']}={entry['version']}",
            entry["version"],
            entry["internal-slot"],
            entry["slot-module"],
        )
        for entry in entries
    ]
