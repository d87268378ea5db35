# SPDX-License-Identifier: MIT
"""A session: the probes on this kernel, from the plan to the last record."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.candidates import candidates
from kvmprobe.analysis.vms import named
from kvmprobe.capture.descriptors import require_descriptors
from kvmprobe.capture.layout import Layout, read_layout
from kvmprobe.capture.plan import METHODS, Method, Plan, make_plan
from kvmprobe.capture.program import (
    AttachError,
    Program,
    fentry_problem,
)
from kvmprobe.capture.ring import Ring
from kvmprobe.capture.source import VM_NUMBERS, Options, program_text
from kvmprobe.errors import HostError
from kvmprobe.host.bccload import load_bcc
from kvmprobe.host.btf import KernelBtf
from kvmprobe.host.facts import access
from kvmprobe.host.memory import release_memory
from kvmprobe.host.symbols import Symbols, kprobes_available
from kvmprobe.host.vms import vm_name
from kvmprobe.probes.schema import (
    EVENT,
    NO_VCPU,
    Columns,
    Flag,
    LifecycleChange,
    LossCause,
    Site,
    Type,
    columns,
)

#: Bytes of the ring: a quarter of a second at a million events a second; one VM gets half of it.
RING_BYTES = 16 << 20
#: The same where candidates alone are shipped.  A service has it mapped, twice, as long as it runs.
WATCH_RING_BYTES = 2 << 20
#: Bytes of the reserve, into which candidates go when the ring has no room.
RESERVE_BYTES = 1 << 20
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
        watch: bool = False,
        flight: bool = False,
    ) -> None:
        """Say what to record; nothing is done yet.

        Args:
            filters: of which VMs.
            backend: probe functions by this method only; None: the best that works.
            kernel_headers: compile against this kernel source directory; None: kvmprobe's own.
            watch: ship only what rules and verdicts need (candidates): the findings are the same.
            flight: keep the last events of each vCPU in the kernel, shipped or not, for `flight()`.

        """
        self.filters = filters
        ring_bytes = WATCH_RING_BYTES if watch else RING_BYTES
        self._options = Options(ring_bytes, RESERVE_BYTES, watch, flight)
        self._backend = backend
        self._kernel_headers = kernel_headers
        self._program: Program | None = None
        self._ring: Ring | None = None
        self._reserve: Ring | None = None
        self._fentry_prefix = ""
        self._refused: dict[str, str] = {}
        self._next_vm, self._next_vcpu = 1, 0
        self._counted = np.zeros(0, "<u8")
        self._vm_lost: dict[tuple[int, int, int], int] = {}
        self._epoch = 0
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
        require_descriptors()
        with ThreadPoolExecutor(1) as beside:
            # The kernel takes as long to print its symbols as Python to parse BTF.
            symbols = beside.submit(Symbols.live)
            self._bcc = load_bcc().module
            self._btf = KernelBtf.live()
            self.layout = read_layout(self._btf)
            self._symbols = symbols.result()
        self._methods = self._find_methods()
        while True:
            self.plan = make_plan(self._btf, self._symbols, self._methods, self._refused)
            text = program_text(self.layout, self.plan, self._options, self._fentry_prefix)
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
        if error.target in self._refused or not error.only_this:
            raise error
        self._refused[error.target] = error.reason

    def attach(self) -> None:
        """Attach everything, asleep; a target that can't be attached is left out and planned anew.

        Raises:
            HostError: what is left can't record.

        """
        while True:
            program = self._need()
            program.give_numbers("vm_numbers", self._next_vm, VM_NUMBERS)
            program.give_numbers("vcpu_numbers", self._next_vcpu, VM_NUMBERS)
            self._next_vm += VM_NUMBERS
            self._next_vcpu += VM_NUMBERS
            try:
                program.attach(self.plan, self._fentry_prefix)
            except AttachError as error:
                self._retry_without(error)
                self.prepare()
                continue
            self._ring = Ring(program.ring_fd("events"), self._options.ring_bytes)
            self._reserve = Ring(program.ring_fd("reserve"), self._options.reserve_bytes)
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
            vm_by_clock=int(sees("vm_destroy") is None),
        )
        self._last_drain = time.monotonic()

    def drain(self) -> NDArray[Any]:
        """Take what came since the last drain: dtype `EVENT`, LOSS events of the period at its end.

        Also sets `tick`, the seconds until the next drain should come: a quarter of the time in
        which one VM's half of the ring would be full at the present rate.
        """
        ring, reserve, now = *self._need_rings(), time.monotonic()
        # The reserve first: what a vCPU put there is later than what it put into the ring before,
        # and is seen not later than what it puts into the ring after the next epoch begins.
        kept = reserve.read()
        pending = ring.pending()
        events = ring.read()
        if len(kept):
            events = np.concatenate([kept, events])
            events = events[np.argsort(events["ts"], kind="stable")]
        if len(events):
            self._epoch += 1
            self._need().configure(epoch=self._epoch & 0xFFFFFFFF)
        self.received += len(events)
        rate = pending / max(now - self._last_drain, 1e-6)
        half = self._options.ring_bytes / 2
        self.tick = max(_MIN_TICK, min(MAX_TICK, half / max(rate, 1.0) / 4))
        self._last_drain = now
        return np.concatenate([events, self._meet_vms(events), self._losses(events, now)])

    def _meet_vms(self, events: NDArray[Any]) -> NDArray[Any]:
        """Replace the numbers that new VMs and vCPUs took; make the events that tell names."""
        lifecycle = events[events["type"] == Type.LIFECYCLE]
        seen = lifecycle[lifecycle["kind"] == LifecycleChange.VM_SEEN]
        if len(seen):
            self._need().give_numbers("vm_numbers", self._next_vm, len(seen))
            self._next_vm += len(seen)
        vcpus = int(np.count_nonzero(lifecycle["kind"] == LifecycleChange.VCPU_SEEN))
        if vcpus:
            self._need().give_numbers("vcpu_numbers", self._next_vcpu, vcpus)
            self._next_vcpu += vcpus
        names = [
            named(int(vm["vm"]), int(vm["aux"]), name, int(vm["ts"]))
            for vm in seen
            if (name := vm_name(int(vm["aux"])))
        ]
        events = np.concatenate([_NOTHING, *names])
        events["flags"] = _CANDIDATE
        return events

    def _losses(self, drained: NDArray[Any], now: float) -> NDArray[Any]:
        """LOSS events for what the counters say was lost since the last time."""
        program = self._need()
        counted = program.counters()
        lost = counted - self._counted
        self._counted = counted
        of_vms = int(lost[:, 0, 0].sum())
        lost[:, 0, :] = 0
        rows = [
            (int(lost[cpu, cause, kind]), int(cpu), int(cause), int(kind), 0)
            for cpu, cause, kind in np.argwhere(lost)
        ]
        if of_vms:
            rows += self._losses_of_vms(program)
        self._forget_vms(program, drained)
        if now - self._misses_read >= _RECURSION_SECONDS:
            self._misses_read = now
            rows += self._recursion_losses(program)
        events = np.zeros(len(rows), EVENT)
        for event, (records, cpu, cause, kind, vm) in zip(events, rows, strict=True):
            event["ts"] = time.monotonic_ns()
            event["vm"] = vm
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

    def _losses_of_vms(self, program: Program) -> list[tuple[int, int, int, int, int]]:
        rows = []
        for key, records in program.vm_losses().items():
            more = records - self._vm_lost.get(key, 0)
            self._vm_lost[key] = records
            if more:
                vm, cause, kind = key
                rows.append((more, _NO_CPU, cause, kind, vm))
        return rows

    def _forget_vms(self, program: Program, drained: NDArray[Any]) -> None:
        """Make room for the losses of other VMs when some are gone."""
        if not self._vm_lost:
            return
        ended = drained[
            (drained["type"] == Type.LIFECYCLE) & (drained["kind"] == LifecycleChange.VM_GONE)
        ]
        vms = set(ended["vm"].tolist()) & {vm for vm, _, _ in self._vm_lost}
        if vms:
            program.forget_vm_losses(vms)
            self._vm_lost = {k: n for k, n in self._vm_lost.items() if k[0] not in vms}

    def _recursion_losses(self, program: Program) -> list[tuple[int, int, int, int, int]]:
        rows = []
        for observation, misses in program.recursion_misses().items():
            more = misses - self._misses.get(observation, 0)
            self._misses[observation] = misses
            if more:
                rows.append((more, _NO_CPU, int(LossCause.RECURSION), int(observation), 0))
        return rows

    def stop(self) -> NDArray[Any]:
        """Detach, and give the last events: the rings', and those that were still held."""
        program = self._need()
        program.configure(on=0)
        program.detach()
        self._misses_read = 0.0
        rest = self.drain()
        held = program.held_events()
        held["ts"] = time.monotonic_ns()
        decisive = candidates(columns(held))
        held["flags"][decisive] |= np.uint32(_CANDIDATE)
        if self._options.watch:
            held = held[decisive]
        return np.concatenate([rest, held]) if len(held) else rest

    def sent(self) -> int:
        """Records the probes put into the rings, by their own count."""
        return int(self._need().counters()[:, 0, 1:].sum())

    def run_times(self) -> dict[str, tuple[int, int]]:
        """For each program ns and runs, as far as the kernel counted (kernel.bpf_stats_enabled)."""
        return self._need().run_times()

    def flight(self) -> Columns:
        """The last events of each vCPU, shipped or not: columns sorted by (vm, vcpu, seq).

        `seq` counts the events of the flight recorder, where none is left out; `ts` is that of the
        same event in the stream.  The events of a VM, which belong to no vCPU, come first.

        Raises:
            HostError: the session was made without `flight`.

        """
        if not self._options.flight:
            raise HostError("there is no flight recorder: the session was made without")
        events = self._need().flight()
        vcpu = (events["vcpu"].astype(np.int64) + 1) & 0xFFFF
        return columns(events[np.lexsort((events["seq"], events["ts"], vcpu, events["vm"]))])

    def release_compiler(self) -> None:
        """Give back what LLVM and the reading of BTF took: freed heap, pages of libraries.

        After `attach()`.  What is touched again is read again.
        """
        for name in ("_btf", "_symbols"):
            self.__dict__.pop(name, None)
        release_memory(("libLLVM", "libclang", "libbcc", "libz3", "libcrypto"))

    def close(self) -> None:
        """Detach and free everything; safe to call at any time."""
        for ring in (self._ring, self._reserve):
            if ring is not None:
                ring.close()
        self._ring = self._reserve = None
        if self._program is not None:
            self._program.close()
            self._program = None

    def _need(self) -> Program:
        if self._program is None:
            raise RuntimeError("the session is not prepared")
        return self._program

    def _need_rings(self) -> tuple[Ring, Ring]:
        if self._ring is None or self._reserve is None:
            raise RuntimeError("the session is not attached")
        return self._ring, self._reserve
