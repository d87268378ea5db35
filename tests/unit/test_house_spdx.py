# SPDX-License-Identifier: MIT
"""Every tracked file names its licence."""

import subprocess
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]

#: What can't carry an SPDX line, and why.
EXEMPT = {
    "LICENSE": "is the licence",
    "LICENSES/*": "is the licence",
    "*.json": "JSON has no comments",
    "*.ipynb": "JSON has no comments",
    "*.bin": "assembled guest code, checked in beside its source",
    "*.xz": "compressed data",
    "*.kvmprobe": "a capture, binary",
    "*.png": "a picture, binary",
}

#: Folders that are not plain MIT: what the kernel loads has to be compatible with its licence.
LICENCES = {
    "probes/": "GPL-2.0-only OR MIT",
    "tests/lab/slot/": "GPL-2.0-only",
}


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked is unknown")
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return out.stdout.decode().rstrip("\0").split("\0")


def spdx_line(name: str) -> str | None:
    """The licence expression in the first three lines of a tracked file."""
    with (ROOT / name).open(encoding="utf-8") as file:
        for _, line in zip(range(3), file, strict=False):
            _, found, rest = line.partition("SPDX-License-Identifier: ")
            if found:
                return rest.strip().removesuffix("-->").removesuffix("*/").strip()
    return None


def test_every_tracked_file_names_its_licence() -> None:
    wrong = {}
    for name in tracked():
        path = PurePosixPath(name)
        if (ROOT / name).is_symlink() or any(path.match(pattern) for pattern in EXEMPT):
            continue
        folders = [folder for folder in LICENCES if name.startswith(folder)]
        expected = LICENCES[folders[0]] if folders else "MIT"
        if (found := spdx_line(name)) != expected:
            wrong[name] = found
    assert wrong == {}


def test_every_exemption_is_needed() -> None:
    names = [PurePosixPath(name) for name in tracked()]
    assert [p for p in EXEMPT if not any(name.match(p) for name in names)] == []
