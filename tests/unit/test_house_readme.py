# SPDX-License-Identifier: MIT
"""What README.md shows is what the program does, and what the pages point at is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PROGRAM = "import sys; from kvmprobe.cli.main import main; sys.exit(main())"


def shown(command: str) -> list[str]:
    """What README.md shows behind `$ command`: the pieces between lines of dots, in order."""
    text = (ROOT / "README.md").read_text()
    block = re.search("```console\n\\$ " + re.escape(command) + "\n(.*?)```", text, re.S)
    assert block is not None, f"README.md does not show {command!r}"
    pieces = [piece for piece in block[1].split("  ...\n") if piece]
    assert pieces, f"README.md shows nothing behind {command!r}"
    return pieces


def test_the_finding_shown_is_what_analyze_prints() -> None:
    command = "kvmprobe analyze tests/data/golden/lab-6.1-intel.kvmprobe"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *shlex.split(command)[1:]],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rest = run.stdout
    for piece in shown(command):
        _, found, rest = rest.partition(piece)
        assert found, f"README.md shows what analyze does not print (here or at all):\n{piece}"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^\$ |`)make ([a-z]+)\b", text, re.M))
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.M)] == []
