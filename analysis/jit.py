# SPDX-License-Identifier: MIT
"""Compiling loops with numba, and where numba may keep what it compiled.

This is the only module that imports numba, and only when asked to compile.  What numba keeps is
loaded as code by the next process, so the place must be ours alone: $CACHE_DIRECTORY (systemd makes
it), else the user's own cache directory, else nowhere.  Root that acts for another user keeps
nothing: it would leave files behind that this user can't remove.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

#: What `steps.scan` and its compiled form have in common.
Scan = Callable[..., tuple[int, int]]

#: Set to anything but nothing or 0: never compile.
NO_JIT = "KVMPROBE_NO_JIT"

_SHARED = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - named to be refused


def _ours(path: Path) -> bool:
    """Whether `path` is a directory that nobody else can write and that isn't a shared one."""
    real = path.resolve()
    shared = [Path(root).resolve() for root in (*_SHARED, tempfile.gettempdir())]
    if any(real == root or root in real.parents for root in shared):
        return False
    try:
        info = real.stat()
        with tempfile.TemporaryFile(dir=real):
            pass
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return info.st_uid == os.geteuid() and not info.st_mode & others


def cache_directory(*more: Path) -> Path | None:
    """Return the directory for compiled code, made and tried, or None for "keep nothing".

    `more` are folders of other sources that the code is compiled from.
    """
    given = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if given:
        base = Path(given)
    elif os.geteuid() == 0 and os.environ.get("SUDO_UID", "0") != "0":
        return None
    else:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        try:
            base = Path(home).expanduser() / "kvmprobe"
        except RuntimeError:
            return None
    path = base / f"jit-{_digest(more)}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return path if _ours(path) else None


def _digest(more: Sequence[Path]) -> str:
    """Name the sources that loops are compiled from: numba looks at one file only."""
    here = Path(__file__).parent
    sources = [
        Path(__file__),
        here / "steps.py",
        *sorted((here / "rules").glob("*.py")),
        here.parent / "probes" / "events.h",
        *(source for folder in more for source in sorted(folder.glob("*.py"))),
    ]
    text = b"\0".join(source.read_bytes() for source in sources)
    return hashlib.sha256(text).hexdigest()[:16]


def available() -> bool:
    """Whether the loop can be compiled: numba is installed and KVMPROBE_NO_JIT isn't set."""
    if os.environ.get(NO_JIT, "0") not in ("", "0"):
        return False
    from importlib.util import find_spec

    return find_spec("numba") is not None


def compiled(
    function: Callable[..., Any],
    helpers: Iterable[Callable[..., Any]],
    *more: Path,
    counted: bool = True,
) -> Any:  # noqa: ANN401
    """Return `function` compiled, and with it what it calls; only where `available()`.

    The first call of the result compiles (seconds) or loads what an earlier process kept.  `more`
    are folders of other sources that it is compiled from.  `counted`: numba counts references to
    arrays, which a loop needs that makes arrays; one that only works on those it is given spends a
    third of its time on that.
    """
    import numba
    from numba.extending import register_jitable

    how: dict[str, Any] = {} if counted else {"_nrt": False}
    for helper in helpers:
        register_jitable(forceinline=True, **how)(helper)
    directory = cache_directory(*more)
    # numba reads the setting when a function is decorated; others may have set it for theirs.
    config: Any = numba.config
    before = config.CACHE_DIR
    try:
        config.CACHE_DIR = str(directory or "")
        return numba.njit(function, cache=directory is not None, nogil=True, **how)
    finally:
        config.CACHE_DIR = before


@cache
def compiled_scan() -> Scan:
    """Return `steps.scan` compiled; call it only where `available()`."""
    from kvmprobe.analysis import rules, steps
    from kvmprobe.analysis.rules.model import HELPERS

    helpers: list[Callable[..., Any]] = [*HELPERS, *(rule.step for rule in rules.RULES)]
    helpers += [rules.STEP_ALL, steps.find, steps.begin]
    return cast(Scan, compiled(steps.scan, helpers, counted=False))
