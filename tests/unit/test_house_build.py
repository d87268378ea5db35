# SPDX-License-Identifier: MIT
"""The locks and the Makefile say what they have to."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import kvmprobe

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock")


def locked(name: str) -> dict[str, str]:
    """Project -> version, with the rest of each requirement checked."""
    text = (ROOT / name).read_text().replace("\\\n", "")
    found = {}
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        m = re.fullmatch(r"([a-z0-9-]+)==(\S+)( ; [^;]+?)?(\s+--hash=sha256:[0-9a-f]{64})+", line)
        assert m is not None, f"{name}: no pinned version with hashes: {line[:80]}"
        found[m[1]] = m[2]
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_lock_names_no_address(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert not [line for line in text.splitlines() if line.startswith("--")]


def test_lock_holds_every_dependency_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = (
        project["project"]["dependencies"] + project["project"]["optional-dependencies"]["fast"]
    )
    run, dev = locked(LOCKS[0]), locked(LOCKS[1])
    names = {re.split(r"[<>=\[]", requirement)[0] for requirement in wanted}
    assert names <= run.keys()
    assert run.items() <= dev.items()
    tools = {re.split(r"[<>=\[]", r)[0] for r in project["dependency-groups"]["dev"]}
    assert tools <= dev.keys()


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"\.PHONY: ((?:.*\\\n)*.*)\n", (ROOT / "Makefile").read_text())
    assert phony is not None
    run = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^  make ([\w-]+) +\S", run.stdout, re.M)
    assert sorted(listed) == sorted(phony[1].replace("\\\n", " ").split())


def test_stage_keeps_the_status_of_its_command() -> None:
    run = subprocess.run(
        ["tools/stage", "name", "sh", "-c", "echo out; exit 3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 3
    assert re.fullmatch(r"== name\nout\n== name: \d+ s\n", run.stdout)


def test_python_too_old_is_refused_in_one_line() -> None:
    run = subprocess.run(
        ["tools/python"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        "no Python 3.11 or newer (tried /bin/false): set PYTHON=/path/to/python3"
    ]


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert kvmprobe.__version__ == project["version"]
