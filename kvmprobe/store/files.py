# SPDX-License-Identifier: MIT
"""Safe creation of output files: every `-o` of the program goes through here.

An output file is created exclusively, no symbolic link is followed, it is readable by its owner
alone, and under sudo it belongs to the user who called sudo.  Nothing is replaced without `force`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kvmprobe.errors import CaptureError

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file would exceed the size limit; raise `ulimit -f` or record less",
    errno.EIO: "the disk reports an input/output error; choose another disk",
}


def write_error(path: Path, error: OSError) -> CaptureError:
    """Say in one line why `path` can't be written."""
    why = _FULL.get(error.errno or 0) or error.strerror or str(error)
    return CaptureError(f"can't write {path}: {why}")


def create_file(path: str | os.PathLike[str], *, force: bool = False, mode: int = 0o600) -> int:
    """Create an empty file for a stream and return its file descriptor, open for writing.

    With `force` a new file takes the place of an old one at once, by rename: a recording has no
    end that could be waited for, and after a crash the cut capture must stand under the name that
    was asked for.  Whoever still reads the old file keeps it.

    Raises CaptureError when the file exists (without `force`), is a symbolic link or anything but
    a regular file, or can't be created.
    """
    target = Path(path)
    fd, made = create_beside(target, force=force, mode=mode)
    if made != target:
        try:
            made.replace(target)
        except OSError as e:
            os.close(fd)
            made.unlink(missing_ok=True)
            raise write_error(target, e) from e
    return fd


@contextlib.contextmanager
def create_output(
    path: str | os.PathLike[str], *, force: bool = False, mode: int = 0o600
) -> Iterator[BinaryIO]:
    """Create a file for a document: a context that gives a binary file to write to.

    The document is there whole or not at all: it is removed when the body raises, and with
    `force` an old file stays until the new one is complete and renamed over it.

    Raises CaptureError as `create_file`, and when writing fails for want of space.
    """
    target = Path(path)
    fd, made = create_beside(target, force=force, mode=mode)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
        if made != target:
            made.replace(target)
    except BaseException as e:
        made.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno in _FULL:
            raise write_error(target, e) from e
        raise


def create_beside(path: Path, *, force: bool, mode: int = 0o600) -> tuple[int, Path]:
    """Create `path`, or with `force` a temporary file beside it when it exists.

    Returns the file descriptor, open for writing, and the path that was created.  Raises
    CaptureError as `create_file`.
    """
    try:
        exists = _check_place(path, force)
        # A fixed, short name: the asked one may already have the longest length allowed.
        made = path.parent / f".kvmprobe-{secrets.token_hex(8)}.tmp" if exists else path
        fd = os.open(made, _FLAGS, mode)
    except FileExistsError:
        raise _exists(path) from None
    except (OSError, ValueError) as e:
        error = e if isinstance(e, OSError) else OSError(errno.EINVAL, str(e))
        raise write_error(path, error) from e
    _give_back(fd)
    return fd, made


def _check_place(path: Path, force: bool) -> bool:
    """Whether there is a file at `path` that may be replaced."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(mode):
        raise CaptureError(f"{path} is a symbolic link, which is not followed; name the file")
    if stat.S_ISDIR(mode):
        raise CaptureError(f"{path} is a directory; name a file in it")
    if not stat.S_ISREG(mode):
        raise CaptureError(f"{path} is not a regular file; name another")
    if not force:
        raise _exists(path)
    return True


def _exists(path: Path) -> CaptureError:
    return CaptureError(f"{path} exists; pass --force to replace it")


def _give_back(fd: int) -> None:
    """Under sudo, give the file to the user who called it."""
    if os.geteuid() != 0:
        return
    try:
        uid, gid = int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"])
    except (KeyError, ValueError):
        return
    # Some file systems (FAT, an NFS export with root squashed) have no owner to give.
    with contextlib.suppress(OSError, OverflowError):
        os.fchown(fd, uid, gid)
