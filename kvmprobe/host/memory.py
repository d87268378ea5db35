# SPDX-License-Identifier: MIT
"""Giving memory back to the kernel."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterable
from pathlib import Path

_MADV_DONTNEED = 4
#: A mapping of /proc/self/smaps: its addresses, its file, and kB that are not the file's.
_MAPPING = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(/.*)$(?:\n[A-Z].*)*?\nAnonymous: +(\d+) kB$", re.M
)


def release_memory(libraries: Iterable[str]) -> None:
    """Give back the free parts of the heap, and the pages of libraries that are not needed now.

    Args:
        libraries: what the file names of the libraries contain.  Only mappings without a page of
            their own are dropped: what is touched again is read from the file again.

    """
    wanted = tuple(libraries)
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    smaps = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    for start, end, name, own in _MAPPING.findall(smaps):
        if own == "0" and any(library in name for library in wanted):
            first = int(start, 16)
            libc.madvise(first, int(end, 16) - first, _MADV_DONTNEED)
