# SPDX-License-Identifier: MIT
"""The parts of the Debian package; packaging/deb/build takes minutes and is not run here."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEB = ROOT / "packaging/deb"


@pytest.mark.parametrize("suite", ["", "sid", "trixie; true", "-h"])
def test_unknown_suite_is_refused_in_one_line(suite: str) -> None:
    run = subprocess.run([DEB / "build", suite], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "bookworm or trixie" in line


@pytest.mark.parametrize(
    ("name", "email"),
    [("A B", "a@localhost"), ("A\nB", "a@b.org"), ("A <x>", "a@b.org"), ("A", "")],
)
def test_a_maintainer_who_cannot_be_written_to_is_refused(name: str, email: str) -> None:
    env = {**os.environ, "DEBFULLNAME": name, "DEBEMAIL": email, "HOME": "/", "EMAIL": ""}
    env |= {
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_SYSTEM": "/dev/null",
        "GIT_DIR": "/dev/null",
    }
    run = subprocess.run(
        [DEB / "build", "trixie"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert "DEBFULLNAME and DEBEMAIL" in line


@pytest.mark.parametrize("script", ["build", "postinst", "prerm", "postrm"])
def test_scripts_are_shell(script: str) -> None:
    run = subprocess.run(["sh", "-n", DEB / script], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert (DEB / script).stat().st_mode & 0o111


def test_maintainer_scripts_need_no_network() -> None:
    for script in ("postinst", "prerm", "postrm"):
        words = (DEB / script).read_text().split()
        assert not {"pip", "curl", "wget", "apt-get", "apt"} & set(words)


def test_the_unit_names_the_program_that_the_package_replaces() -> None:
    unit = (ROOT / "packaging/kvmprobe-watch.service").read_text()
    assert unit.count("/usr/local/bin/") == 1
