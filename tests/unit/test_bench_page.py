# SPDX-License-Identifier: MIT
"""docs/benchmarks.md: a run of single parts keeps the others' tables."""

import subprocess
import sys
from pathlib import Path

import pytest

from kvmprobe.errors import KvmprobeError
from tests.bench import captures, page
from tests.bench.cost import cost
from tests.bench.result import Result

RESULT = Result("Drain", "How.", ("way", "rate"), [("ours", "1 M")], "1 M (wanted: 2 M)")
ROOT = Path(__file__).parents[2]


def test_a_part_takes_its_own_section_only() -> None:
    parts = {"start": "## Start\n\nold", "drain": page.section(RESULT, "Measured today.")}
    text = page.page("| | |\n", parts, ("drain", "start", "guest"))
    assert page.sections(text) == parts
    assert text.index("## Drain") < text.index("## Start")
    assert "*Measured today.*" in text
    again = page.sections(text) | {"start": "## Start\n\nnew"}
    changed = page.page("| | |\n", again, ("drain", "start", "guest"))
    assert changed == text.replace("old", "new")


def test_the_page_in_the_repository_is_made_of_parts() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    found = page.sections(text)
    assert found
    assert text.count("\n## ") == len(found)


def test_what_a_command_costs() -> None:
    spent = cost([sys.executable, "-c", "print(len(bytearray(200 << 20)))"], 60)
    assert spent.printed == f"{200 << 20}\n"
    assert spent.memory > 200 << 20
    with pytest.raises(KvmprobeError, match="failed and said: so it goes"):
        cost([sys.executable, "-c", "raise SystemExit('so it goes')"], 60)
    with pytest.raises(KvmprobeError, match="did not end within"):
        cost(["sleep", "60"], 0.2)


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(KvmprobeError, match="TMPDIR"):
        captures.check_disk(tmp_path, 10**15)


def test_wrong_names() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
