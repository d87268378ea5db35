# SPDX-License-Identifier: MIT
"""Answers of `kvmprobe verify`: exit status, text, document.  The probes run in tests/live."""

from __future__ import annotations

import itertools
import json
from typing import get_args

import jsonschema
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.host.facts import host_facts
from kvmprobe.verify.answers import Answer, State, document, exit_status, json_schema, text
from kvmprobe.verify.probes import ADDRESS_SPACE, INTERNAL_SLOT, SPTE_OVERWRITE
from kvmprobe.verify.run import SECONDS

STATES: tuple[State, ...] = get_args(State)
FAULTS = (INTERNAL_SLOT, ADDRESS_SPACE, SPTE_OVERWRITE)


def test_vulnerable_outranks_unknown_and_unknown_the_rest() -> None:
    for states in itertools.product(STATES, repeat=3):
        answers = [Answer(fault, state, "") for fault, state in zip(FAULTS, states, strict=True)]
        expected = 2 if "vulnerable" in states else 3 if "unknown" in states else 0
        assert exit_status(answers) == expected, states


def test_all_probes_together_end_within_ten_seconds() -> None:
    assert SECONDS < 10


@given(
    st.lists(st.builds(Answer, st.sampled_from(FAULTS), st.sampled_from(STATES), st.text("ab ")))
)
def test_text_names_every_fault_and_keeps_to_80_columns(answers: list[Answer]) -> None:
    lines = text(answers).splitlines()
    assert all(len(line) <= 80 for line in lines)
    heads = [line.partition(":")[0] for line in lines if line[:1].strip()]
    assert heads == [answer.fault for answer in answers]


def test_document_is_json_and_whole() -> None:
    answers = [Answer(ADDRESS_SPACE, "vulnerable", "why", ("F6",))]
    got = json.loads(json.dumps(document(answers, host_facts())))
    jsonschema.validate(got, json_schema())
    assert got["exit_status"] == 2
    assert got["answers"] == [
        {
            "fault": "address-space",
            "answer": "vulnerable",
            "reason": "why",
            "evidence": ["F6"],
        }
    ]


def test_faults_are_those_of_the_rules() -> None:
    from kvmprobe.analysis.rules import FAULTS as ALL

    assert set(FAULTS) < set(ALL)
