# SPDX-License-Identifier: MIT
"""docs/events.md says what events.h says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from kvmprobe.probes import schema

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def events_doc() -> ModuleType:
    spec = importlib.util.spec_from_file_location("events_doc", ROOT / "tools/events_doc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(events_doc: ModuleType) -> None:
    page = (ROOT / "docs/events.md").read_text(encoding="utf-8")
    assert page == events_doc.render(), "run: python tools/events_doc.py"


def test_page_has_every_enum_and_every_observation_a_row(events_doc: ModuleType) -> None:
    assert {name for name, _, _ in events_doc.ENUMS} == set(schema.ENUMS)
    head, rows = events_doc.observations(schema.HEADER.read_text(encoding="utf-8"))
    assert list(head) == ["type", "addr", "value", "gen", "aux", "slot", "kind", "len"]
    assert [row[0] for row in rows] == [observation.name for observation in schema.Type]
    assert {len(row) for row in rows} == {len(head)}
