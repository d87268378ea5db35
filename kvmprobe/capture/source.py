# SPDX-License-Identifier: MIT
"""The C that BCC compiles: generated definitions, then the files of probes/ in order."""

from __future__ import annotations

from dataclasses import dataclass
from mmap import PAGESIZE

from kvmprobe.capture.layout import Layout
from kvmprobe.capture.plan import Plan
from kvmprobe.capture.points import FUNCTIONS, TracepointPoint
from kvmprobe.capture.ring import STRIDE
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


#: The flight recorder: the last events of so many vCPUs, the ones used last; a power of two.
FLIGHT_EVENTS, FLIGHT_VCPUS = 64, 8192


@dataclass(frozen=True)
class Options:
    """How the program is made.

    `ring_bytes`, `reserve_bytes`: data areas of the two rings, powers of two.  `watch`: ship only
    what a rule may need.  `flight`: keep each vCPU's last events, shipped or not.
    """

    ring_bytes: int
    reserve_bytes: int
    watch: bool = False
    flight: bool = False

    def defines(self) -> dict[str, int]:
        """The definitions for the C, by name."""
        return {
            "RING_PAGES": self.ring_bytes // PAGESIZE,
            "RING_RECORDS": self.ring_bytes // STRIDE,
            "RESERVE_PAGES": self.reserve_bytes // PAGESIZE,
            "RESERVE_RECORDS": self.reserve_bytes // STRIDE,
            "VM_NUMBERS": VM_NUMBERS,
            "WATCH": int(self.watch),
            "FLIGHT": int(self.flight),
            "FLIGHT_EVENTS": FLIGHT_EVENTS,
            "FLIGHT_VCPUS": FLIGHT_VCPUS,
        }


def program_text(layout: Layout, plan: Plan, options: Options, fentry_prefix: str = "") -> str:
    """The whole program as one text for BCC, with what the plan attaches and nothing else.

    BCC finds the target of an fentry program in the program's name, so those names are generated;
    `fentry_prefix` is what this BCC wants before the function's name ("" or "kvm__").
    """
    methods = {a.method for a in plan.active()}
    prelude = [layout.defines()]
    prelude += [f"#define {name} {value}" for name, value in options.defines().items()]
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
