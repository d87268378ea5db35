# SPDX-License-Identifier: MIT
"""A watch under VMs that come and go, and are killed at any moment: does it stay as it is?

python -m tests.soak MINUTES

Memory and descriptors have to stay flat, and no probe may be left behind.  Needs /dev/kvm and root.
"""

from __future__ import annotations

import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import LOAD, ROOT
from tests.watched import Watch, left_behind

#: What anonymous memory may grow by between the run's second and last quarter, kB.
GROWTH = 4096
_GUESTS = 3


@dataclass
class Soaked:
    """What was measured: over time anonymous memory in kB and open descriptors, and totals.

    `cpu_seconds` are the watch's own, from when its probes were attached.
    """

    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    vms: int = 0
    lost: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    code: int | None = None
    left: set[int] = field(default_factory=set)

    def problems(self) -> list[str]:
        """What was not as it has to be."""
        found = []
        quarter = max(1, len(self.memory) // 4)
        early = statistics.median(self.memory[quarter : 2 * quarter] or self.memory)
        late = statistics.median(self.memory[-quarter:])
        if late - early > GROWTH:
            found.append(f"memory grew from {early:.0f} to {late:.0f} kB")
        if self.descriptors[-1] > self.descriptors[0]:
            found.append(f"descriptors grew from {self.descriptors[0]} to {self.descriptors[-1]}")
        if self.code != 0:
            found.append(f"it ended with {self.code}")
        if self.left:
            found.append(f"{len(self.left)} programs were left behind")
        return found


def soak(directory: Path, seconds: float, warm_up: float) -> Soaked:
    """Run a watch for so many seconds after `warm_up` under guests that are killed at random."""
    result = Soaked()
    guests: list[tuple[subprocess.Popen[bytes], float]] = []
    with Watch(directory) as watch:
        watch.watching()
        pid = watch.process.pid
        begin = time.monotonic()
        before = watch.metrics()["process_cpu_seconds_total"]
        try:
            while (now := time.monotonic()) - begin < warm_up + seconds:
                for guest, until in [*guests]:
                    if now >= until:
                        guest.send_signal(signal.SIGKILL)
                        guest.wait()
                        guests.remove((guest, until))
                while len(guests) < _GUESTS:
                    command = [*LOAD, "--seconds", "600", "--rate", "500"]
                    guest = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
                    # Some are killed before their VM is there, some while they are read.
                    guests.append((guest, now + random.uniform(0.1, 3.0)))
                if now - begin >= warm_up:
                    result.memory.append(memory(pid))
                    result.descriptors.append(len([*Path(f"/proc/{pid}/fd").iterdir()]))
                time.sleep(min(1.0, seconds / 8))
        finally:
            for guest, _ in guests:
                guest.kill()
                guest.wait()
        status = watch.until(lambda status: status.vms_seen > 0)
        result.vms, result.lost = status.vms_seen, sum(status.lost.values())
        result.cpu_seconds = watch.metrics()["process_cpu_seconds_total"] - before
        result.seconds = time.monotonic() - begin
        watch.signal(signal.SIGTERM)
        result.code, _ = watch.end()
        result.left = left_behind(watch.programs)
    return result


def memory(pid: int) -> int:
    """Anonymous memory of a process, kB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0])


def main() -> None:
    """Soak for the minutes given, and say what was measured; exit with 1 for a problem."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    with tempfile.TemporaryDirectory() as directory:
        result = soak(Path(directory), seconds=60 * minutes, warm_up=min(60.0, 20 * minutes))
    print(
        f"{result.seconds:.0f} s, {result.vms} VMs, {result.lost} records lost; anonymous memory "
        f"{result.memory[0]} to {result.memory[-1]} kB, at most {max(result.memory)}; descriptors "
        f"{result.descriptors[0]} to {result.descriptors[-1]}; CPU {result.cpu_seconds:.2f} s"
    )
    for problem in result.problems():
        print(problem)
    sys.exit(bool(result.problems()))


if __name__ == "__main__":
    main()
