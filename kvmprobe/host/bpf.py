# SPDX-License-Identifier: MIT
"""What the bpf() system call says, asked directly."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_SYS_BPF = 321  # x86-64
_BPF_PROG_LOAD = 5
_BPF_PROG_TYPE_TRACING = 26
_BPF_TRACE_FENTRY = 24
_ATTR_SIZE = 128
_EXPECTED_ATTACH_TYPE_AT = 68
_ATTACH_BTF_ID_AT = 108
#: r0 = 0; exit
_PROGRAM = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)


def tracing_problem() -> str | None:
    """Why this kernel refuses all fentry programs, or None when it doesn't by policy.

    Tries to load an empty one on BTF type 1, which is no function: a kernel that allows fentry says
    that (EINVAL), one that forbids it says EPERM before it looks.  Nothing stays loaded.
    """
    program = ctypes.create_string_buffer(_PROGRAM, len(_PROGRAM))
    licence = ctypes.create_string_buffer(b"GPL")
    attr = ctypes.create_string_buffer(_ATTR_SIZE)
    where = (ctypes.addressof(program), ctypes.addressof(licence))
    struct.pack_into("<IIQQ", attr, 0, _BPF_PROG_TYPE_TRACING, len(_PROGRAM) // 8, *where)
    struct.pack_into("<I", attr, _EXPECTED_ATTACH_TYPE_AT, _BPF_TRACE_FENTRY)
    struct.pack_into("<I", attr, _ATTACH_BTF_ID_AT, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_BPF, _BPF_PROG_LOAD, attr, _ATTR_SIZE)
    if fd >= 0:
        os.close(fd)
        return None
    refused = ctypes.get_errno()
    return f"refused: {os.strerror(refused)}" if refused == errno.EPERM else None
