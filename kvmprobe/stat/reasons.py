# SPDX-License-Identifier: MIT
"""Names of exit reasons, as this kernel's own tracepoint prints them."""

from __future__ import annotations

import re
from pathlib import Path

from kvmprobe.stat.model import REASON_UNKNOWN

_FORMATS = tuple(
    Path(root) / "events/kvm/kvm_exit/format"
    for root in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
)
_PAIR = re.compile(r'\{\s*(-?(?:0x)?[0-9a-fA-F]+)(?:\s*\+\s*(\d+))?\s*,\s*"([^"]+)"\s*\}')


class ReasonNames:
    """Exit reasons by vendor: isa 1 is VMX, 2 is SVM."""

    def __init__(self, text: str = "") -> None:
        """Take the names from the text of the tracepoint's format; without it numbers are given."""
        vmx, _, rest = text.partition("__print_symbolic")[2].partition("__print_symbolic")
        self._names = {1: _pairs(vmx), 2: _pairs(rest.partition("__print_flags")[0])}

    @classmethod
    def live(cls) -> ReasonNames:
        """The running kernel's, where its tracefs is there."""
        for path in _FORMATS:
            try:
                return cls(path.read_text(encoding="ascii"))
            except OSError:
                continue
        return cls()

    def name(self, isa: int, reason: int) -> str:
        """The name of a reason, or its number in hexadecimal."""
        if reason == REASON_UNKNOWN:
            return "unknown"
        # A VMX reason carries flags above bit 15 (a failed entry is bit 31).
        return (
            self._names.get(isa, {}).get(reason & 0xFFFF if isa == 1 else reason) or f"{reason:#x}"
        )


def _pairs(text: str) -> dict[int, str]:
    return {
        (int(number, 0) + int(more or 0)) & 0xFFFFFFFF: name
        for number, more, name in _PAIR.findall(text)
    }
