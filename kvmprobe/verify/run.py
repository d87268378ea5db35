# SPDX-License-Identifier: MIT
"""All probes, one after the other, each within its time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm
from kvmprobe.host.facts import HostFacts
from kvmprobe.verify import probes
from kvmprobe.verify.answers import Answer

#: Seconds all probes together may take, of which they need some tenths.
SECONDS = 9.0
#: Seconds that one that hangs leaves to each of the others.
_RESERVE = 1.0


class _TooLongError(GuestError):
    """A probe's time is over."""


def verify(host: HostFacts, *, unsafe: bool, seconds: float = SECONDS) -> list[Answer]:
    """Run all probes on this host; an answer for each fault, "unknown" for one that failed.

    seconds: the time for all.  To be called in the main thread, whose SIGALRM ends a guest that
    hangs.  Raises GuestError when /dev/kvm can't be used.
    """
    os.close(kvm.open_device())
    parameters = host["parameters"]
    wanted: dict[str, Callable[[], Answer]] = {
        probes.INTERNAL_SLOT: partial(probes.internal_slot, parameters),
        probes.ADDRESS_SPACE: probes.address_space,
        probes.SPTE_OVERWRITE: partial(probes.spte_overwrite, parameters, unsafe=unsafe),
    }
    answers: list[Answer] = []
    end = time.monotonic() + seconds
    for fault, probe in wanted.items():
        reserved = _RESERVE * (len(wanted) - len(answers) - 1)
        limit = max(end - time.monotonic() - reserved, min(_RESERVE, seconds / len(wanted)))
        answers.append(_answer(fault, probe, limit))
    return answers


def _answer(fault: str, probe: Callable[[], Answer], seconds: float) -> Answer:
    try:
        with _within(seconds):
            return probe()
    except GuestError as error:
        return Answer(fault, "unknown", str(error))


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """End what runs inside with GuestError after `seconds`: the signal takes KVM_RUN back too."""

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise _TooLongError(f"the guest did not come to its end within {seconds:.1f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
