# SPDX-License-Identifier: MIT
"""The registry of rules.  A new rule is its file, one line here and a test."""

from __future__ import annotations

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
    no_progress_fault,
    noslot_from_l1,
    spte_overwrite,
    stale_spte_storm,
    unexplained_mmio,
)
from kvmprobe.analysis.rules.model import CODE_BITS, WORDS, Event, Rule, Step

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
)

#: The faults that get a verdict, in order.
FAULTS: tuple[str, ...] = tuple(dict.fromkeys(rule.fault for rule in RULES if rule.convicts))

#: The same with the place of the vCPU's first word -> the codes of all rules, `CODE_BITS` bits
#: each, the first rule's lowest.
StepAll = Step


def _chain(rules: tuple[Rule, ...]) -> tuple[StepAll, tuple[Step, ...]]:
    """Join step functions into one, by nesting: numba compiles no loop over functions.

    An event is sent to the rules that watch its type, by a search through the types.
    """
    links: list[Step] = [_nothing]
    watched: list[tuple[int, StepAll]] = []
    for kind in sorted({int(kind) for rule in rules for kind in rule.watches}):
        chained: StepAll = _nothing
        for index, rule in reversed(tuple(enumerate(rules))):
            if kind in rule.watches:
                chained = _link(index, rule.step, chained)
                links.append(chained)
        watched.append((kind, chained))
    return _choose(watched, links), tuple(links)


def _nothing(e: Event, words: NDArray[np.uint64], at: int) -> int:  # noqa: ARG001 - an end
    return 0


def _link(index: int, first: Step, rest: StepAll) -> StepAll:
    shift = index * CODE_BITS
    word = index * WORDS

    def step(e: Event, words: NDArray[np.uint64], at: int) -> int:
        return (first(e, words, at + word) << shift) | rest(e, words, at)

    return step


def _choose(watched: list[tuple[int, StepAll]], links: list[Step]) -> StepAll:
    """Make a binary search through (type, step) pairs; what it is made of goes to `links`."""
    if len(watched) == 1:
        (only, step) = watched[0]

        def leaf(e: Event, words: NDArray[np.uint64], at: int) -> int:
            return step(e, words, at) if e.type == only else 0

        links.append(leaf)
        return leaf
    half = len(watched) // 2
    low, high = _choose(watched[:half], links), _choose(watched[half:], links)
    first = watched[half][0]

    def fork(e: Event, words: NDArray[np.uint64], at: int) -> int:
        return low(e, words, at) if e.type < first else high(e, words, at)

    links.append(fork)
    return fork


#: All rules in one step, and the functions it is made of (for numba).
STEP_ALL, LINKS = _chain(RULES)


def rule(rule_id: str) -> Rule:
    """Return the rule of that id.

    Raises:
        KeyError: there is no such rule.

    """
    for found in RULES:
        if found.id == rule_id:
            return found
    raise KeyError(rule_id)
