# SPDX-License-Identifier: MIT
"""The suite notices mutants: a few fixed ones here, all of them with `tests.model.mutants`."""

from __future__ import annotations

import os

import pytest

from tests.model.mutants import ENVIRONMENT, FILES, ROOT, Mutant, mutants, noticed

#: (file, what stands there, what the mutant says instead)
FIXED = (
    ("analysis/rules/model.py", "e.slot >= 0", "e.slot < 0"),
    ("analysis/rules/model.py", "e.gfn != _NONE", "e.gfn == _NONE"),
    ("analysis/rules/internal_slot_hit.py", "code == CONVICTS", "code != CONVICTS"),
    ("analysis/steps.py", "kind == _VM_GONE", "kind != _VM_GONE"),
)


@pytest.fixture(autouse=True)
def own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("KVMPROBE_MODEL_MUTANTS") == "0":
        pytest.skip("this is a mutant's own run")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("file", "before", "after"), FIXED)
def test_suite_notices(file: str, before: str, after: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    found = [m for m in mutants(file, text) if (m.before, m.after) == (before, after)]
    assert found, f"{before} isn't in {file} any more: choose another mutant"
    assert noticed(found[0]) is not None


def test_nothing_changed_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a file's own tests: what is imported late is found too."""
    monkeypatch.setattr("tests.model.mutants.STAGES", ())
    file = "analysis/integrity.py"
    text = (ROOT / file).read_text(encoding="utf-8")
    assert noticed(Mutant(file, 1, "nothing", "nothing", text)) is None


def test_every_file_has_mutants_that_parse() -> None:
    for file in FILES:
        for mutant in mutants(file, (ROOT / file).read_text(encoding="utf-8"), every=10):
            assert mutant.before != mutant.after
            compile(mutant.source, file, "exec")
