# SPDX-License-Identifier: MIT
"""A look at the host with the probes awake for a moment: what can be attached, and who runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from kvmprobe.capture.plan import Row
from kvmprobe.capture.session import Filters, Session
from kvmprobe.errors import KvmprobeError
from kvmprobe.probes.schema import (
    SLOT_IDENTITY,
    SLOT_TSS,
    Flag,
    LifecycleChange,
    MemslotChange,
    Type,
)

#: Names of KVM's own memslots, as far as L2 may touch them.
SLOT_NAMES = {int(SLOT_TSS): "hidden TSS", int(SLOT_IDENTITY): "identity map"}


@dataclass
class SeenVm:
    """A VM that ran meanwhile: its process, its internal slots (name: gpa), whether an L2 ran."""

    pid: int
    slots: dict[str, int] = field(default_factory=dict)
    nested: bool = False


@dataclass(frozen=True)
class Sample:
    """What was attached, and the VMs that ran; `problem` says why nothing could be observed."""

    seconds: float
    plan: tuple[Row, ...]
    vms: tuple[SeenVm, ...]
    lost: int
    problem: str | None


def take_sample(seconds: float) -> Sample:
    """Attach every probe that this kernel allows, watch for `seconds`, and detach again."""
    plan: tuple[Row, ...] = ()
    vms: dict[int, SeenVm] = {}
    lost = 0
    try:
        with Session(Filters()) as session:
            session.prepare()
            session.attach()
            plan = tuple(session.plan.rows())
            end = time.monotonic() + seconds
            session.start()
            while time.monotonic() < end:
                time.sleep(session.tick)
                lost += _take(session.drain(), vms)
            lost += _take(session.stop(), vms)
    except KvmprobeError as error:
        return Sample(0.0, plan, (), 0, str(error))
    return Sample(seconds, plan, tuple(vms[number] for number in sorted(vms)), lost, None)


def _take(rows: NDArray[Any], vms: dict[int, SeenVm]) -> int:
    """Take in one drain's rows; the records lost before it."""
    kinds = rows["type"]
    for row in _rows(rows, (kinds == Type.LIFECYCLE) & (rows["kind"] == LifecycleChange.VM_SEEN)):
        vms[int(row["vm"])] = SeenVm(int(row["aux"]))
    for row in _rows(rows, kinds == Type.MEMSLOT):
        name = SLOT_NAMES.get(int(row["slot"]))
        vm = vms.get(int(row["vm"]))
        if name is None or vm is None:
            continue
        if row["kind"] in (MemslotChange.DELETED, MemslotChange.MOVED_FROM):
            vm.slots.pop(name, None)
        else:
            vm.slots[name] = int(row["addr"])
    for number in set(rows["vm"][(rows["flags"] & Flag.L2) != 0].tolist()) & set(vms):
        vms[number].nested = True
    return int(rows["addr"][kinds == Type.LOSS].sum())


def _rows(rows: NDArray[Any], mask: NDArray[Any]) -> Iterable[Any]:
    return rows[mask] if mask.any() else ()
