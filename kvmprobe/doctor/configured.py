# SPDX-License-Identifier: MIT
"""What this host's configuration says about the faults; quick, for `check` asks it too."""

from __future__ import annotations

from collections.abc import Callable

from kvmprobe.errors import GuestError
from kvmprobe.guests import nested, smm
from kvmprobe.host.exposure import Exposure, exposures
from kvmprobe.host.facts import HostFacts


def configured(host: HostFacts) -> list[Exposure]:
    """What this host's configuration, and its KVM when asked, say about each fault."""
    return exposures(
        host["vendor"], host["parameters"], smm=_ask(smm.supported), nests=_ask(_nests)
    )


def _ask(question: Callable[[], bool]) -> bool | None:
    """What /dev/kvm answers; None where it can't be asked."""
    try:
        return question()
    except GuestError:
        return None


def _nests() -> bool:
    return nested.nests() is not None
