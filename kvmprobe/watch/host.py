# SPDX-License-Identifier: MIT
"""What of this host a watch keeps an eye on besides events: KVM's modules, its own programs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

#: PROC_PID_INIT_INO of linux/proc_ns.h
_HOST_PIDS = Path("pid:[4026531836]")
_FIELD = re.compile(r"^(prog_tag|run_time_ns|run_cnt):\s+(\S+)$", re.MULTILINE)


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


def program_runs(proc: Path = Path("/proc/self")) -> tuple[int, int] | None:
    """How often this process's BPF programs ran, and for how many ns all together.

    None where the kernel doesn't count: `sysctl kernel.bpf_stats_enabled=1` makes it
    (bpf_prog_show_fdinfo() in kernel/bpf/syscall.c tells the counts).
    """
    runs = ns = 0
    for info in (proc / "fdinfo").iterdir():
        try:
            fields = dict(_FIELD.findall(info.read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
        if "prog_tag" in fields:
            runs += int(fields.get("run_cnt", 0))
            ns += int(fields.get("run_time_ns", 0))
    return (runs, ns) if runs else None
