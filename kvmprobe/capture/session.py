# SPDX-License-Identifier: MIT
"""A session: the probes on this kernel, from the plan to the last record."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.vms import named
from kvmprobe.capture.layout import Layout, read_layout
from kvmprobe.capture.plan import METHODS, Method, Plan, make_plan
from kvmprobe.capture.program import (
    AttachError,
    Program,
    fentry_problem,
)
from kvmprobe.capture.ring import Ring
from kvmprobe.capture.source import VM_NUMBERS, program_text
from kvmprobe.host.bccload import load_bcc
from kvmprobe.host.btf import KernelBtf
from kvmprobe.host.facts import access
from kvmprobe.host.symbols import Symbols, kprobes_available
from kvmprobe.host.vms import vm_name
from kvmprobe.probes.schema import EVENT, NO_VCPU, Flag, LifecycleChange, LossCause, Site, Type

#: Bytes of the ring: a quarter of a second at a million events a second.
RING_BYTES = 16 << 20
#: Seconds between two drains at most.
MAX_TICK = 0.05
_MIN_TICK = 0.001
_RECURSION_SECONDS = 1.0
_NO_FILTER = 0xFFFFFFFF
_NO_CPU = 0xFFFFFFFF
_CANDIDATE = int(Flag.CANDIDATE)
_NOTHING = np.zeros(0, EVENT)


@dataclass(frozen=True)
class Filters:
    """What to record: one process, one vCPU id; None is all."""

    pid: int | None = None
    vm: str | None = None
    vcpu: int | None = None


class Session:
    """The probes, compiled, loaded and attached.

    `prepare()` compiles and loads; `attach()` attaches, with the programs asleep; `start()` wakes
    them.  Each `drain()` gives what came since; `stop()` detaches and gives the rest.  As a context
    manager it leaves nothing behind.
    """

    def __init__(
        self,
        filters: Filters,
        *,
        backend: str | None = None,
        kernel_headers: Path | None = None,
    ) -> None:
        self.filters = filters
        self._backend = backend
        self._kernel_headers = kernel_headers
        self._program: Program | None = None
        self._ring: Ring | None = None
        self._fentry_prefix = ""
        self._refused: dict[str, str] = {}
        self._next_vm = 1
        self._counted = np.zeros(0, "<u8")
        self._misses: dict[Type, int] = {}
        self._misses_read = 0.0
        self.tick = _MIN_TICK
        self._last_drain = 0.0
        self.received = 0
        self.plan: Plan
        self.layout: Layout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def prepare(self) -> None:
        """Plan, compile, and pass the kernel's verifier; what it refuses is planned anew without.

        Raises:
            HostError: this host can't be recorded; the message says why and what to do.

        """
        problem = access().problem()
        if problem is not None:
            raise problem
        self._bcc = load_bcc().module
        self._btf = KernelBtf.live()
        self._symbols = Symbols.live()
        self.layout = read_layout(self._btf)
        self._methods = self._find_methods()
        while True:
            self.plan = make_plan(self._btf, self._symbols, self._methods, self._refused)
            text = program_text(self.layout, self.plan, RING_BYTES // 4096, self._fentry_prefix)
            self._program = Program(self._bcc, text, self._kernel_headers)
            try:
                self._program.load(self.plan, self._fentry_prefix)
            except AttachError as error:
                self._retry_without(error)
            else:
                return

    def _find_methods(self) -> dict[Method, str | None]:
        """For each way to probe functions: None when it works here, else why not."""
        methods: dict[Method, str | None] = {}
        for method in METHODS:
            if self._backend not in (None, method):
                methods[method] = f"not asked for (--backend {self._backend})"
            elif method == "kprobe":
                methods[method] = None if kprobes_available() else "this kernel has no kprobes"
            elif None in methods.values():
                methods[method] = "not needed: kprobes work"
            else:
                function = self._btf.function("kvm_mmu_page_fault")
                module = function.module if function else "vmlinux"
                methods[method], self._fentry_prefix = fentry_problem(
                    self._bcc, module, "kvm_mmu_page_fault"
                )
        return methods

    def _retry_without(self, error: AttachError) -> None:
        if self._program is not None:
            self._program.close()
            self._program = None
        if error.target in self._refused:
            raise error
        self._refused[error.target] = error.reason

    def attach(self) -> None:
        """Attach everything, asleep; a target that can't be attached is left out and planned anew.

        Raises:
            HostError: what is left can't record.

        """
        while True:
            program = self._need()
            program.give_vm_numbers(self._next_vm, VM_NUMBERS)
            self._next_vm += VM_NUMBERS
            try:
                program.attach(self.plan, self._fentry_prefix)
            except AttachError as error:
                self._retry_without(error)
                self.prepare()
                continue
            self._ring = Ring(program.ring_fd(), RING_BYTES)
            self._counted = program.counters()
            return

    def start(self) -> None:
        """Begin to record."""
        sees = self.plan.function
        self._need().configure(
            on=1,
            tgid=self.filters.pid or 0,
            vcpu=_NO_FILTER if self.filters.vcpu is None else self.filters.vcpu,
            generation_by_diff=int(sees("memslots_updated") is None),
            fill_by_diff=int(sees("noslot") is None),
        )
        self._last_drain = time.monotonic()

    def drain(self) -> NDArray[Any]:
        """Take what came since the last drain: dtype `EVENT`, LOSS events of the period at its end.

        Also sets `tick`, the seconds until the next drain should come: a quarter of the time in
        which the ring would fill at the present rate.
        """
        ring, now = self._need_ring(), time.monotonic()
        pending = ring.pending()
        events = ring.read()
        self.received += len(events)
        rate = pending / max(now - self._last_drain, 1e-6)
        self.tick = max(_MIN_TICK, min(MAX_TICK, RING_BYTES / max(rate, 1.0) / 4))
        self._last_drain = now
        return np.concatenate([events, self._meet_vms(events), self._losses(now)])

    def _meet_vms(self, events: NDArray[Any]) -> NDArray[Any]:
        """Replace the numbers that new VMs took, and make the events that tell their names."""
        seen = events[
            (events["type"] == Type.LIFECYCLE) & (events["kind"] == LifecycleChange.VM_SEEN)
        ]
        if len(seen):
            self._need().give_vm_numbers(self._next_vm, len(seen))
            self._next_vm += len(seen)
        names = [
            named(int(vm["vm"]), int(vm["aux"]), name, int(vm["ts"]))
            for vm in seen
            if (name := vm_name(int(vm["aux"])))
        ]
        events = np.concatenate([_NOTHING, *names])
        events["flags"] = _CANDIDATE
        return events

    def _losses(self, now: float) -> NDArray[Any]:
        """LOSS events for what the counters say was lost since the last time."""
        program = self._need()
        counted = program.counters()
        lost = counted - self._counted
        self._counted = counted
        lost[:, 0, :] = 0
        rows = [
            (int(lost[cpu, cause, kind]), int(cpu), int(cause), int(kind))
            for cpu, cause, kind in np.argwhere(lost)
        ]
        if now - self._misses_read >= _RECURSION_SECONDS:
            self._misses_read = now
            rows += self._recursion_losses(program)
        events = np.zeros(len(rows), EVENT)
        for event, (records, cpu, cause, kind) in zip(events, rows, strict=True):
            event["ts"] = time.monotonic_ns()
            event["vcpu"] = NO_VCPU
            event["type"] = Type.LOSS
            event["site"] = Site.DRAIN
            event["flags"] = _CANDIDATE
            event["addr"] = records
            event["aux"] = cpu
            event["slot"] = -1
            event["kind"] = kind
            event["len"] = cause
        return events

    def _recursion_losses(self, program: Program) -> list[tuple[int, int, int, int]]:
        rows = []
        for observation, misses in program.recursion_misses().items():
            more = misses - self._misses.get(observation, 0)
            self._misses[observation] = misses
            if more:
                rows.append((more, _NO_CPU, int(LossCause.RECURSION), int(observation)))
        return rows

    def stop(self) -> NDArray[Any]:
        """Detach, and give the last events: the ring's, and MMIO records that still waited."""
        program = self._need()
        program.configure(on=0)
        program.detach()
        self._misses_read = 0.0
        rest = self.drain()
        waiting = np.frombuffer(b"".join(program.waiting_events()), EVENT).copy()
        waiting["ts"] = time.monotonic_ns()
        return np.concatenate([rest, waiting]) if len(waiting) else rest

    def sent(self) -> int:
        """Records the probes put into the ring, by their own count."""
        return int(self._need().counters()[:, 0, :].sum())

    def close(self) -> None:
        """Detach and free everything; safe to call at any time."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._program is not None:
            self._program.close()
            self._program = None

    def _need(self) -> Program:
        if self._program is None:
            raise RuntimeError("the session is not prepared")
        return self._program

    def _need_ring(self) -> Ring:
        if self._ring is None:
            raise RuntimeError("the session is not attached")
        return self._ring
