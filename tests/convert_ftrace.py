# SPDX-License-Identifier: MIT
"""Makes the golden captures from ftrace text: python -m tests.convert_ftrace (developers only).

An ftrace text holds tracepoints alone: no memslots, no generations, and a level only after the
first nested event.  What it doesn't hold stays unknown in the capture.  Where the VMM put KVM's own
slots is presumed and flagged so.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import (
    EVENT,
    NO_VCPU,
    SLOT_IDENTITY,
    SLOT_TSS,
    FaultinResult,
    Flag,
    LifecycleChange,
    MmioType,
    Site,
    SpteChange,
    Type,
)
from kvmprobe.store.format import new_header
from kvmprobe.store.writer import CaptureWriter

GOLDEN = Path(__file__).parent / "data" / "golden"
#: The captures: name -> release and package version of the kernel they were recorded on.
CAPTURES = {
    "intel-6.1-tss": ("6.1.0-56-amd64", "6.1.192-2"),
    "intel-6.12-tss": ("6.12.107+deb13-amd64", "6.12.107-1"),
}

#: Where this VMM put KVM's slots: id, first byte, pages.
_SLOTS = ((SLOT_TSS, 0xFFFBD000, 3), (SLOT_IDENTITY, 0xFFFBC000, 1))
_LINE = re.compile(r"\s*(.+)-(\d+)\s+\[\d+\] \S+\s+(\d+)\.(\d{6}): (\w+): (.*)")
_MMIO_TYPES = {
    "unsatisfied-read": MmioType.UNSATISFIED_READ,
    "read": MmioType.READ,
    "write": MmioType.WRITE,
}
_SEES = (
    (Type.FAULT, Site.PAGE_FAULT_TP, "kvm_page_fault"),
    (Type.FAULTIN, Site.SPTE_REQUESTED, "kvm_mmu_spte_requested"),
    (Type.FILL, Site.MARK_MMIO_SPTE, "mark_mmio_spte"),
    (Type.FILL, Site.MMIO_SPTE, "handle_mmio_page_fault"),
    (Type.MATCH, Site.MATCH_MMIO, "vcpu_match_mmio"),
    (Type.MMIO, Site.MMIO, "kvm_mmio"),
    (Type.EMULATE, Site.EMULATE_INSN, "kvm_emulate_insn"),
    (Type.SPTE, Site.MARK_MMIO_SPTE, "mark_mmio_spte"),
    (Type.NESTING, Site.NESTED_TP, "kvm_nested_vmenter"),
)
_BLIND = (
    (Type.CACHE, "the MMIO cache is in no tracepoint"),
    (Type.MEMSLOT, "memslots are in no tracepoint"),
    (Type.GENERATION, "generations are in no tracepoint"),
)


class _Vcpu:
    """One vCPU of the trace: what is known of it, and its next sequence number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seq = 0
        self.level = Flag(0)
        self.matched = False
        self.read_waits = False
        self.mmio: dict[str, Any] | None = None


class _Converter:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.vcpus: dict[int, _Vcpu] = {}  # by vcpu_id
        self.running: dict[int, _Vcpu] = {}  # by thread

    def line(self, comm: str, tid: int, ts: int, name: str, text: str) -> None:
        if (m := re.match(r"vcpu (\d+)\b", text)) is not None:
            self._runs(comm, tid, ts, int(m[1]))
        vcpu = self.running.get(tid)
        convert = getattr(self, f"_{name}", None)
        if vcpu is not None and convert is not None:
            convert(vcpu, ts, text)

    def _runs(self, comm: str, tid: int, ts: int, number: int) -> None:
        vcpu = self.vcpus.get(number)
        if vcpu is None:
            vcpu = self.vcpus[number] = _Vcpu(number)
            halves = np.frombuffer(comm.encode()[:16].ljust(16, b"\0"), "<u8").tolist()
            seen: dict[str, Any] = {"value": halves[0], "gen": halves[1], "aux": tid}
            if len(self.vcpus) == 1:
                self._put(None, ts, Type.LIFECYCLE, Site.FIRST_SIGHT, kind=1, **seen)
            kind = LifecycleChange.VCPU_SEEN
            self._put(vcpu, ts, Type.LIFECYCLE, Site.FIRST_SIGHT, kind=kind, **seen)
        self.running[tid] = vcpu

    def _put(
        self,
        vcpu: _Vcpu | None,
        ts: int,
        kind_of: Type,
        site: Site,
        **fields: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        flags = fields.pop("flags", Flag(0))
        event: dict[str, Any] = {"ts": ts, "vm": 1, "type": kind_of, "site": site, "slot": 0}
        event |= {"vcpu": NO_VCPU, "seq": 0}
        if vcpu is not None:
            event |= {"vcpu": vcpu.number, "seq": vcpu.seq}
            vcpu.seq += 1
            flags |= vcpu.level
        self.events.append(event | fields | {"flags": flags})
        return self.events[-1]

    @staticmethod
    def _at(addr: int) -> dict[str, Any]:
        """The address and the slot presumed there."""
        for slot, base, pages in _SLOTS:
            if base <= addr < base + pages * 4096:
                return {"addr": addr, "slot": slot, "flags": Flag.SLOT_PRESUMED}
        return {"addr": addr, "slot": -1}

    def _kvm_page_fault(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        m = _match(r".* address 0x(\w+) error_code 0x(\w+)", text)
        addr, error = int(m[1], 16), int(m[2], 16)
        self._put(vcpu, ts, Type.FAULT, Site.PAGE_FAULT_TP, addr=addr, value=error)

    def _kvm_mmu_spte_requested(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        m = _match(r"gfn (\w+) pfn (\w+) level", text)
        noslot = int(m[2], 16) >> 63
        kind = FaultinResult.NOSLOT if noslot else FaultinResult.KEPT
        at = self._at(int(m[1], 16) << 12)
        for slot, base, pages in _SLOTS:
            if at["slot"] == slot:
                at |= {"value": base, "gen": pages}
        self._put(vcpu, ts, Type.FAULTIN, Site.SPTE_REQUESTED, kind=kind, **at)

    def _mark_mmio_spte(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        m = _match(r"sptep:\S+ gfn (\w+) access (\w+) gen", text)
        addr, access = int(m[1], 16) << 12, int(m[2], 16)
        kind = SpteChange.MARKED
        self._put(vcpu, ts, Type.SPTE, Site.MARK_MMIO_SPTE, addr=addr, slot=-1, kind=kind)
        self._put(vcpu, ts, Type.FILL, Site.MARK_MMIO_SPTE, kind=access, **self._at(addr))

    def _handle_mmio_page_fault(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        m = _match(r"addr:\w+ gfn (\w+) access (\w+)", text)
        at = self._at(int(m[1], 16) << 12)
        self._put(vcpu, ts, Type.FILL, Site.MMIO_SPTE, kind=int(m[2], 16), **at)

    def _kvm_emulate_insn(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        m = _match(r"\w+:(\w+):((?:\w\w ?)+) \(\w+\)( failed)?", text)
        opcode = bytes.fromhex(m[2])[:4].ljust(4, b"\0")
        flags = Flag.FAILED if m[3] else Flag(0)
        vcpu.matched = False
        self._put(
            vcpu, ts, Type.EMULATE, Site.EMULATE_INSN,
            addr=int(m[1], 16), value=int.from_bytes(opcode, "little"), flags=flags,
        )  # fmt: skip

    def _vcpu_match_mmio(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        m = _match(r"gva 0x(\w+) gpa 0x(\w+) (Read|Write) (GPA|GVA)", text)
        at = self._at(int(m[2], 16))
        flags = at.pop("flags", Flag(0))
        flags |= Flag.WRITE if m[3] == "Write" else Flag(0)
        flags |= Flag.BY_GPA if m[4] == "GPA" else Flag(0)
        vcpu.matched = True
        value = int(m[1], 16)
        self._put(vcpu, ts, Type.MATCH, Site.MATCH_MMIO, value=value, flags=flags, **at)

    def _kvm_mmio(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        m = _match(r"mmio (\S+) len (\d+) gpa 0x(\w+) val", text)
        kind = _MMIO_TYPES[m[1]]
        if kind == MmioType.READ and vcpu.read_waits:
            vcpu.read_waits = False  # the VMM's answer to the access already told
            return
        at = self._at(int(m[3], 16))
        flags = at.pop("flags", Flag(0))
        flags |= Flag.MATCHED if vcpu.matched else Flag(0)
        flags |= Flag.WRITE if kind == MmioType.WRITE else Flag(0)
        vcpu.read_waits = kind == MmioType.UNSATISFIED_READ
        fields = at | {"flags": flags, "kind": kind, "len": int(m[2])}
        vcpu.mmio = self._put(vcpu, ts, Type.MMIO, Site.MMIO, **fields)

    def _kvm_userspace_exit(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        reason = int(_match(r"reason .*\((\d+)\)", text)[1])
        if vcpu.mmio is not None and reason == 6:  # KVM_EXIT_MMIO
            vcpu.mmio["value"] = reason
            vcpu.mmio["flags"] |= Flag.TO_USERSPACE
        vcpu.mmio = None

    def _kvm_entry(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        vcpu.mmio = None

    def _kvm_nested_vmenter(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        self._nests(vcpu, ts, 1)  # it comes just before L2 is entered

    def _kvm_nested_vmexit_inject(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        self._nests(vcpu, ts, 0)  # it comes just after L2 was left

    def _kvm_nested_vmexit(self, vcpu: _Vcpu, ts: int, text: str) -> None:
        if not vcpu.level:
            self._nests(vcpu, ts, 1)  # an exit of the processor from L2, whoever handles it

    def _nests(self, vcpu: _Vcpu, ts: int, kind: int) -> None:
        vcpu.level = Flag.LEVEL_KNOWN | (Flag.L2 if kind else Flag(0))
        self._put(vcpu, ts, Type.NESTING, Site.NESTED_TP, kind=kind)


def _match(pattern: str, text: str) -> re.Match[str]:
    m = re.match(pattern, text)
    if m is None:
        raise ValueError(f"not understood: {text}")
    return m


def convert(text: str) -> NDArray[Any]:
    """Turn an ftrace text of one VMM process into events of dtype `EVENT`."""
    converter = _Converter()
    for line in text.splitlines():
        m = _LINE.match(line)
        if m is not None:
            ts = int(m[3]) * 10**9 + int(m[4]) * 1000
            converter.line(m[1].strip(), int(m[2]), ts, m[5], m[6])
    rows = np.zeros(len(converter.events), EVENT)
    for row, event in zip(rows, converter.events, strict=True):
        for name, value in event.items():
            row[name] = value
    return rows


def header(name: str, rows: NDArray[Any]) -> dict[str, Any]:
    """Describe a converted capture: what the trace could tell, and what it could not."""
    release, package = CAPTURES[name]
    header = new_header("converted")
    header["source"]["note"] = (
        f"converted from an ftrace text trace recorded on Debian {package} under Bochs "
        "(Nehalem, EPT, no unrestricted guest); memslots are not in such a trace: the TSS slot was "
        "presumed at 0xfffbd000, where the VMM put it"
    )
    header["host"] |= {"kernel": release, "vendor": "intel"}
    header["clock"]["monotonic_ns"] = int(rows["ts"][0])
    header["plan"] = list(_plan())
    header["command"] = ["python", "-m", "tests.convert_ftrace"]
    return header


def _plan() -> Iterator[dict[str, Any]]:
    for kind, site, tracepoint in _SEES:
        yield {
            "observation": kind.name, "site": site.name, "attachment": f"tracepoint {tracepoint}",
            "attached": True, "reason": "in the trace",
        }  # fmt: skip
    for kind, reason in _BLIND:
        yield {
            "observation": kind.name, "site": None, "attachment": None,
            "attached": False, "reason": reason,
        }  # fmt: skip


def source_text(name: str) -> str:
    """Return the ftrace text that a golden capture was made from."""
    return lzma.decompress((GOLDEN / f"{name}.ftrace.txt.xz").read_bytes()).decode()


def main() -> None:
    """Write all golden captures again."""
    for name in CAPTURES:
        rows = convert(source_text(name))
        path = GOLDEN / f"{name}.kvmprobe"
        with CaptureWriter(path, header(name, rows), force=True) as writer:
            writer.write(rows)
        path.chmod(0o644)


if __name__ == "__main__":
    main()
