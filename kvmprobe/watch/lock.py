# SPDX-License-Identifier: MIT
"""One watch at a time has a directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from kvmprobe.errors import HostError


class DirectoryLock:
    """A directory that one watch has for itself: a context."""

    def __init__(self, path: Path, mode: int, option: str) -> None:
        """Make the directory if it doesn't exist, and lock it.

        Raises:
            InUseError: another watch has it; the message names `option` as the way out.
            HostError: it can't be made or written.

        """
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(path / ".lock", flags, 0o600)
        except OSError as error:
            raise HostError(f"can't use the directory {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise InUseError(
                f"another kvmprobe watch uses {path}; stop it, or give this one another {option}"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class InUseError(HostError):
    """Another watch has the directory."""
