# SPDX-License-Identifier: MIT
"""A thread that deletes and creates a memslot beside a running guest."""

from __future__ import annotations

import threading
from types import TracebackType

from kvmprobe.errors import GuestError
from kvmprobe.guests.vmm import Slot


class Flipper:
    """Toggle `slot` about `rate` times a second until the context ends; the slot is left deleted.

    `changes` counts the memslot changes made.  An error of KVM ends the thread and is raised by
    the context's end.
    """

    def __init__(self, slot: Slot, rate: float) -> None:
        self.changes = 0
        self._slot = slot
        self._pause = 1 / rate
        self._stop = threading.Event()
        self._error: GuestError | None = None
        self._thread = threading.Thread(target=self._run, name="memslot flipper")

    def __enter__(self) -> Flipper:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        try:
            self._slot.delete()
            self.changes += 1
            while not self._stop.wait(self._pause):
                self._slot.insert()
                self.changes += 1
                self._stop.wait(self._pause)
                self._slot.delete()
                self.changes += 1
        except GuestError as error:
            self._error = error
