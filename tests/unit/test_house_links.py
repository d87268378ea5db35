# SPDX-License-Identifier: MIT
"""probes/ and analysis/ are seen as kvmprobe.probes and kvmprobe.analysis, by every tool."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("probes", "analysis")
RUFF = [
    sys.executable,
    "-m",
    "ruff",
    "check",
    "--no-cache",
    "--output-format=json",
    "--select=TID251",
]


@pytest.mark.parametrize("name", LINKED)
def test_link_is_relative(name: str) -> None:
    assert (ROOT / "kvmprobe" / name).readlink() == Path("..") / name


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize(
    "statement", ["import {}", "import {} as x", "from {} import x", "from {}.x import y"]
)
def test_ruff_refuses_top_level_import(name: str, statement: str) -> None:
    run = subprocess.run(
        [*RUFF, "--stdin-filename=kvmprobe/x.py", "-"],
        input=statement.format(name) + "\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert [finding["code"] for finding in json.loads(run.stdout)] == ["TID251"]


@pytest.mark.parametrize("name", LINKED)
def test_installed_environment_has_no_top_level_module(name: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert f"No module named '{name}'" in run.stderr


def test_coverage_measures_through_the_links(tmp_path: Path) -> None:
    data = tmp_path / "coverage"
    code = "import kvmprobe.errors, kvmprobe.analysis, kvmprobe.probes.schema"
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}\n")
    coverage = [sys.executable, "-m", "coverage"]
    report = tmp_path / "report.json"
    subprocess.run(
        [*coverage, "run", f"--data-file={data}", str(script)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    subprocess.run(
        [*coverage, "json", f"--data-file={data}", f"-o{report}", "-q"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    files = json.loads(report.read_text())["files"]
    for name in ("kvmprobe/errors.py", "probes/schema.py"):
        assert files[name]["summary"]["covered_lines"] > 0
    assert "analysis/__init__.py" in files
    assert not [name for name in files if name.startswith(("kvmprobe/probes", "kvmprobe/analysis"))]
