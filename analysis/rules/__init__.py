# SPDX-License-Identifier: MIT
"""The registry of rules.  A new rule is its file, one line here and a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules import (
    address_space_generation,
    address_space_mixup,
    apic_page_emulated,
    cache_hits_memory,
    internal_slot_armed,
    internal_slot_fill,
    internal_slot_hit,
    internal_slot_presumed,
    no_progress_fault,
    noslot_from_l1,
    spte_overwrite,
    stale_spte_storm,
    unexplained_mmio,
)
from kvmprobe.analysis.rules.model import WORDS, Event, Rule

#: Every rule, in the order in which they are listed and stepped.
RULES: tuple[Rule, ...] = (
    internal_slot_fill.RULE,
    internal_slot_armed.RULE,
    internal_slot_hit.RULE,
    noslot_from_l1.RULE,
    cache_hits_memory.RULE,
    address_space_generation.RULE,
    address_space_mixup.RULE,
    spte_overwrite.RULE,
    unexplained_mmio.RULE,
    no_progress_fault.RULE,
    stale_spte_storm.RULE,
    apic_page_emulated.RULE,
    internal_slot_presumed.RULE,
)

#: The faults that get a verdict, in order.
FAULTS: tuple[str, ...] = tuple(dict.fromkeys(rule.fault for rule in RULES if rule.convicts))

#: An event, the words of all rules, where this vCPU's begin, and room for answers: rules and their
#: codes -> how many rules answered, in order.
StepAll = Callable[[Event, NDArray[np.uint64], int, NDArray[np.uint8], NDArray[np.uint8]], int]

if len(RULES) > 63:
    raise ImportError("one bit a rule doesn't fit a 64-bit word any more")


def _join(rules: tuple[Rule, ...]) -> StepAll:
    """Join step functions into one that sends an event to the rules that watch its type.

    Written out as source, for numba compiles no loop over functions, and nested closures cost it
    twice the time of plain calls in a row.
    """
    lines = ["def step_all(e, words, at, rules, codes):", "    answered = 0"]
    names = {f"step_{index}": rule.step for index, rule in enumerate(rules)}
    for kind in sorted({int(kind) for rule in rules for kind in rule.watches}):
        lines.append(f"    {'if' if len(lines) == 2 else 'elif'} e.type == {kind}:")
        for index, rule in enumerate(rules):
            if kind in rule.watches:
                lines += [
                    f"        code = step_{index}(e, words, at + {index * WORDS})",
                    "        if code != 0:",
                    f"            rules[answered] = {index}",
                    "            codes[answered] = code",
                    "            answered += 1",
                ]
    lines.append("    return answered")
    scope: dict[str, Any] = dict(names)
    exec("\n".join(lines), scope)  # noqa: S102 - only what stands above
    return cast(StepAll, scope["step_all"])


#: All rules in one step.
STEP_ALL = _join(RULES)


def rule(rule_id: str) -> Rule:
    """Return the rule of that id.

    Raises:
        KeyError: there is no such rule.

    """
    for found in RULES:
        if found.id == rule_id:
            return found
    raise KeyError(rule_id)
