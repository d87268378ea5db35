# SPDX-License-Identifier: MIT
"""The KVM tracepoints that are imported: their names, how they are printed, what they record.

Three writers print the same event differently: the kernel (ftrace), libtraceevent with its KVM
plugin (trace-cmd report) and without it (perf script).  Kernels differ too: each form names the
first one that a comment could not be spared for.  A form is matched from the start of the text
after "name:"; what follows it is of no interest.  Forms are tried in order.

In a form, `{a}` to `{c}` and `{vcpu}` are numbers: `:x` hexadecimal with or without 0x, `:d`
decimal.  `{x}` skips a hexadecimal number, `{d}` a decimal one, `{s}` a word, `{_}` any blanks.
`{note=Read|Write}` takes one of some words: the place in the list, shifted left by what `<` says.
`{insn}` is opcode bytes, two digits each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from kvmprobe.formats.records import Point


@dataclass(frozen=True)
class Op:
    """One step of a form: a literal, or what to read and where it goes ("" for nowhere)."""

    what: str  # "literal", "x", "d", "s", "_", "insn", "choice"
    into: str = ""
    words: tuple[bytes, ...] = ()
    shift: int = 0


@dataclass(frozen=True)
class Tracepoint:
    """One tracepoint.

    `forms` are its printed forms; `fields` map a column of RECORD to the field of its binary
    record.  `needed` fields must be there for the record to be understood.
    """

    name: str
    point: Point
    forms: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]

    @property
    def system(self) -> str:
        """The trace system it belongs to."""
        return "kvmmmu" if self.point in _MMU else "kvm"

    @cached_property
    def compiled(self) -> tuple[tuple[Op, ...], ...]:
        """The forms as steps."""
        return tuple(tuple(_compile(form)) for form in self.forms)


_MMU = {
    Point.SPTE_REQUESTED,
    Point.MARK_MMIO,
    Point.HANDLE_MMIO,
    Point.CHECK_MMIO,
    Point.SET_SPTE,
    Point.SPTE_CHANGED,
}

#: Tracepoints that nobody records singly for our sake: where one of them occurs, its whole system
#: was recorded.
WITNESSES = {
    "kvm": (
        "kvm_fpu",
        "kvm_msr",
        "kvm_pio",
        "kvm_cr",
        "kvm_cpuid",
        "kvm_apic",
        "kvm_eoi",
        "kvm_set_irq",
        "kvm_inj_virq",
        "kvm_track_tsc",
        "kvm_vcpu_wakeup",
        "kvm_halt_poll_ns",
    ),
    "kvmmmu": (
        "fast_page_fault",
        "kvm_mmu_get_page",
        "kvm_mmu_sync_page",
        "kvm_mmu_pagetable_walk",
        "kvm_mmu_prepare_zap_page",
    ),
}

_PART = re.compile(
    r"\{(?:(?P<into>a|b|c|vcpu):(?P<base>[xd])|(?P<skip>[xds_])|(?P<insn>insn)"
    r"|note=(?P<words>[^}<]*)(?:<(?P<shift>\d))?)\}"
)


def _compile(form: str) -> list[Op]:
    ops = []
    at = 0
    for m in _PART.finditer(form):
        if m.start() > at:
            ops.append(Op("literal", words=(form[at : m.start()].encode(),)))
        at = m.end()
        if m["into"]:
            ops.append(Op(m["base"], m["into"]))
        elif m["skip"]:
            ops.append(Op(m["skip"]))
        elif m["insn"]:
            ops.append(Op("insn", "b"))
        else:
            words = tuple(word.encode() for word in m["words"].split("|"))
            ops.append(Op("choice", "note", words, int(m["shift"] or 0)))
    if at < len(form):
        ops.append(Op("literal", words=(form[at:].encode(),)))
    return ops


_VCPU = (("vcpu", "vcpu_id"),)
_SMM = ("vcpu {vcpu:d}: {note=leaving|entering} SMM",)

TRACEPOINTS = (
    Tracepoint(
        "kvm_page_fault",
        Point.PAGE_FAULT,
        (
            "vcpu {vcpu:d} rip {x} address {a:x} error_code {b:x}",
            "address {a:x} error_code {b:x}",  # until 5.17
        ),
        (("vcpu", "vcpu_id"), ("a", "fault_address"), ("b", "error_code")),
    ),
    Tracepoint(
        "kvm_mmu_spte_requested",
        Point.SPTE_REQUESTED,
        ("gfn {a:x} pfn {b:x} level",),
        (("a", "gfn"), ("b", "pfn")),
    ),
    Tracepoint(
        "mark_mmio_spte",
        Point.MARK_MMIO,
        ("sptep:{s} gfn {a:x} access {b:x} gen {c:x}",),
        (("a", "gfn"), ("b", "access"), ("c", "gen")),
    ),
    Tracepoint(
        "handle_mmio_page_fault",
        Point.HANDLE_MMIO,
        ("addr:{x} gfn {a:x} access {b:x}",),
        (("a", "gfn"), ("b", "access")),
    ),
    Tracepoint(
        "check_mmio_spte",
        Point.CHECK_MMIO,
        ("spte {c:x} kvm_gen {a:x} spte-gen {b:x}",),
        (("a", "kvm_gen"), ("b", "spte_gen"), ("c", "spte")),
    ),
    Tracepoint(
        "kvm_emulate_insn",
        Point.EMULATE,
        ("{x}:{a:x}:{_}{insn}",),
        (("a", "rip"), ("b", "insn"), ("note", "failed")),
    ),
    Tracepoint(
        "vcpu_match_mmio",
        Point.MATCH,
        ("gva {b:x} gpa {a:x} {note=Read|Write} {note=GVA|GPA<1}",),
        (("a", "gpa"), ("b", "gva"), ("note", "write"), ("note<1", "gpa_match")),
    ),
    Tracepoint(
        "kvm_mmio",
        Point.MMIO,
        ("mmio {note=unsatisfied-read|read|write} len {b:d} gpa {a:x} val",),
        (("a", "gpa"), ("b", "len"), ("note", "type")),
    ),
    Tracepoint(
        "kvm_userspace_exit",
        Point.USERSPACE_EXIT,
        # What stands in brackets is the errno then.
        ("reason {note=|restart|error} ({a:d})", "reason {s} ({a:d})"),
        (("a", "reason"), ("note", "errno")),
    ),
    Tracepoint("kvm_entry", Point.ENTRY, ("vcpu {vcpu:d}",), _VCPU),
    # The plugin of trace-cmd leaves the vCPU out.
    Tracepoint("kvm_exit", Point.EXIT, ("vcpu {vcpu:d} reason", "reason"), _VCPU),
    Tracepoint("kvm_nested_vmenter", Point.NESTED_ENTER, ("",), ()),
    Tracepoint("kvm_nested_vmrun", Point.NESTED_ENTER, ("",), ()),  # until 6.1
    Tracepoint("kvm_nested_vmenter_failed", Point.NESTED_ENTER_FAILED, ("",), ()),
    Tracepoint("kvm_nested_vmexit", Point.NESTED_EXIT, ("vcpu {vcpu:d} reason", ""), _VCPU),
    Tracepoint("kvm_nested_vmexit_inject", Point.NESTED_INJECT, ("",), ()),
    Tracepoint("kvm_smm_transition", Point.SMM, _SMM, (("vcpu", "vcpu_id"), ("note", "entering"))),
    Tracepoint(
        "kvm_enter_smm", Point.SMM, _SMM, (("vcpu", "vcpu_id"), ("note", "entering"))
    ),  # until 5.15
    Tracepoint(
        "kvm_mmu_set_spte",
        Point.SET_SPTE,
        ("gfn {a:x} spte {b:x} ",),
        (("a", "gfn"), ("b", "spte")),
    ),
    Tracepoint(
        "kvm_tdp_mmu_spte_changed",
        Point.SPTE_CHANGED,
        ("as id {note=0|1} gfn {a:x} level {d} old_spte {x} new_spte {b:x}",),
        (("a", "gfn"), ("b", "new_spte"), ("note", "as_id")),
    ),
)
BY_NAME = {tracepoint.name: tracepoint for tracepoint in TRACEPOINTS}
