# SPDX-License-Identifier: MIT
"""Where compiled code is kept, and where not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmprobe.analysis import jit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of one's own that isn't in a shared place."""
    candidates = [Path.home() / ".cache", ROOT / ".pytest_cache"]
    for base in candidates:
        try:
            base.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=base, prefix="kvmprobe-test-") as made:
                yield Path(made)
            return
        except OSError:
            continue
    pytest.skip("neither the home directory nor the checkout can be written")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE_DIRECTORY", "XDG_CACHE_HOME", "SUDO_UID"):
        monkeypatch.delenv(name, raising=False)


def test_given_directory_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", f"{home / 'a'}:{home / 'b'}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "c"))
    found = jit.cache_directory()
    assert found is not None
    assert found.parent == home / "a"
    assert found.stat().st_mode & 0o077 == 0


def test_else_the_users_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    found = jit.cache_directory()
    assert found is not None
    assert found.parent == home / "kvmprobe"


def test_no_cache_for_root_that_acts_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "1000")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert jit.cache_directory() is None


def test_no_cache_in_shared_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    assert str(tmp_path).startswith(tempfile.gettempdir())
    assert jit.cache_directory() is None


def test_no_cache_that_others_can_write(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(home))
    found = jit.cache_directory()
    assert found is not None
    found.chmod(0o777)
    assert jit.cache_directory() is None


def test_no_cache_where_it_cant_be_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("CACHE_DIRECTORY", str(home / "file"))
    assert jit.cache_directory() is None


def test_no_jit_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jit.NO_JIT, "1")
    assert not jit.available()


@pytest.mark.skipif(not jit.available(), reason="numba is not installed, or KVMPROBE_NO_JIT is set")
def test_compiled_code_is_kept_there_and_nowhere_else(home: Path) -> None:
    code = (
        "import numba; before = numba.config.CACHE_DIR\n"
        "from kvmprobe.analysis.detector import Detector\n"
        "from kvmprobe.probes.schema import Type, columns\n"
        "from tests.streams import ev, stream\n"
        "d = Detector(jit=True); d.feed(columns(stream([ev(Type.MATCH)])))\n"
        "assert d.compiled and numba.config.CACHE_DIR == before\n"
        "from kvmprobe.analysis.jit import compiled_scan\n"
        "print(sum(compiled_scan().stats.cache_hits.values()), len(d.findings()))\n"
    )
    environment = os.environ | {"CACHE_DIRECTORY": str(home), "PYTHONPATH": str(ROOT)}
    said = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=home, env=environment,
            capture_output=True, text=True, check=True,
        ).stdout.split()
        for _ in range(2)
    ]  # fmt: skip
    assert said == [["0", "1"], ["1", "1"]]
    kept = [path for path in home.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert len(kept) == 2
    assert not list((ROOT / "analysis").rglob("*.nb[ic]"))
