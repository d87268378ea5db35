# SPDX-License-Identifier: MIT
"""What a verification says: an answer for each fault, its text, its document, its exit status."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kvmprobe import __version__
from kvmprobe.host.facts import HostFacts

SCHEMA = "kvmprobe.verify/1"
SCHEMA_FILE = Path(__file__).parent / "schema" / "verify-1.json"

#: "untested" is a probe that was not asked for; "unknown" one that was, and gave no answer.
State = Literal["vulnerable", "fixed", "unreachable", "untested", "unknown"]
_WORDS: dict[State, str] = {
    "vulnerable": "vulnerable",
    "fixed": "fixed",
    "unreachable": "not reachable here",
    "untested": "not tested (unsafe)",
    "unknown": "unknown",
}

FINE, VULNERABLE, UNKNOWN = 0, 2, 3
_WIDTH = 80


@dataclass(frozen=True)
class Answer:
    """What is known of one fault on this host, why, and what the guests saw, a line each."""

    fault: str
    answer: State
    reason: str
    evidence: tuple[str, ...] = ()


def exit_status(answers: Sequence[Answer]) -> int:
    """2 when a fault is proven, else 3 when an answer is unknown, else 0.

    What was not tested because it is unsafe is no failure: nobody asked for it.
    """
    states = {answer.answer for answer in answers}
    if "vulnerable" in states:
        return VULNERABLE
    return UNKNOWN if "unknown" in states else FINE


def text(answers: Sequence[Answer]) -> str:
    """The answers for people, in lines of at most 80 columns."""
    lines = []
    for answer in answers:
        lines.append(f"{answer.fault}: {_WORDS[answer.answer]}")
        lines += textwrap.wrap(answer.reason, _WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += [f"    {line}" for line in answer.evidence]
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of `document`."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def document(answers: Sequence[Answer], host: HostFacts) -> dict[str, Any]:
    """The JSON document; `json_schema` describes it.  Additions keep /1."""
    return {
        "schema": SCHEMA,
        "tool": {"name": "kvmprobe", "version": __version__},
        "host": dict(host),
        "exit_status": exit_status(answers),
        "answers": [asdict(answer) for answer in answers],
    }
