# SPDX-License-Identifier: MIT
"""Counting in the kernel: the programs of probes/stat.bpf.c, and their maps read out."""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.vms import printable
from kvmprobe.capture.layout import Layout, read_layout
from kvmprobe.capture.program import AttachError, Program
from kvmprobe.errors import HostError
from kvmprobe.host.bccload import load_bcc
from kvmprobe.host.btf import KernelBtf
from kvmprobe.host.facts import access
from kvmprobe.host.vms import vm_name
from kvmprobe.probes.schema import HERE, NO_VCPU
from kvmprobe.stat.histogram import Times
from kvmprobe.stat.model import Counted, Key, Table, VmInfo, definitions, result_of

_FILES = ("events.h", "stat.h", "kernel.h", "stat.bpf.c")
_VM_NUMBERS = 4096
_VCPU = ("struct kvm_vcpu *",)
_UNSIGNED = ("unsigned int", "u32")
#: Tracepoint -> types of its first parameters, in the order of attaching: kvm_exit, which opens
#: what kvm_entry closes, comes last.
TRACEPOINTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "kvm_entry": (_VCPU,),
    "kvm_emulate_insn": (_VCPU, ("__u8", "u8")),
    "kvm_page_fault": (_VCPU, ("u64",), ("u64",)),
    "kvm_mmu_spte_requested": (("struct kvm_page_fault *",),),
    "kvm_fast_mmio": (("u64",),),
    "vcpu_match_mmio": (("gva_t",), ("gpa_t",), ("bool",), ("bool",)),
    "kvm_mmio": (("int",), ("int",), ("u64",)),
    "handle_mmio_page_fault": (("u64",), ("gfn_t",), ("unsigned int",)),
    "mark_mmio_spte": (("u64 *",), ("gfn_t",), ("u64",)),
    "check_mmio_spte": (("u64",), _UNSIGNED, _UNSIGNED),
    "kvm_exit": (_VCPU, ("u32",)),
}
#: Where a vendor keeps the reason of an exit: C name -> (structure, member), the first that is
#: there (6.1 and 6.12: exit_reason; 7.2: vt).  The vCPU lies at the structure's beginning.
_REASONS = {
    "OFF_VMX_REASON": (("vcpu_vmx", "exit_reason"), ("vcpu_vmx", "vt.exit_reason")),
    "OFF_SVM_VMCB": (("vcpu_svm", "vmcb"),),
    "OFF_VMCB_EXIT_CODE": (("vmcb", "control.exit_code"),),
}


def missing_tracepoints(btf: KernelBtf) -> dict[str, str]:
    """The tracepoints that this kernel lacks, or has with another prototype, and why."""
    missing = {}
    for name, signature in TRACEPOINTS.items():
        prototype = btf.tracepoint(name)
        if prototype is None:
            missing[name] = "no such tracepoint in BTF"
        elif len(prototype.parameters) < len(signature) or any(
            parameter.type not in types
            for parameter, types in zip(prototype.parameters, signature, strict=False)
        ):
            missing[name] = "another prototype"
    return missing


def exit_reason_layout(btf: KernelBtf) -> dict[str, int]:
    """Byte offsets, by C name, of an exit's reason; none for an unknown vendor."""
    found = {}
    for name, places in _REASONS.items():
        for structure, member in places:
            if btf.has_member(structure, member):
                found[name] = btf.member(structure, member).offset
                break
    return found


def program_text(layout: Layout, reasons: dict[str, int]) -> str:
    """The whole program as one text for BCC."""
    prelude = layout.defines() + definitions() + f"#define VM_NUMBERS {_VM_NUMBERS}\n"
    prelude += "".join(f"#define {name} {value}\n" for name, value in reasons.items())
    return prelude + "\n".join((HERE / name).read_text(encoding="utf-8") for name in _FILES)


class StatProgram(Program):
    """The compiled programs; a tracepoint that is refused is left out."""

    def __init__(self, bcc: ModuleType, text: str) -> None:
        super().__init__(bcc, text, None)
        self.refused: dict[str, str] = {}
        self._names: list[str] = []

    def load_tracepoints(self, names: list[str]) -> None:
        """Pass the programs through the kernel's verifier."""
        for name in names:
            try:
                self.load_one(f"tp_{name}", "raw_tracepoint", name)
            except AttachError as error:
                self.refused[name] = error.reason
            else:
                self._names.append(name)

    def attach_tracepoints(self) -> None:
        """Attach what was loaded."""
        for name in self._names:
            try:
                self._attach(f"tp_{name}", "raw_tracepoint", name)
            except AttachError as error:
                self.refused[name] = error.reason

    def read(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Keys and values of a hash map, in arrays of the C structures' dtypes.

        Raises:
            HostError: the kernel refused.

        """
        table = self._bpf[name.encode()]
        capacity = int(table.max_entries)
        keys = np.zeros(capacity, np.dtype(table.Key))
        values = np.zeros(capacity, np.dtype(table.Leaf))
        # One call for all: the kernel copies whole buckets, which never hold more than there is.
        position, n = ctypes.c_uint32(0), ctypes.c_uint32(capacity)
        failed = self._bcc.lib.bpf_lookup_batch(
            table.map_fd,
            None,
            ctypes.byref(position),
            ctypes.c_void_p(keys.ctypes.data),
            ctypes.c_void_p(values.ctypes.data),
            ctypes.byref(n),
        )
        if failed and n.value == capacity:  # left as it was: nothing was copied
            n.value = 0
        return keys[: n.value], values[: n.value]

    def per_cpu(self, name: str) -> NDArray[Any]:
        """The one value of a map that has it for each CPU; shape (CPUs,).

        Raises:
            HostError: the kernel refused.

        """
        table = self._bpf[name.encode()]
        values = np.zeros(self._cpus, np.dtype(table.sLeaf))
        key = ctypes.c_int(0)
        if self._bcc.lib.bpf_lookup_elem(
            table.map_fd, ctypes.byref(key), ctypes.c_void_p(values.ctypes.data)
        ):
            raise HostError("the counters can't be read")
        return values


class LiveStat:
    """Counts on this host, in the kernel, from `start()` to `stop()`.

    `counted()` gives the rows at any time.  As a context manager it leaves nothing behind.
    """

    def __init__(self, pid: int | None) -> None:
        """Count the VMs of one process, or of all (None)."""
        self._pid = pid
        self._program: StatProgram | None = None
        self._next_vm = 1 + _VM_NUMBERS
        self._vms: dict[int, VmInfo] = {}
        self._started = 0.0
        self._stopped: float | None = None
        self.notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Compile, load and attach, and begin to count.

        Raises:
            HostError: this host can't be counted on; the message says why and what to do.

        """
        problem = access().problem()
        if problem is not None:
            raise problem
        btf = KernelBtf.live()
        layout = read_layout(btf)
        self._step = layout.values["ADDRESS_SPACES"]
        reasons = exit_reason_layout(btf)
        missing = missing_tracepoints(btf)
        program = self._program = StatProgram(load_bcc().module, program_text(layout, reasons))
        program.load_tracepoints([name for name in TRACEPOINTS if name not in missing])
        program.configure(tgid=self._pid or 0)
        program.give_numbers("vm_numbers", 1, _VM_NUMBERS)
        program.attach_tracepoints()
        missing |= program.refused
        lacking = {"kvm_emulate_insn", "kvm_entry", "kvm_mmio"} & set(missing)
        if lacking:
            reason = "; ".join(f"{name}: {missing[name]}" for name in sorted(lacking))
            raise HostError(f"KVM's tracepoints can't be used: {reason}")
        self.notes += [f"{name} is not seen: {reason}" for name, reason in missing.items()]
        if not reasons:
            self.notes.append("the vendor of this KVM is not known: exits have no reason")
        program.configure(on=1)
        self._started = time.monotonic()

    def stop(self) -> None:
        """Stop counting; the rows stay readable."""
        program = self._need()
        program.configure(on=0)
        program.detach()
        self._stopped = time.monotonic()

    def close(self) -> None:
        """Detach and free everything; safe to call at any time."""
        if self._program is not None:
            self._program.close()
            self._program = None

    def counted(self) -> Counted:
        """All rows so far."""
        program = self._need()
        counted = Counted(seconds=(self._stopped or time.monotonic()) - self._started)
        counted.notes = list(self.notes)
        # Before the rows: what comes meanwhile must not look evicted.
        totals = program.per_cpu("totals")
        present = 0
        for name in ("rows", "pages"):
            keys, values = program.read(name)
            present += len(keys)
            for key, row in zip(keys, values, strict=True):
                counted.add(_key(key), int(row["count"]), _times(row))
        made = int((totals["rows_made"] + totals["pages_made"]).sum())
        counted.evicted_rows = max(0, made - present)
        if counted.evicted_rows:
            events = totals["events"].sum(axis=0)
            for table in Table:
                evicted = int(events[table]) - counted.total(table)
                if evicted > 0:
                    counted.evicted[table] = evicted
        counted.lost = int(totals["failed"].sum())
        self._add_threads(counted)
        counted.vms = self._meet_vms()
        return counted

    def _add_threads(self, counted: Counted) -> None:
        """Add what the vCPUs' threads still hold: of exits without their entry, and generations."""
        generations: dict[tuple[int, int], tuple[int, int]] = {}
        program = self._need()
        emulating: Counter[int] = Counter()
        for cpu in program.per_cpu("emulating"):
            emulating[int(cpu["pid_tgid"]) & 0xFFFFFFFF] += int(cpu["insns"])
        tids, threads = program.read("threads")
        for tid, thread in zip(tids.tolist(), threads, strict=True):
            vm, vcpu, level = int(thread["vm"]), int(thread["id"]), int(thread["level"])
            if not vm:
                continue
            for key in thread["pending"][: int(thread["n_pending"])]:
                counted.add(_key(key), int(key["n"]))
            if insns := int(thread["insns"]) + emulating[tid]:
                counted.add(Key(Table.EMULATE, vm, vcpu, level), insns)
            if thread["fault"]:
                result = result_of(int(thread["fault"]))
                counted.add(Key(Table.FAULT, vm, vcpu, level, a=result), 1)
            for space in range(self._step):
                if int(thread["gens_seen"]) >> space & 1:
                    first, last = int(thread["first_gen"][space]), int(thread["gen"][space])
                    before = generations.get((vm, space), (first, last))
                    generations[vm, space] = min(first, before[0]), max(last, before[1])
        for (vm, space), (first, last) in generations.items():
            if last > first:
                # Each activation adds the number of address spaces (kvm_swap_active_memslots()).
                key = Key(Table.GENERATION, vm, NO_VCPU, 0, a=space)
                counted.add(key, (last - first) // self._step)

    def _meet_vms(self) -> dict[int, VmInfo]:
        keys, values = self._need().read("vms")
        new = 0
        for key, value in zip(keys, values, strict=True):
            number, pid = int(value["vm"]), int(key["tgid"])
            if number and number not in self._vms:
                new += 1
                comm = bytes(value["comm"]).split(b"\0")[0].decode("utf-8", "replace")
                self._vms[number] = VmInfo(number, printable(vm_name(pid) or comm) or None, pid)
        if new:
            self._need().give_numbers("vm_numbers", self._next_vm, new)
            self._next_vm += new
        return dict(self._vms)

    def _need(self) -> StatProgram:
        if self._program is None:
            raise RuntimeError("not started")
        return self._program


def _key(key: np.void) -> Key:
    return Key(
        Table(int(key["table"])),
        int(key["vm"]),
        int(key["vcpu"]),
        int(key["level"]),
        int(key["what"]),
        int(key["a"]),
        int(key["slot"]),
    )


def _times(row: np.void) -> Times | None:
    if not row["timed"]:
        return None
    return Times(
        int(row["timed"]),
        int(row["total"]),
        int(row["min"]),
        int(row["max"]),
        row["histogram"].astype(np.int64),
    )
