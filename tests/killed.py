# SPDX-License-Identifier: MIT
"""SIGKILL at random moments: what is on the disk then has to be of use.

python -m tests.killed record KILLS DIRECTORY   recorders of this host (needs /dev/kvm and root)
python -m tests.killed watch KILLS DIRECTORY    desks of a watch that find a fault

The probes are attached once, and each recorder is a fork that drains their ring until it is killed:
to compile for each would take most of the time.  Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvmprobe.analysis.integrity import Integrity
from kvmprobe.probes.schema import EVENT, Type, rows
from kvmprobe.store.reader import CaptureReader
from tests.processes import LOAD, ROOT, running

#: Longest lives, seconds of processor time: on a busy machine nobody dies younger.
_RECORDER, _DESK = 0.06, 0.3
_FAULTY = ROOT / "tests/data/golden/lab-6.1-intel.kvmprobe"


def kill(work: Callable[[], None], longest: float) -> None:
    """Do `work` in a fork, which is killed at a random moment after its begin."""
    begun, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(tell, b"1")
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.read(begun, 1)
    os.close(begun)
    os.close(tell)
    life = random.uniform(0, longest)
    while _used(child) < life:
        time.sleep(0.003)
        if os.waitpid(child, os.WNOHANG)[0]:
            raise AssertionError("it ended by itself")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _used(pid: int) -> float:
    """Seconds of processor time that a process has used, by all its threads."""
    ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            ns += int((task / "schedstat").read_text().split()[0])
    return ns / 1e9


def looked_at(path: Path) -> str:
    """How a capture is that nobody has ended; raises CaptureError when it can't be opened."""
    if not path.exists():
        return "not begun"
    if not path.stat().st_size:
        return "empty"
    whole = Integrity()
    with CaptureReader(path) as reader:
        for batch in reader.batches():
            whole.feed(batch)
        if reader.damaged or whole.unexplained or whole.anomaly_counts:
            raise AssertionError(f"{path}: {reader.damaged}, {whole.unexplained} missing")
        if whole.total:
            return "cut off" if reader.truncated else "whole"
        return "without events"


def record(kills: int, directory: Path) -> Counter[str]:
    """Kill recorders of this host; how their captures were."""
    from kvmprobe.capture.header import live_header
    from kvmprobe.capture.recorder import Limits, Recorder
    from kvmprobe.capture.session import Filters, Session
    from kvmprobe.store.writer import CaptureWriter

    seen: Counter[str] = Counter()
    with (
        running(*LOAD, "--seconds", "600", "--rate", "50000") as guest,
        Session(Filters(pid=guest.pid)) as session,
    ):
        session.prepare()
        session.attach()
        header = live_header(session, [])
        # What is imported only now would be anew in each fork, and so would a VM be that is met.
        CaptureWriter(directory / "first.kvmprobe", header).close()
        session.start()
        while not len(session.drain()):
            time.sleep(session.tick)
        for number in range(kills):
            path = directory / f"{number}.kvmprobe"

            def work(path: Path = path) -> None:
                with CaptureWriter(path, header) as writer:
                    recorder = Recorder(session, writer, Limits(min_free=0))
                    recorder.start()
                    recorder.run(lambda: None)

            session.drain()  # so that the fork begins where the one before it ended
            kill(work, _RECORDER)
            seen[looked_at(path)] += 1
            path.unlink(missing_ok=True)
    return seen


def watch(kills: int, directory: Path) -> Counter[str]:
    """Kill desks that find a fault, one after the other in one directory; what they left."""
    from kvmprobe.watch.config import Config
    from kvmprobe.watch.desk import Desk
    from kvmprobe.watch.latch import Latches
    from kvmprobe.watch.output import Journal

    with CaptureReader(_FAULTY) as reader:
        header = reader.header
        events = np.concatenate([rows(batch) for batch in reader.batches()])
    config = Config(state_directory=directory)
    seen: Counter[str] = Counter()

    def find(times: int) -> None:
        desk = Desk(config, "boot", Journal(native=False))
        for _ in range(times):
            # Each time another process's VM.
            events["aux"][events["type"] == Type.LIFECYCLE] = random.randrange(1 << 20)
            desk.begin(header)
            desk.feed(events)
            desk.look(time.monotonic(), lambda: np.zeros(0, EVENT))
        desk.keeper.close(60)

    # What is imported only now would be anew in each fork.
    find(1)

    def work() -> None:
        find(1 << 30)

    for _ in range(kills):
        kill(work, _DESK)
        latches = Latches(directory, "boot")
        if latches.damaged:
            raise AssertionError(latches.damaged)
        seen["latched"] = len(latches.kept)
        for path in directory.glob("evidence/*.kvmprobe"):
            with CaptureReader(path) as reader:
                if reader.truncated or sum(len(batch["ts"]) for batch in reader.batches()) == 0:
                    raise AssertionError(f"{path} is cut off: {reader.truncated}")
            seen["evidence"] += 1
            path.unlink()
        for log in directory.glob("findings.ndjson*"):
            for line in log.read_text().splitlines():
                seen[json.loads(line)["what"]] += 1
            log.unlink()
    return seen


def main() -> None:
    """Kill as often as the command line says, and print what was left."""
    what, kills, directory = sys.argv[1:]
    work = {"record": record, "watch": watch}[what]
    print(json.dumps(work(int(kills), Path(directory))))


if __name__ == "__main__":
    main()
