# SPDX-License-Identifier: MIT
"""A directory that one process at a time has for itself."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

#: The file in the directory that is locked.
NAME = ".lock"


class DirectoryLock:
    """A directory that one process has for itself: a context."""

    def __init__(self, path: Path) -> None:
        """Lock a directory.

        Raises:
            BlockingIOError: another process has it.
            OSError: it isn't there, or can't be written.

        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(path / NAME, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the directory up."""
        os.close(self._fd)
