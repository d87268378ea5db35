# SPDX-License-Identifier: MIT
"""The registry of rules.  A new rule is its file, one line here and a test."""

from __future__ import annotations

from collections.abc import Callable

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
from kvmprobe.analysis.rules.model import WORDS, Event, Rule, Step

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

#: An event, the words of all rules, where this vCPU's begin, and room for a code a rule -> bit r:
#: rule r answered, and its code is in the room.
StepAll = Callable[[Event, NDArray[np.uint64], int, NDArray[np.uint8]], int]

if len(RULES) > 63:
    raise ImportError("one bit a rule doesn't fit a 64-bit word any more")


def _chain(rules: tuple[Rule, ...]) -> tuple[StepAll, tuple[StepAll, ...]]:
    """Join step functions into one, by nesting: numba compiles no loop over functions.

    An event is sent to the rules that watch its type, by a search through the types.
    """
    links: list[StepAll] = [_nothing]
    watched: list[tuple[int, StepAll]] = []
    for kind in sorted({int(kind) for rule in rules for kind in rule.watches}):
        chained: StepAll = _nothing
        for index, rule in reversed(tuple(enumerate(rules))):
            if kind in rule.watches:
                chained = _link(index, rule.step, chained)
                links.append(chained)
        watched.append((kind, chained))
    return _choose(watched, links), tuple(links)


def _nothing(e: Event, words: NDArray[np.uint64], at: int, codes: NDArray[np.uint8]) -> int:  # noqa: ARG001 - an end
    return 0


def _link(index: int, first: Step, rest: StepAll) -> StepAll:
    bit = 1 << index
    word = index * WORDS

    def step(e: Event, words: NDArray[np.uint64], at: int, codes: NDArray[np.uint8]) -> int:
        code = first(e, words, at + word)
        if code == 0:
            return rest(e, words, at, codes)
        codes[index] = code
        return bit | rest(e, words, at, codes)

    return step


def _choose(watched: list[tuple[int, StepAll]], links: list[StepAll]) -> StepAll:
    """Make a binary search through (type, step) pairs; what it is made of goes to `links`."""
    if len(watched) == 1:
        (only, step) = watched[0]

        def leaf(e: Event, words: NDArray[np.uint64], at: int, codes: NDArray[np.uint8]) -> int:
            return step(e, words, at, codes) if e.type == only else 0

        links.append(leaf)
        return leaf
    half = len(watched) // 2
    low, high = _choose(watched[:half], links), _choose(watched[half:], links)
    first = watched[half][0]

    def fork(e: Event, words: NDArray[np.uint64], at: int, codes: NDArray[np.uint8]) -> int:
        return low(e, words, at, codes) if e.type < first else high(e, words, at, codes)

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
