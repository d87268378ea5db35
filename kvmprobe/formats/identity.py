# SPDX-License-Identifier: MIT
"""Which vCPU a thread of a trace runs, and which VM that is.

Some events say their vCPU's number; a thread's other events belong to the vCPU it named last.  A VM
is a process (tgid) where the trace knows it.  Where it doesn't, a thread joins the VM with the
nearest thread number that has a name like its own and no vCPU of that number yet, or begins a
new one: VMMs start the threads of a VM one after the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.formats.records import Point
from kvmprobe.probes.schema import EVENT, NO_VCPU, LifecycleChange, Site, Type

#: More threads that run vCPUs, or vCPUs, are in no trace of one host.
MOST = 1 << 15
#: Thread numbers further apart than this aren't of one VM.
_NEAR = 512
_TID_BITS = np.uint64(24)
_TID = np.uint64((1 << 24) - 1)
_VCPU_MAX = 0xFFFE


class Births(NamedTuple):
    """LIFECYCLE events, and for each the row of the record that it comes before and its place."""

    events: NDArray[Any]
    row: NDArray[np.int64]
    place: NDArray[np.int64]


@dataclass
class _Vm:
    number: int
    comm: bytes
    tgid: int
    vcpus: dict[int, int] = field(default_factory=dict)  # number -> place
    tids: list[int] = field(default_factory=list)


class Identity:
    """Numbers the VMs and vCPUs of a trace; a vCPU's number here is its place."""

    def __init__(self) -> None:
        """Start with none known."""
        self._comms: dict[int, bytes] = {}
        self._vms: list[_Vm] = []
        self._by_tgid: dict[int, _Vm] = {}
        self._threads: dict[int, int] = {}  # tgid, tid and vCPU packed -> place
        self._running: dict[int, int] = {}  # tid -> place
        #: By place: the VM's number, and the vCPU's.
        self.vm = np.zeros(0, np.int64)
        self.number = np.zeros(0, np.int64)

    @property
    def count(self) -> int:
        """How many vCPUs are known."""
        return len(self.vm)

    def knows(self, tid: int) -> bool:
        """Whether a thread has named a vCPU."""
        return tid & int(_TID) in self._running

    def names(self, comms: dict[int, bytes]) -> None:
        """Take in the names of threads."""
        if len(self._comms) > MOST:
            self._comms = {tid: self._comms.get(tid, b"") for tid in self._running}
        self._comms.update(comms)

    def places(self, records: NDArray[Any]) -> tuple[NDArray[np.int64], Births]:
        """Say for each record which vCPU it belongs to; -1 for none.

        Raises:
            CaptureError: more vCPUs than a host can have.

        """
        births: list[tuple[np.void, int, int]] = []
        place = np.full(len(records), -1, np.int64)
        vcpu = records["vcpu"]
        says = np.flatnonzero((vcpu <= _VCPU_MAX) & (records["point"] != Point.LOST))
        tid = records["tid"].astype(np.uint64) & _TID
        if len(says):
            tgid = records["tgid"][says].astype(np.uint64) & _TID
            keys = tgid << np.uint64(40) | tid[says] << np.uint64(16) | vcpu[says]
            unique, first, which = np.unique(keys, return_index=True, return_inverse=True)
            known = np.zeros(len(unique), np.int64)
            for i in np.argsort(first).tolist():
                row = int(says[first[i]])
                known[i] = self._place(int(unique[i]), records[row], row, births)
            place[says] = known[which]
        self._inherit(records, tid, place)
        return place, _told(births)

    def meet(self, record: np.void) -> tuple[int, int, Births]:
        """Number the vCPU that one record names.

        Returns:
            Its key (tgid, tid and vCPU packed), its place, and what becomes known; rows are 0.

        Raises:
            CaptureError: more vCPUs than a host can have.

        """
        births: list[tuple[np.void, int, int]] = []
        tgid, tid = (int(record[name]) & int(_TID) for name in ("tgid", "tid"))
        key = tgid << 40 | tid << 16 | int(record["vcpu"])
        place = self._place(key, record, 0, births)
        self._running[tid] = place
        return key, place, _told(births)

    def _inherit(
        self, records: NDArray[Any], tid: NDArray[np.uint64], place: NDArray[np.int64]
    ) -> None:
        """Give each record without a vCPU the one that its thread named last."""
        tids, which = np.unique(tid, return_inverse=True)
        order = np.argsort(
            which.astype(np.uint16) if len(tids) <= 1 << 16 else which, kind="stable"
        )
        which = which[order]
        says = place[order] >= 0
        first = np.searchsorted(which, np.arange(len(tids)))
        newest = np.maximum.accumulate(np.where(says, np.arange(len(which)), -1))
        earlier = np.array([self._running.get(t, -1) for t in tids.tolist()], np.int64)
        found = np.where(newest >= first[which], place[order[newest]], earlier[which])
        last = np.append(first[1:], len(which)) - 1
        for t, at in zip(tids.tolist(), found[last].tolist(), strict=True):
            if at >= 0:
                self._running[t] = at
        found[records["point"][order] == Point.LOST] = -1
        place[order] = found

    def _place(
        self, key: int, record: np.void, row: int, births: list[tuple[np.void, int, int]]
    ) -> int:
        known = self._threads.get(key)
        if known is None:
            known = self._new(key, record, row, births)
            if len(self._threads) >= MOST:
                raise CaptureError(
                    f"more than {MOST} threads with vCPUs: this is no trace of one host"
                )
            self._threads[key] = known
        return known

    def _new(
        self, key: int, record: np.void, row: int, births: list[tuple[np.void, int, int]]
    ) -> int:
        tgid, tid, number = key >> 40, key >> 16 & 0xFFFFFF, key & 0xFFFF
        comm = self._comms.get(tid, b"")
        if tgid:
            vm = self._by_tgid.get(tgid) or self._adopt(tgid, tid)
        else:
            vm = self._nearest(tid, number, comm)
        if vm is None:
            vm = _Vm(len(self._vms) + 1, comm, tgid)
            self._vms.append(vm)
            births.append((_birth(record, vm, comm, tgid or tid, None), row, -1))
        if tgid:
            self._by_tgid[tgid] = vm
        vm.tids.append(tid)
        at = vm.vcpus.get(number)
        if at is None:
            at = vm.vcpus[number] = self.count
            self.vm = np.append(self.vm, vm.number)
            self.number = np.append(self.number, number)
            births.append((_birth(record, vm, comm, tid, number), row, at))
        return at

    def _adopt(self, tgid: int, tid: int) -> _Vm | None:
        """The VM of a thread that was met before its process became known."""
        for vm in self._vms:
            if not vm.tgid and tid in vm.tids:
                vm.tgid = tgid
                return vm
        return None

    def _nearest(self, tid: int, number: int, comm: bytes) -> _Vm | None:
        best, distance = None, _NEAR + 1
        kind = _kind(comm)
        for vm in self._vms:
            if tid in vm.tids:
                return vm
            if number in vm.vcpus or _kind(vm.comm) != kind:
                continue
            near = min(abs(tid - other) for other in vm.tids)
            if near < distance:
                best, distance = vm, near
        return best


def _told(births: list[tuple[np.void, int, int]]) -> Births:
    events = np.empty(len(births), EVENT)
    for i, (event, _, _) in enumerate(births):
        events[i] = event
    rows, places = (np.array([birth[i] for birth in births], np.int64) for i in (1, 2))
    return Births(events, rows, places)


def _kind(comm: bytes) -> bytes:
    """A name without its numbers."""
    return re.sub(rb"\d+", b"#", comm)


def _birth(record: np.void, vm: _Vm, comm: bytes, of: int, number: int | None) -> np.void:
    """The LIFECYCLE event of a VM, or of its vCPU `number`."""
    halves = np.frombuffer(comm[:16].ljust(16, b"\0"), "<u8")
    event = np.zeros(1, EVENT)
    event["ts"], event["vm"] = record["ts"], vm.number
    event["vcpu"] = NO_VCPU if number is None else number
    event["type"], event["site"] = Type.LIFECYCLE, Site.FIRST_SIGHT
    event["kind"] = LifecycleChange.VM_SEEN if number is None else LifecycleChange.VCPU_SEEN
    event["value"], event["gen"] = halves
    event["aux"] = of
    row: np.void = event[0]
    return row
