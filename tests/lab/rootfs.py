# SPDX-License-Identifier: MIT
"""Root disks: one Debian release with BCC, Python and kvmprobe's dependencies, and no headers."""

import contextlib
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

from tests.lab.base import (
    CHECKOUT,
    LabError,
    MissingError,
    built,
    cache_dir,
    content_key,
    find_program,
    run_program,
    say,
)
from tests.lab.mirror import KEYRING, read_mirror
from tests.lab.packages import Release

# What a user of kvmprobe installs, and what the lab's own scripts call in the VM.
PACKAGES = ("python3", "python3-venv", "python3-bpfcc", "kmod", "busybox-static", "procps")
VENV = "/opt/venv"
_DISK_MEBIBYTES = 4000  # sparse: the file takes what the tree takes
_COMMAND = f"""#!{VENV}/bin/python
import sys

from kvmprobe.cli.main import main

sys.exit(main())
"""


def get_root(release_name: str, more: tuple[str, ...] = ()) -> Path:
    """Return the root disk (an ext4 image) of a Debian release, built if need be.

    kvmprobe itself is not in it: the VM finds it in /opt/kvmprobe, which each run brings along.
    `more` are packages beside those that kvmprobe and the lab need.
    Raises MissingError when not root, or when the mirror or a program is missing.
    """
    release, packages = Release(release_name), (*PACKAGES, *more)
    versions = [(name, release.show(name).version) for name in packages]
    python = ".".join(dict(versions)["python3"].split(".")[:2])
    requirements = _requirements()
    key = content_key(release_name, versions, requirements, _COMMAND, _DISK_MEBIBYTES, 1)
    disk = cache_dir() / "roots" / f"{release_name}-{key}.ext4"
    with built(disk, 4000) as scratch:
        if scratch is not None:
            say(f"building the root disk of {release_name} (Python {python}); takes minutes")
            tree = scratch / "tree"
            bootstrap(release_name, packages, tree)
            _install_dependencies(tree, scratch / "wheels", python, requirements)
            _trim(tree)
            make_disk(tree, scratch / disk.name, _DISK_MEBIBYTES)
    return disk


def make_disk(tree: Path, disk: Path, mebibytes: int) -> None:
    """Make an ext4 image of a folder without mounting anything."""
    mke2fs = find_program("mke2fs", "e2fsprogs")
    features = "^has_journal,^metadata_csum,^64bit,^orphan_file"
    run_program(
        [mke2fs, "-q", "-t", "ext4", "-O", features, "-d", str(tree), str(disk), f"{mebibytes}M"]
    )


def _requirements() -> list[str]:
    """Return kvmprobe's own dependencies, as its metadata gives them."""
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        return list(tomllib.load(file)["project"]["dependencies"])


def bootstrap(release_name: str, packages: tuple[str, ...], tree: Path) -> None:
    """Install a minimal Debian release with these packages into a folder; needs root."""
    if os.geteuid() != 0:
        raise MissingError("a Debian root can only be built by root; run the lab as root")
    debootstrap = find_program("debootstrap", "debootstrap")
    try:
        run_program(
            [
                debootstrap,
                "--variant=minbase",
                f"--include={','.join(packages)}",
                f"--keyring={KEYRING}",
                release_name,
                str(tree),
                read_mirror().archive,
            ]
        )
    except LabError as error:
        log = tree / "debootstrap" / "debootstrap.log"
        tail = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
        raise LabError(f"no root of {release_name}: {error}; {' '.join(tail)}") from None


def _install_dependencies(tree: Path, wheels: Path, python: str, requirements: list[str]) -> None:
    """Fill a virtual environment in the tree, as pipx would, from wheels fetched outside it."""
    run_program(
        [
            *_pip(),
            "download",
            "--quiet",
            "--dest",
            str(wheels),
            "--python-version",
            python,
            "--implementation",
            "cp",
            "--only-binary=:all:",
            *(f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)),
            "--platform=manylinux2014_x86_64",
            *requirements,
        ]
    )
    inside = tree / "wheels"
    shutil.copytree(wheels, inside)
    chroot = [find_program("chroot", "coreutils"), str(tree)]
    run_program([*chroot, "python3", "-m", "venv", VENV])
    install = [f"{VENV}/bin/pip", "install", "--quiet", "--no-index", "--find-links=/wheels"]
    run_program([*chroot, *install, *requirements])
    shutil.rmtree(inside)
    site = tree / VENV.lstrip("/") / "lib" / f"python{python}" / "site-packages"
    (site / "kvmprobe.pth").write_text("/opt/kvmprobe\n")
    command = tree / VENV.lstrip("/") / "bin" / "kvmprobe"
    command.write_text(_COMMAND)
    command.chmod(0o755)


def _pip() -> list[str]:
    for python in (sys.executable, find_program("python3", "python3")):
        with contextlib.suppress(LabError):
            run_program([python, "-m", "pip", "--version"])
            return [python, "-m", "pip"]
    raise MissingError("pip is not installed; apt-get install python3-pip")


def _trim(tree: Path) -> None:
    """Drop what only costs disk and time: downloaded packages, documentation, translations."""
    for pattern in ("var/cache/apt/*", "var/lib/apt/lists/*", "usr/share/doc/*", "usr/share/man/*"):
        for path in tree.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in (tree / "usr/share/locale").iterdir():
        if path.is_dir() and not re.match(r"C\b", path.name):
            shutil.rmtree(path)
    # Where the VM's parts are mounted or bound.
    for name in ("lab", "out", "opt/kvmprobe", "lib/modules"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / "etc/hostname").write_text("lab\n")
