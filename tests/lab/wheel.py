# SPDX-License-Identifier: MIT
"""kvmprobe as a user installs it: a wheel, built from a checkout and installed by pip."""

import hashlib
import shutil
import sys
from pathlib import Path

from tests.lab.base import built, cache_dir, content_key, run_program, say

#: What a wheel is built from.
_PARTS = (
    "kvmprobe",
    "probes",
    "analysis",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "LICENSES",
)


def hash_files(*parts: Path) -> str:
    """Return a hash of these files and of those in these folders, names and contents."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted([part, *part.rglob("*")]):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(part.parent)).encode() + path.read_bytes())
    return digest.hexdigest()


def get_installed(code: Path) -> Path:
    """Return a folder with what pip installs from a checkout's wheel, built if need be.

    Without its dependencies, which the root disk has.  Raises LabError when it can't be built.
    """
    parts = [code / part for part in _PARTS]
    folder = cache_dir() / "wheels" / content_key(hash_files(*parts))
    with built(folder, 100) as scratch:
        if scratch is not None:
            say(f"building the wheel of {code}")
            _install(parts, scratch, scratch / folder.name)
    return folder


def _install(parts: list[Path], scratch: Path, target: Path) -> None:
    # A build leaves files in the checkout: so in a copy of it.
    copy = scratch / "checkout"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for part in parts:
        if part.is_dir():
            shutil.copytree(part, copy / part.name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(part, copy)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run_program([*build, "--outdir", str(scratch), "."], cwd=copy)
    (wheel,) = scratch.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    run_program([*pip, "--root-user-action=ignore", "--target", str(target), str(wheel)])
