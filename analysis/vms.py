# SPDX-License-Identifier: MIT
"""Which process each VM is and which thread each vCPU, as far as LIFECYCLE events say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import EVENT, NO_VCPU, Columns, LifecycleChange, Site, Type

#: Bytes of a name in one event, and events that a name may take.
_PART = 16
_PARTS = 16


@dataclass(frozen=True)
class Vm:
    """A VM: its number in the capture, its name and the id of its process, None if not known.

    The name is the one that the VMM was given (QEMU's -name) where that is known, and otherwise
    the process's.
    """

    id: int
    name: str | None
    pid: int | None


def printable(text: str) -> str:
    """Return `text` with everything escaped that a terminal could take for more than a letter."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def named(vm: int, pid: int, name: str, ts: int) -> NDArray[Any]:
    """Make the events that tell a VM's name: the drain puts them behind the VM's VM_SEEN.

    Args:
        vm: the VM's number, as in VM_SEEN.
        pid: its process, as in VM_SEEN.
        name: the VMM's name for it; what is beyond 256 bytes of UTF-8 is cut off.
        ts: the time of its VM_SEEN, ns.

    Returns:
        Rows of dtype `schema.EVENT`, 16 bytes of the name in each; none for an empty name.

    """
    data = name.encode("utf-8", "replace")[: _PART * _PARTS]
    rows = np.zeros(-(-len(data) // _PART), EVENT)
    rows["ts"], rows["vm"], rows["vcpu"], rows["aux"] = ts, vm, NO_VCPU, pid
    rows["type"], rows["site"], rows["slot"] = Type.LIFECYCLE, Site.DRAIN, -1
    rows["kind"], rows["len"] = LifecycleChange.VM_NAMED, np.arange(len(rows))
    padded = data.ljust(_PART * len(rows), b"\0")
    halves = np.frombuffer(padded, "<u8").reshape(-1, 2)
    rows["value"], rows["gen"] = halves[:, 0], halves[:, 1]
    return rows


class VmNames:
    """Collects the VMs of a stream, and their vCPUs' threads."""

    def __init__(self) -> None:
        """Start with none known."""
        self._known: dict[int, tuple[bytes, int]] = {}
        self._parts: dict[int, dict[int, bytes]] = {}
        self._threads: dict[int, dict[int, int]] = {}

    def feed(self, columns: Columns) -> None:
        """Take in one batch with `vm`, `vcpu`, `type`, `kind`, `value`, `gen`, `aux`, `len`."""
        lifecycle = columns["type"] == Type.LIFECYCLE
        if not lifecycle.any():
            return
        for i in np.flatnonzero(lifecycle).tolist():
            kind, vm, task = (int(columns[name][i]) for name in ("kind", "vm", "aux"))
            halves = int(columns["value"][i]), int(columns["gen"][i])
            text = b"".join(half.to_bytes(8, "little") for half in halves)
            if kind == LifecycleChange.VM_SEEN:
                self._known[vm] = text, task
            elif kind == LifecycleChange.VM_NAMED and int(columns["len"][i]) < _PARTS:
                self._parts.setdefault(vm, {})[int(columns["len"][i])] = text
            elif kind == LifecycleChange.VCPU_SEEN:
                self._threads.setdefault(vm, {})[int(columns["vcpu"][i])] = task

    def forget(self, vm: int) -> None:
        """Drop what is known of a VM."""
        self._known.pop(vm, None)
        self._parts.pop(vm, None)
        self._threads.pop(vm, None)

    def get(self, vm: int) -> Vm:
        """Return what is known of a VM."""
        comm, pid = self._known.get(vm, (b"", None))
        parts = self._parts.get(vm, {})
        # A name with a part missing (its event was lost) is no name.
        whole = sorted(parts) == list(range(len(parts)))
        given = b"".join(parts[n] for n in sorted(parts)) if whole else b""
        return Vm(vm, _text(given) or _text(comm), pid)

    def thread(self, vm: int, vcpu: int) -> int | None:
        """Return the thread that a vCPU was last seen to run in, or None."""
        return self._threads.get(vm, {}).get(vcpu)


def _text(data: bytes) -> str | None:
    return printable(data.split(b"\0")[0].decode("utf-8", "replace")) or None
