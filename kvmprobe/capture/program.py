# SPDX-License-Identifier: MIT
"""The compiled program: loading, attaching and detaching through BCC, and its maps."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.capture.descriptors import EXHAUSTED
from kvmprobe.capture.plan import Attachment, Plan
from kvmprobe.capture.points import FunctionPoint
from kvmprobe.capture.source import fentry_name
from kvmprobe.errors import HostError
from kvmprobe.host.bpf import tracing_problem
from kvmprobe.host.headers import header_directory
from kvmprobe.probes.schema import EVENT, Site, Type

#: Programs that arrive() at a vCPU, and the site by which introduce() calls each again.
_ARRIVING = {
    "tp_kvm_emulate_insn": int(Site.EMULATE_INSN),
    "tp_kvm_entry": int(Site.ENTRY),
    "tp_kvm_page_fault": int(Site.PAGE_FAULT_TP),
    "kprobe_fault_entry": int(Site.PAGE_FAULT),
}
#: Nobody reads debug information, and without it LLVM is done a third sooner.  clang's own passes
#: stay: without them the verifier refuses the flight recorder's programs.
_FLAGS = ["-g0"]
#: struct counters of probes/state.h: causes by observations.
COUNTERS = (7, 16)


class AttachError(HostError):
    """One target can't be loaded or attached; the plan goes on without it, if `only_this`."""

    def __init__(self, target: str, reason: str, *, only_this: bool = True) -> None:
        super().__init__(f"{target}: {reason}")
        self.target = target
        self.reason = reason
        self.only_this = only_this


class Program:
    """A compiled program, from compilation to clean-up."""

    def __init__(self, bcc: ModuleType, text: str, kernel_headers: Path | None) -> None:
        """Compile.

        Raises:
            HostError: BCC or the kernel refused; the first line of what it said is in the message.

        """
        self._bcc = bcc
        self._bpf: Any = None
        self._loaded: dict[str, Attachment] = {}
        self._attached: list[tuple[str, str, str]] = []
        self._config: Any = None
        with compiler_headers(kernel_headers), captured_stderr() as said:
            try:
                self._bpf = _bpf_class(bcc)(text=text.encode(), cflags=_FLAGS)
            except Exception as error:
                raise HostError(
                    f"the probes can't be compiled: {_first_line(said(), error)}"
                ) from None
        self._cpus = len(bcc.utils.get_possible_cpus())
        self._counters = np.zeros((self._cpus, *COUNTERS), "<u8")

    def load(self, plan: Plan, fentry_prefix: str) -> None:
        """Load all programs of the plan, through the kernel's verifier.

        Raises:
            AttachError: the kernel refused one.

        """
        for attachment in plan.active():
            for name, kind in _programs(attachment, fentry_prefix):
                self.load_one(name, kind, attachment.target)
                self._loaded[name] = attachment
        self._link("tp", "raw_tracepoint")
        if any(a.method == "kprobe" for a in plan.active()):
            self._link("kprobe", "kprobe")

    def _link(self, prefix: str, kind: str) -> None:
        """Fill the tail-call tables of probes/vcpu.h: to introduce(), and back by site."""
        introduce = self.load_one(f"{prefix}_introduce", kind, "introduce")
        self._bpf[f"introduce_{prefix}".encode()][ctypes.c_int(0)] = ctypes.c_int(introduce)
        for program, site in _ARRIVING.items():
            if program in self._loaded and program.startswith(prefix):
                fd = self._bpf.funcs[program.encode()].fd
                self._bpf[f"again_{prefix}".encode()][ctypes.c_int(site)] = ctypes.c_int(fd)

    def attach(self, plan: Plan, fentry_prefix: str) -> None:
        """Attach all programs of the plan, tracepoints last.

        Raises:
            AttachError: one could not be attached; what was attached before still is: call close().

        """
        for attachment in plan.active():
            for name, kind in _programs(attachment, fentry_prefix):
                self._attach(name, kind, attachment.target)

    def load_one(self, name: str, kind: str, target: str) -> int:
        """Load one program and return its descriptor.

        Raises:
            AttachError: the kernel refused it.

        """
        bpf = self._bcc.BPF
        kinds = {
            "kprobe": bpf.KPROBE,
            "kretprobe": bpf.KPROBE,
            "kfunc": getattr(bpf, "TRACING", None),
            "kretfunc": getattr(bpf, "TRACING", None),
            "raw_tracepoint": bpf.RAW_TRACEPOINT,
        }
        with _one_target(target, "refused"):
            return int(self._bpf.load_func(name.encode(), kinds[kind]).fd)

    def _attach(self, name: str, kind: str, target: str) -> None:
        function, event = name.encode(), target.encode()
        with _one_target(target, "not attached"):
            if kind == "kprobe":
                self._bpf.attach_kprobe(event=event, fn_name=function)
            elif kind == "kretprobe":
                self._bpf.attach_kretprobe(event=event, fn_name=function)
            elif kind == "kfunc":
                self._bpf.attach_kfunc(fn_name=function)
            elif kind == "kretfunc":
                self._bpf.attach_kretfunc(fn_name=function)
            else:
                self._bpf.attach_raw_tracepoint(tp=event, fn_name=function)
        self._attached.append((name, kind, target))

    def detach(self) -> None:
        """Detach everything, in reverse order; the maps stay readable."""
        for name, kind, target in reversed(self._attached):
            function, event = name.encode(), target.encode()
            if kind == "kprobe":
                self._bpf.detach_kprobe(event)
            elif kind == "kretprobe":
                self._bpf.detach_kretprobe(event)
            elif kind == "kfunc":
                self._bpf.detach_kfunc(fn_name=function)
            elif kind == "kretfunc":
                self._bpf.detach_kretfunc(fn_name=function)
            else:
                self._bpf.detach_raw_tracepoint(event)
        self._attached = []

    def close(self) -> None:
        """Detach and free everything."""
        if self._bpf is not None:
            self.detach()
            self._bpf.cleanup()
            self._bpf = None

    def ring_fd(self, name: str) -> int:
        """The descriptor of the ring buffer map "events" or "reserve"."""
        return int(self._bpf[name.encode()].map_fd)

    def configure(self, **values: int) -> None:
        """Set the fields of struct config; what is not named keeps its value."""
        table = self._bpf[b"config"]
        if self._config is None:
            self._config = table.Leaf()
        for name, value in values.items():
            setattr(self._config, name, value)
        table[table.Key(0)] = self._config

    def give_numbers(self, queue_of: str, first: int, n: int) -> None:
        """Put n numbers, from `first`, into the queue "vm_numbers" or "vcpu_numbers"."""
        queue = self._bpf[queue_of.encode()]
        for number in range(first, first + n):
            queue.push(ctypes.c_uint32(number))

    def counters(self) -> NDArray[np.uint64]:
        """The counters so far: shape (CPUs, causes, observations); cause 0 is what was sent."""
        key = ctypes.c_int(0)
        if self._bcc.lib.bpf_lookup_elem(
            self._bpf[b"counters"].map_fd,
            ctypes.byref(key),
            ctypes.c_void_p(self._counters.ctypes.data),
        ):
            raise HostError("the probes' counters can't be read")
        return self._counters.copy()

    def vm_losses(self) -> dict[tuple[int, int, int], int]:
        """Records lost so far that are known to be one VM's, by (VM, cause, observation)."""
        return {
            (int(key.vm), *divmod(int(key.counter), COUNTERS[1])): int(n.value)
            for key, n in self._bpf[b"vm_losses"].items()
        }

    def forget_vm_losses(self, vms: Iterable[int]) -> None:
        """Make room in the table of losses: these VMs are gone and their losses were told."""
        table = self._bpf[b"vm_losses"]
        gone = set(vms)
        for key in [key for key in table if key.vm in gone]:
            del table[key]

    def held_events(self) -> NDArray[Any]:
        """Events that are still held for what may follow them: dtype `EVENT`."""
        held = np.zeros(0, EVENT)
        states = self._bpf[b"states"]
        for place in self._bpf[b"vcpus"].values():
            state = states[states.Key(place.value)]
            if state.vcpu and state.holds:
                row = np.frombuffer(bytes(state.held), EVENT).copy()
                row["seq"] = state.seq
                held = np.concatenate([held, row])
        return held

    def flight(self) -> NDArray[Any]:
        """The flight recorder's events of all vCPUs: dtype `EVENT`, each vCPU's in order.

        A program may overwrite the oldest while they are read: the second reading says how far it
        has come, and what it may have touched is left out.
        """
        table = self._bpf[b"flights"]
        kept = [np.zeros(0, EVENT)]
        for key in table:
            try:
                flight, after = table[key], table[key].n
            except KeyError:  # evicted meanwhile
                continue
            events = np.frombuffer(bytes(flight.events), EVENT)
            first = max(0, after + 1 - len(events))
            kept.append(events[np.arange(first, flight.n) % len(events)])
        return np.concatenate(kept)

    def recursion_misses(self) -> dict[Type, int]:
        """How often the kernel skipped a program because another ran on its CPU."""
        misses: dict[Type, int] = {}
        for name, attachment in self._loaded.items():
            info = _fdinfo(self._bpf.funcs[name.encode()].fd)
            if "recursion_misses" in info and attachment.point.sees:
                observation = attachment.point.sees[0][0]
                misses[observation] = misses.get(observation, 0) + int(info["recursion_misses"])
        return misses

    def run_times(self) -> dict[str, tuple[int, int]]:
        """For each program ns and runs, while kernel.bpf_stats_enabled was 1."""
        times = {}
        for name in self._loaded:
            info = _fdinfo(self._bpf.funcs[name.encode()].fd)
            times[name] = int(info["run_time_ns"]), int(info["run_cnt"])
        return times


def _fdinfo(fd: int) -> dict[str, str]:
    """What the kernel says of a descriptor of this process, by name."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii")
    return dict(re.findall(r"^(\w+):\s+(\S+)$", text, re.MULTILINE))


def fentry_problem(bcc: ModuleType, module: str, function: str) -> tuple[str | None, str]:
    """Try to load an empty fentry program on `function` of `module`.

    Returns why it can't be done (None: it can), and the prefix that this BCC wants in names: since
    0.29 the module's, before that none, and then functions of modules can't be reached.
    """
    problem = tracing_problem()
    if problem is not None:
        return problem, ""
    if not hasattr(bcc.BPF, "TRACING"):
        return "this BCC does not know it", ""
    prefixes = (f"{module}__", "")
    names = [fentry_name("kfunc", prefix, function) for prefix in prefixes]
    text = "".join(
        f"int {name}(struct bpf_raw_tracepoint_args *ctx) {{ return 0; }}\n" for name in names
    )
    program = Program(bcc, text, None)
    try:
        for name, prefix in zip(names, prefixes, strict=True):
            try:
                program.load_one(name, "kfunc", function)
            except AttachError as error:
                problem = error.reason
            else:
                return None, prefix
    finally:
        program.close()
    return problem, ""


def _programs(attachment: Attachment, fentry_prefix: str) -> list[tuple[str, str]]:
    """Name in the C and kind of each of an attachment's programs, in the order of attaching.

    The exit comes first, so that no entry is seen whose exit can't be.
    """
    point, target = attachment.point, attachment.target
    if not isinstance(point, FunctionPoint):
        return [(f"tp_{target}", "raw_tracepoint")]
    if attachment.method == "fentry":
        pairs = [
            (fentry_name("kretfunc", fentry_prefix, target), "kretfunc"),
            (fentry_name("kfunc", fentry_prefix, target), "kfunc"),
        ]
    elif point.has_exit:
        pairs = [
            (f"kprobe_{point.role}_exit", "kretprobe"),
            (f"kprobe_{point.role}_entry", "kprobe"),
        ]
    else:
        pairs = [("", ""), (f"kprobe_{point.role}", "kprobe")]
    return pairs if point.has_exit else pairs[1:]


def _bpf_class(bcc: ModuleType) -> Any:  # noqa: ANN401 - BCC has no types
    class Bpf(bcc.BPF):  # type: ignore[misc, name-defined]
        """BCC without its habit of attaching programs by their names while compiling."""

        def _trace_autoload(self) -> None:
            pass

    return Bpf


@contextmanager
def compiler_headers(kernel_headers: Path | None) -> Iterator[None]:
    """Point BCC at kernel headers: the user's, or the generated ones."""
    before = os.environ.get("BCC_KERNEL_SOURCE")
    with header_directory() as generated:
        os.environ["BCC_KERNEL_SOURCE"] = str(kernel_headers or generated)
        try:
            yield
        finally:
            if before is None:
                del os.environ["BCC_KERNEL_SOURCE"]
            else:
                os.environ["BCC_KERNEL_SOURCE"] = before


@contextmanager
def captured_stderr() -> Iterator[Any]:
    """Catch what C libraries write to descriptor 2; yields a function that gives it as text.

    clang and libbpf print their complaints there; a reason belongs into one line of ours.
    """
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def _one_target(target: str, what: str) -> Iterator[None]:
    """Make what BCC raises an AttachError of the target, in one line."""
    with captured_stderr() as said:
        ctypes.set_errno(0)
        try:
            yield
        except Exception as error:
            only_this = ctypes.get_errno() not in EXHAUSTED
            reason = f"{what}: {_first_line(said(), error)}"
            raise AttachError(target, reason, only_this=only_this) from None


def _first_line(said: str, error: Exception) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for line in lines:
        if "error:" in line or "Failed" in line:
            return line
    return lines[0] if lines else str(error)
