# SPDX-License-Identifier: MIT
"""The memory of a `watch` that has started, beside an idle bpftrace on a tracepoint of KVM."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from kvmprobe.errors import HostError
from tests.bench.result import Result
from tests.processes import LOAD, running
from tests.watched import Watch

#: Seconds after which it is looked at, and how often, once a second.
SETTLE, LOOKS = 5.0, 10
#: A mapping of smaps: what is mapped, and kB of it that are resident.
_RESIDENT = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)$(?:\n[A-Z].*)*?\nRss: +(\d+) kB$", re.M
)
_BPFTRACE = "tracepoint:kvm:kvm_mmio { @accesses[tid] = count(); }"


def _memory(pid: int) -> tuple[float, float]:
    """Resident memory of a process, and what of it are BPF's rings, mapped, in MB."""
    text = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace")
    found = [(name, int(size) * 1024 / 1e6) for name, size in _RESIDENT.findall(text)]
    rings = (size for name, size in found if "bpf" in name)
    return sum(size for _, size in found), sum(rings)


def run() -> Result:
    """Measure, with the load guest running; HostError where a watch can't start."""
    looks: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        opened.enter_context(running(*LOAD, "--seconds", "600", "--rate", "2000"))
        watch = opened.enter_context(Watch(folder))
        try:
            watch.watching()
        except AssertionError as error:
            raise HostError(f"kvmprobe watch does not start: {error}") from None
        pids = {"kvmprobe watch": watch.process.pid}
        if shutil.which("bpftrace"):
            peer = opened.enter_context(
                subprocess.Popen(
                    ["bpftrace", "-e", _BPFTRACE],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            opened.callback(peer.terminate)
            pids["bpftrace, counting"] = peer.pid
        time.sleep(SETTLE)
        for _ in range(LOOKS):
            for name, pid in pids.items():
                looks.setdefault(name, []).append(_memory(pid))
            time.sleep(1)
    medians = {
        name: tuple(statistics.median(column) for column in zip(*seen, strict=True))
        for name, seen in looks.items()
    }
    whole, rings = medians["kvmprobe watch"]
    return Result(
        "Memory of a watch",
        f"{SETTLE:g} s after the probes were attached, {LOOKS} looks a second apart, the load "
        "guest running at 2,000 accesses a second. BPF's rings are the kernel's memory and count "
        "as resident where they are mapped, each twice in a row.",
        ("process", "resident, MB", "of it BPF's rings, MB", "most, MB"),
        [
            (name, f"{medians[name][0]:.1f}", f"{medians[name][1]:.1f}", f"{max(seen)[0]:.1f}")
            for name, seen in looks.items()
        ],
        f"{whole:.0f} MB (wanted: under 100), {rings:.0f} MB of them the rings",
    )
