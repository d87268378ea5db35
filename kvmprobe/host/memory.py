# SPDX-License-Identifier: MIT
"""Giving memory back to the kernel."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path

_MADV_PAGEOUT = 21


def release_memory(libraries: Iterable[str]) -> None:
    """Give back the free parts of the heap, and the pages of libraries that are not needed now.

    Args:
        libraries: what the file names of the libraries contain.  Their pages are dropped from this
            process and read again when they are touched, so nothing breaks.

    """
    wanted = tuple(libraries)
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and any(name in fields[5] for name in wanted):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            libc.madvise(start, end - start, _MADV_PAGEOUT)
