# SPDX-License-Identifier: MIT
"""All probes, one after the other, each within its time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm
from kvmprobe.host.facts import HostFacts
from kvmprobe.verify import probes
from kvmprobe.verify.answers import Answer

#: Seconds a probe may take, of which it needs some hundredths; all together end within 10.
SECONDS = 3.0


class _TooLongError(GuestError):
    """A probe's time is over."""


def verify(host: HostFacts, *, unsafe: bool, seconds: float = SECONDS) -> list[Answer]:
    """Run all probes on this host; an answer for each fault, "unknown" for one that failed.

    seconds: each probe's time.  To be called in the main thread, whose SIGALRM ends a guest that
    hangs.  Raises GuestError when /dev/kvm can't be used.
    """
    os.close(kvm.open_device())
    parameters = host["parameters"]
    wanted: dict[str, Callable[[], Answer]] = {
        probes.INTERNAL_SLOT: partial(probes.internal_slot, parameters),
        probes.ADDRESS_SPACE: probes.address_space,
        probes.SPTE_OVERWRITE: partial(probes.spte_overwrite, parameters, unsafe=unsafe),
    }
    return [_answer(fault, probe, seconds) for fault, probe in wanted.items()]


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
        raise _TooLongError(f"the guest did not come to its end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
