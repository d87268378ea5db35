# SPDX-License-Identifier: MIT
"""What every module of the lab needs: its error, its cache, and running a program."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
#: What the cache keeps by content, and for how long without use.
_KEPT = ("debs", "helpers", "initrds", "kernels", "results", "roots", "selftests", "wheels")
KEPT_DAYS = 30


class LabError(Exception):
    """The lab can't go on; the message is one line: what is wrong, and what to do."""


class MissingError(LabError):
    """Something the lab needs isn't to be had here: a program, a package, the mirror, disk space.

    Outside CI a test may skip with this message as its reason.
    """


def say(message: str) -> None:
    """Report progress on stderr."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """Return the lab's cache, outside the checkout: $XDG_CACHE_HOME/kvmprobe-lab."""
    base = os.environ.get("XDG_CACHE_HOME")
    path = (Path(base) if base else Path.home() / ".cache") / "kvmprobe-lab"
    path.mkdir(parents=True, exist_ok=True)
    return path


def prune_cache() -> None:
    """Remove from the cache what nobody used for KEPT_DAYS: each new version adds to it."""
    oldest = time.time() - KEPT_DAYS * 86400
    for folder in _KEPT:
        for path in (cache_dir() / folder).glob("[!.]*"):
            if path.stat().st_mtime > oldest:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def need_space(mebibytes: int) -> None:
    """Raise MissingError when the cache's file system has less than this free."""
    free = shutil.disk_usage(cache_dir()).free >> 20
    if free < mebibytes:
        raise MissingError(
            f"{cache_dir()} has {free} MiB free and {mebibytes} are needed; free some, "
            "or set XDG_CACHE_HOME"
        )


def content_key(*parts: object) -> str:
    """Return a short name that changes whenever one of the parts (JSON values) does."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_program(name: str, package: str) -> str:
    """Return the path of a program; raise MissingError naming the Debian package that holds it."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise MissingError(f"{name} is not installed; apt-get install {package}")
    return found


def run_program(command: list[str], *, cwd: Path | None = None, stdin: str | None = None) -> str:
    """Run a program to its end and return its standard output.

    Raises LabError with the line of its standard error that tells most when it fails.
    """
    done = subprocess.run(
        command,
        cwd=cwd,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        # What went wrong comes first, and then what went wrong because of it.
        errors = [line for line in lines if "error: " in line.lower() or line.startswith("E: ")]
        reason = (errors[:1] or lines[-1:] or ["it said nothing"])[0]
        raise LabError(f"{Path(command[0]).name} failed with status {done.returncode}: {reason}")
    return done.stdout


@contextlib.contextmanager
def built(path: Path, mebibytes: int) -> Iterator[Path | None]:
    """Guard the one-time making of a cached file or folder.

    Yields None when `path` is already there.  Otherwise yields an empty scratch folder; the caller
    makes `scratch / path.name`, which is moved to `path` only when nothing was raised.  So a build
    that breaks off leaves nothing that a later one would take for whole, and two builds at once
    wait for each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            os.utime(path)
            yield None
            return
        need_space(mebibytes)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
            yield Path(scratch)
            (Path(scratch) / path.name).rename(path)
