# SPDX-License-Identifier: MIT
"""A thread of its own for everything that is written to a disk."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Callable

from kvmprobe.errors import CaptureError
from kvmprobe.watch.output import ERROR, Journal

#: Writes that may wait.
_TASKS = 256


class Keeper:
    """A thread for all that a slow or full disk can hold up: the watch itself never waits for one.

    A write that fails is counted and told once, until one to the same output succeeds.
    """

    def __init__(self, journal: Journal) -> None:
        """Start the thread."""
        self.errors: Counter[str] = Counter()
        self._journal = journal
        self._failing: set[str] = set()
        self._tasks: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(_TASKS)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def do(self, output: str, task: Callable[[], None]) -> bool:
        """Have `task` done, which writes to `output`; False when too much waits already."""
        try:
            self._tasks.put_nowait((output, task))
        except queue.Full:
            self._failed(output, "earlier writes have not come to an end")
            return False
        return True

    def now(self, output: str, task: Callable[[], None]) -> None:
        """Do `task` here and now: what it writes to is memory."""
        try:
            task()
        except (OSError, CaptureError) as error:
            said = error.strerror if isinstance(error, OSError) else None
            self._failed(output, said or str(error))
        else:
            self._failing.discard(output)

    def close(self, timeout: float) -> None:
        """Have what waits done, for so many seconds at most."""
        with contextlib.suppress(queue.Full):
            self._tasks.put(None, timeout=timeout)
            self._thread.join(timeout)

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            self.now(*item)

    def _failed(self, output: str, why: str) -> None:
        self.errors[output] += 1
        if output not in self._failing:
            self._failing.add(output)
            self._journal.say(ERROR, f"can't write the {output}: {why}", output=output)
