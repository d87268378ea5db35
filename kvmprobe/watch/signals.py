# SPDX-License-Identifier: MIT
"""Signals as wishes, which the service's loop grants."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any, Self

_STDERR = 2


class Wishes:
    """What signals ask for: a context that takes SIGTERM, SIGINT, SIGHUP and SIGUSR1.

    SIGHUP asks for a reload, and for the end where it comes from a terminal that was closed.
    """

    def __init__(self) -> None:
        """Ask for nothing yet."""
        self.stop: str | None = None
        self.reload = False
        self.detach = False
        self._terminal = os.isatty(_STDERR)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        closed = self._terminal and not os.isatty(_STDERR)
        if number == signal.SIGHUP and not closed:
            self.reload = True
        elif number == signal.SIGUSR1:
            self.detach = True
        elif self.stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stop = signal.Signals(number).name
