# SPDX-License-Identifier: MIT
"""The C that BCC compiles: generated definitions, then the files of probes/ in order."""

from __future__ import annotations

from kvmprobe.capture.layout import Layout
from kvmprobe.capture.plan import Plan
from kvmprobe.capture.points import FUNCTIONS, TracepointPoint
from kvmprobe.probes.schema import HERE

#: In this order, one behind the other: BCC rewrites map accesses only in its main file.
FILES = (
    "events.h",
    "state.h",
    "kernel.h",
    "cache.h",
    "vcpu.h",
    "faults.bpf.c",
    "mmio.bpf.c",
    "memslots.bpf.c",
)

#: Numbers for new VMs that are ready at a time.
VM_NUMBERS = 4096


def program_text(layout: Layout, plan: Plan, ring_pages: int, fentry_prefix: str = "") -> str:
    """The whole program as one text for BCC, with what the plan attaches and nothing else.

    BCC finds the target of an fentry program in the program's name, so those names are generated;
    `fentry_prefix` is what this BCC wants before the function's name ("" or "kvm__").
    """
    methods = {a.method for a in plan.active()}
    prelude = [
        layout.defines() + f"#define RING_PAGES {ring_pages}\n#define VM_NUMBERS {VM_NUMBERS}"
    ]
    if "kprobe" in methods:
        prelude.append("#define WITH_KPROBE")
    if "fentry" in methods:
        prelude.append("#define WITH_FENTRY")
    for point in FUNCTIONS:
        attachment = plan.function(point.role)
        target = attachment.target if attachment else f"no_{point.role}"
        role = point.role.upper()
        prelude.append(f"#define FENTRY_{role} {fentry_name('kfunc', fentry_prefix, target)}")
        prelude.append(f"#define FEXIT_{role} {fentry_name('kretfunc', fentry_prefix, target)}")
    for attachment in plan.active():
        if isinstance(attachment.point, TracepointPoint) and attachment.point.define:
            prelude.append(f"#define {attachment.point.define}")
    faultin, noslot = plan.function("faultin"), plan.function("noslot")
    abnormal = noslot is not None and noslot.target == "handle_abnormal_pfn"
    prelude.append(f"#define FAULTIN_ARGS {faultin.arguments if faultin else 2}")
    prelude.append(f"#define NOSLOT_IS_HANDLE_ABNORMAL_PFN {int(abnormal)}")
    return "\n".join([*prelude, *((HERE / name).read_text(encoding="utf-8") for name in FILES)])


def fentry_name(kind: str, prefix: str, target: str) -> str:
    """The name of an fentry ("kfunc") or fexit ("kretfunc") program for BCC."""
    return f"{kind}__{prefix}{target}"
