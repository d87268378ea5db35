# SPDX-License-Identifier: MIT
"""Which process each VM is, as far as LIFECYCLE events say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmprobe.probes.schema import Columns, LifecycleChange, Type


@dataclass(frozen=True)
class Vm:
    """A VM: its number in the capture, the name and the id of its process, None if not known."""

    id: int
    name: str | None
    pid: int | None


def printable(text: str) -> str:
    """Return `text` with everything escaped that a terminal could take for more than a letter."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class VmNames:
    """Collects the VMs of a stream."""

    def __init__(self) -> None:
        """Start with none known."""
        self._known: dict[int, Vm] = {}

    def feed(self, columns: Columns) -> None:
        """Take in one batch with `vm`, `type`, `kind`, `value`, `gen`, `aux`."""
        seen = columns["type"] == Type.LIFECYCLE
        if not seen.any():
            return
        seen = seen & (columns["kind"] == LifecycleChange.VM_SEEN)
        for i in np.flatnonzero(seen).tolist():
            halves = int(columns["value"][i]), int(columns["gen"][i])
            comm = b"".join(half.to_bytes(8, "little") for half in halves).split(b"\0")[0]
            vm = int(columns["vm"][i])
            name = printable(comm.decode("utf-8", "replace")) or None
            self._known[vm] = Vm(vm, name, int(columns["aux"][i]))

    def get(self, vm: int) -> Vm:
        """Return what is known of a VM."""
        return self._known.get(vm) or Vm(vm, None, None)
