# SPDX-License-Identifier: MIT
"""What is run on each kernel under a recording, and what kvmprobe must then find."""

import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS_FILE = Path(__file__).with_name("kernels.toml")
VULNERABLE, FIXED, UNCLASSIFIED = "vulnerable", "fixed", "unclassified"
NOT_EXERCISED = "not exercised"

FAULT = "internal-slot"
#: The recording that is made as `kvmprobe watch` does.
WATCHED = "watched"
_FILL, _ARMED, _HIT = "internal-slot-fill", "internal-slot-armed", "internal-slot-hit"
_APIC = "apic-page-emulated"
_TSS, _IDENTITY_MAP, _APIC_PAGE, _HOLE = 0xFFFBD000, 0xFFFBC000, 0xFEE00000, 0xD0000000
_SLOTS = {_TSS: 32764, _APIC_PAGE: 32765, _IDENTITY_MAP: 32766}
_PAGE = 4096


@dataclass(frozen=True)
class Scenario:
    """Steps of nested.py at one gpa in one VM, on the vendors where they mean something.

    `internal` says that the gpa is in an internal slot that L2 touches: on a vulnerable kernel that
    is internal-slot-fill and then `hits` times internal-slot-hit (perhaps internal-slot-armed
    too); on a fixed one nothing.  `plain_hits` of these come of a plain load: KVM believes its
    cache there only where it has marked the page's SPTE as MMIO (kvm.mmio_caching).
    `seen_late`: L2 did so before the recording began, which internal-slot-armed must show.
    `beside`: the steps of a second VM at the same time, in which nothing may be found.
    `apic`: KVM emulates L2's access of the APIC access page, on Intel.
    `toggled`: the load guest instead, with these options, and a thread that makes and deletes a
    memslot where its vCPUs do MMIO: nothing may be found, and lookups must be seen UNSTABLE.
    `watched`: recorded as `kvmprobe watch` does, in watch mode with the flight recorder.
    """

    name: str
    steps: str
    target: int = _TSS
    vendors: tuple[str, ...] = ("amd", "intel")
    options: str = ""
    internal: bool = True
    hits: int = 0
    plain_hits: int = 0
    beside: str = ""
    apic: bool = False
    seen_late: bool = False
    toggled: bool = False
    watched: bool = False

    @property
    def recording(self) -> str:
        """Name of the recording it is in: "main", which most share, or another."""
        if self.watched:
            return WATCHED
        return self.name if self.seen_late or self.toggled else "main"

    @property
    def vms(self) -> tuple[str, ...]:
        """Names of the VMs, as nested.py prints them."""
        return (self.name, f"{self.name}-beside") if self.beside else (self.name,)

    def script(self, vendor: str) -> str:
        """Return lines of shell that run the VMs to their end; AMD's internal slot is the module's.

        One that fails prints "failed NAME".  The folder of nested/ is $LAB, else /lab.
        """
        lines = [self._command(vendor, self.name, self.steps)]
        if self.beside:
            lines.insert(0, self._command(vendor, self.vms[1], self.beside) + " &")
            lines.append("wait")
        return "\n".join(lines) + "\n"

    def _command(self, vendor: str, name: str, steps: str) -> str:
        if self.toggled:
            load = f"echo vm {name} $$; exec python3 -m kvmprobe.guests.load {self.steps}"
            return f"{{ sh -c {shlex.quote(load)} || echo failed {name}; }}"
        words = ["--name", name, "--target", hex(self.target)]
        words += self.options.split()
        if vendor == "amd" and self.internal and "slot" not in steps.split():
            words.append("--slot")
        command = 'python3 "${LAB:-/lab}"/nested/nested.py ' + shlex.join([*words, *steps.split()])
        return command if "kill" in steps else f"{{ {command} || echo failed {name}; }}"

    def check(
        self,
        findings: Iterable[Mapping[str, Any]],
        name: str,
        vendor: str,
        classified: str,
        *,
        caching: bool = True,
    ) -> tuple[str, str]:
        """Return what was expected and what was found in one VM of this scenario; equal if right.

        findings: those of `analyze --json` in this VM.  Information is left out unless it is of the
        fault that this is about.  caching: False with kvm.mmio_caching=0.
        """
        hits = self.hits - (0 if caching else self.plain_hits)
        expected = []
        allowed: set[str] = set()
        if name == self.name and self.internal and classified == VULNERABLE:
            expected.append(f"{_ARMED} L1" if self.seen_late else f"{_FILL} L2")
            expected += [f"{_HIT} L1 x{hits}"] if hits else []
            allowed = set() if self.seen_late else {_ARMED}
        elif self.apic and vendor == "intel":
            expected.append(f"{_APIC} L2")
        found = [
            self._describe(finding)
            for finding in findings
            if finding["severity"] != "info" or finding["fault"] == FAULT
        ]
        left = [text for text in found if text not in {f"{rule} L1" for rule in allowed}]
        return ", ".join(sorted(expected)) or "nothing", ", ".join(sorted(left)) or "nothing"

    def _describe(self, finding: Mapping[str, Any]) -> str:
        """Return rule, level and count; where it is only if that isn't where it must be."""
        text = f"{finding['rule']} {finding['level']}"
        if finding["rule"] == _HIT:
            text += f" x{finding['count']}"
        gpa = finding["gpa"]
        if gpa is None or int(gpa, 0) // _PAGE != self.target // _PAGE:
            text += f" at {gpa}"
        if finding["slot"] != _SLOTS.get(self.target):
            text += f" in slot {finding['slot']}"
        if finding["vcpu"] != 0:
            text += f" on vCPU {finding['vcpu']}"
        if self.seen_late and finding["rule"] == _ARMED:
            site = finding["evidence"]["events"][0]["site"]
            text += "" if site == "FIRST_SIGHT" else f" first at {site}"
        return text

    def verdict(self, classified: str) -> str:
        """Return what a recording of this scenario alone proves about the kernel."""
        if not self.internal or (self.seen_late and classified == FIXED):
            return NOT_EXERCISED
        return classified


_WHOLE = "load string-out l2-load l2-store load string-out string-in"

SCENARIOS = (
    Scenario("tss-shadow", _WHOLE, hits=2),
    Scenario("tss-nested-paging", _WHOLE, options="--nested-paging", hits=2),
    Scenario(
        "identity-map",
        "string-out l2-load string-out",
        target=_IDENTITY_MAP,
        vendors=("intel",),
        hits=1,
    ),
    Scenario("slots-change-between", "load l2-load flags string-out"),
    Scenario(
        "slot-made-late",
        "load slot l2-load load string-out",
        vendors=("amd",),
        hits=2,
        plain_hits=1,
    ),
    Scenario("consulting-accesses", "l2-load string-out string-in forced-load", hits=3),
    Scenario("other-accesses", "l2-load load store forced-sidt load"),
    Scenario(
        "two-vcpus",
        "1:string-out l2-load 1:string-out 1:load 1:string-in string-out",
        options="--vcpus 2",
        hits=1,
    ),
    Scenario(
        "two-vms",
        "string-out meet l2-load meet string-out",
        beside="string-out meet string-out meet string-in",
        hits=1,
    ),
    Scenario("killed", "l2-load kill"),
    Scenario(
        "apic-page",
        "l2-load l2-load",
        target=_APIC_PAGE,
        options="--irqchip",
        internal=False,
        apic=True,
    ),
    Scenario("hole", "load l2-load load string-out string-in", target=_HOLE, internal=False),
    Scenario(
        "recorded-late",
        "load l2-load pause string-out",
        vendors=("amd",),
        hits=1,
        seen_late=True,
    ),
    Scenario(
        "memslot-toggled",
        "--vcpus 2 --pio 0 --ram 0 --flips 1000000 --seconds 60",
        vendors=("amd",),
        internal=False,
        toggled=True,
    ),
    Scenario("watched-tss", _WHOLE, vendors=("amd",), hits=2, watched=True),
    Scenario(
        "watched-hole",
        "load l2-load load string-out string-in",
        target=_HOLE,
        vendors=("amd",),
        internal=False,
        watched=True,
    ),
)


@dataclass(frozen=True)
class Listed:
    """One kernel of kernels.toml; `spec` is what kernels.get_kernel takes."""

    name: str
    spec: str
    version: str
    internal_slot: str
    slot_module: bool
    fentry: bool


def listed_kernels() -> list[Listed]:
    """Return the kernels of kernels.toml in its order, the newest of each name first."""
    with KERNELS_FILE.open("rb") as file:
        entries = tomllib.load(file)["kernel"]
    return [
        Listed(
            entry["name"],
            f"{entry['release']}/{entry['package']}={entry['version']}",
            entry["version"],
            entry["internal-slot"],
            entry["slot-module"],
            entry["fentry"],
        )
        for entry in entries
    ]
