# SPDX-License-Identifier: MIT
"""The registry of rules.  A new rule is its file, one line here and a test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.rules import (
    apic_page_emulated,
    cache_hits_memory,
    internal_slot_armed,
    internal_slot_fill,
    internal_slot_hit,
    noslot_from_l1,
)
from kvmprobe.analysis.rules.model import CODE_BITS, WORDS, Event, Rule, Step

#: Every rule, in the order in which they are listed and stepped.
RULES: tuple[Rule, ...] = (
    internal_slot_fill.RULE,
    internal_slot_armed.RULE,
    internal_slot_hit.RULE,
    noslot_from_l1.RULE,
    cache_hits_memory.RULE,
    apic_page_emulated.RULE,
)

#: The faults that get a verdict, in order.
FAULTS: tuple[str, ...] = tuple(dict.fromkeys(rule.fault for rule in RULES))

#: The same with the place of the vCPU's first word -> the codes of all rules, `CODE_BITS` bits
#: each, the first rule's lowest.
StepAll = Step


def _chain(steps: tuple[Step, ...]) -> tuple[StepAll, tuple[Step, ...]]:
    """Join step functions into one, by nesting: numba compiles no loop over functions."""

    def nothing(e: Event, words: NDArray[np.uint64], at: int) -> int:  # noqa: ARG001 - an end
        return 0

    chained: StepAll = nothing
    links = [chained]
    for index, first in reversed(tuple(enumerate(steps))):
        chained = _link(index, first, chained)
        links.append(chained)
    return chained, tuple(links)


def _link(index: int, first: Step, rest: StepAll) -> StepAll:
    shift = index * CODE_BITS
    word = index * WORDS

    def step(e: Event, words: NDArray[np.uint64], at: int) -> int:
        return (first(e, words, at + word) << shift) | rest(e, words, at)

    return step


#: All rules in one step, and the functions it is made of (for numba).
STEP_ALL, LINKS = _chain(tuple(rule.step for rule in RULES))


def rule(rule_id: str) -> Rule:
    """Return the rule of that id.

    Raises:
        KeyError: there is no such rule.

    """
    for found in RULES:
        if found.id == rule_id:
            return found
    raise KeyError(rule_id)
