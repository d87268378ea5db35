# SPDX-License-Identifier: MIT
"""What a watch keeps an eye on besides events: KVM's modules, and processes that end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

#: PROC_PID_INIT_INO of linux/proc_ns.h
_HOST_PIDS = Path("pid:[4026531836]")


def kvm_modules(root: Path = Path("/")) -> dict[str, int]:
    """KVM's modules, loaded or built in, and what tells a reloaded one: its directory's inode."""
    found = {}
    for path in (root / "sys/module").glob("kvm*"):
        if path.name == "kvm" or path.name.startswith("kvm_"):
            try:
                found[path.name] = path.stat().st_ino
            except OSError:
                continue  # it is going
    return found


def ended(pids: Iterable[int], proc: Path = Path("/proc")) -> set[int]:
    """Those of the processes that are gone; none where /proc is not the host's."""
    if (proc / "self/ns/pid").readlink() != _HOST_PIDS:
        return set()
    return {pid for pid in pids if not (proc / str(pid)).exists()}
