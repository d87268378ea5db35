# SPDX-License-Identifier: MIT
"""docs/notebook.ipynb runs, and gives what stands in it."""

import copy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/notebook.ipynb"


def outputs(notebook: Any) -> list[str]:  # noqa: ANN401 - nbformat has no types
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts = {**output.get("data", {}), "stream": output.get("text", "")}
            found += [text for _, text in sorted(texts.items()) if text]
    return found


def test_the_notebook_gives_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    said = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    run = copy.deepcopy(said)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(run, timeout=120, kernel_name="python3", resources=resources).execute()
    assert len(outputs(said)) > 10
    assert outputs(run) == outputs(said)
