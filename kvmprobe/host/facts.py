# SPDX-License-Identifier: MIT
"""Who this host is (for the capture's header), and whether it can be recorded.

Every function takes the root of the file system it looks at, "/" on a real host.
"""

import hashlib
import hmac
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from kvmprobe.errors import HostError

# Names this use of the machine id, as sd_id128_get_machine_app_specific(3) wants: the id itself
# must not leave the host.  Never change it: captures of one host are matched by the result.
_APPLICATION = b"kvmprobe capture, machine, 1"

_NOTE_BUILD_ID = 3  # NT_GNU_BUILD_ID of elf.h
_CPU_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "HygonGenuine": "amd"}
_CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}  # linux/capability.h
_ROOT = Path("/")


class HostFacts(TypedDict):
    """The `host` object of a capture's header; None (JSON null) where nothing is known."""

    boot_id: str | None
    machine: str | None
    kernel: str | None
    vendor: str | None
    modules: dict[str, str | None]
    parameters: dict[str, str]


def host_facts(root: Path = _ROOT) -> HostFacts:
    """The facts about this host that a capture keeps.

    `machine` is a keyed hash of the machine id, never the id.  `vendor` is "intel", "amd" or what
    else runs KVM ("pvm").  `modules` has vmlinux and the KVM modules, loaded or built in, with
    their GNU build ids; `parameters` the modules' readable parameters as "module.parameter".
    """
    modules = _kvm_modules(root)
    return HostFacts(
        boot_id=_text(root / "proc/sys/kernel/random/boot_id"),
        machine=_machine(root),
        kernel=_text(root / "proc/sys/kernel/osrelease"),
        vendor=_vendor(root, modules),
        modules={
            "vmlinux": _build_id(root / "sys/kernel/notes"),
            **{
                name: _build_id(root / "sys/module" / name / "notes/.note.gnu.build-id")
                for name in modules
            },
        },
        parameters={
            f"{name}.{path.name}": value
            for name in modules
            for path in sorted((root / "sys/module" / name / "parameters").glob("*"))
            if (value := _text(path)) is not None
        },
    )


@dataclass(frozen=True)
class Access:
    """What this process may do on this host, and what the host has."""

    root: bool
    """Whether the effective user is root."""
    capabilities: frozenset[str]
    """Those effective of CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN."""
    lockdown: str | None
    """ "none", "integrity" or "confidentiality"; None where the kernel does not say."""
    kvm_loaded: bool
    """Whether KVM runs: its device is registered."""
    kvm_device: bool
    """Whether /dev/kvm exists."""
    kvm_usable: bool
    """Whether this process may read and write /dev/kvm."""
    btf: bool
    """Whether the kernel gives its BTF."""
    unprivileged_bpf_disabled: int | None
    """The sysctl of that name; None where it does not exist."""

    @property
    def may_trace(self) -> bool:
        """Whether the capabilities suffice to load and attach tracing programs."""
        return "CAP_SYS_ADMIN" in self.capabilities or self.capabilities >= {
            "CAP_BPF",
            "CAP_PERFMON",
        }

    def advice(self) -> list[str]:
        """All that makes a recording impossible, one line each: what is wrong, what to do."""
        found = []
        if not self.kvm_loaded:
            found.append(
                "KVM is not loaded: run `modprobe kvm_intel` or `modprobe kvm_amd`; where that "
                "fails, enable virtualization in the firmware or the outer hypervisor"
            )
        if not self.btf:
            found.append(
                "/sys/kernel/btf/vmlinux does not exist: boot a kernel built with "
                "CONFIG_DEBUG_INFO_BTF, as the kernels of current distributions are"
            )
        if not self.may_trace:
            found.append(
                "tracing the kernel is not permitted: run as root (sudo), or with CAP_BPF and "
                "CAP_PERFMON"
            )
        if self.lockdown == "confidentiality":
            found.append(
                "kernel lockdown is in confidentiality mode, which forbids BPF to read kernel "
                "memory: boot with lockdown=integrity or lockdown=none"
            )
        return found

    def problem(self) -> HostError | None:
        """The first thing that makes a recording impossible, as an error to raise, or None."""
        advice = self.advice()
        return HostError(advice[0]) if advice else None


def access(root: Path = _ROOT) -> Access:
    """What this process may do here.  Looks only; loads and attaches nothing."""
    status = _text(root / "proc/self/status") or ""
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    bits = int(effective[1], 16) if effective else 0
    # The mode in force is the one in brackets: "none [integrity] confidentiality".
    lockdown = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/security/lockdown") or "")
    bpf = _text(root / "proc/sys/kernel/unprivileged_bpf_disabled")
    device = root / "dev/kvm"
    return Access(
        root=os.geteuid() == 0,
        capabilities=frozenset(name for name, bit in _CAPABILITIES.items() if bits >> bit & 1),
        lockdown=lockdown[1] if lockdown else None,
        kvm_loaded=(root / "sys/class/misc/kvm").exists(),
        kvm_device=device.exists(),
        kvm_usable=os.access(device, os.R_OK | os.W_OK),
        btf=(root / "sys/kernel/btf/vmlinux").exists(),
        unprivileged_bpf_disabled=int(bpf) if bpf and bpf.isdecimal() else None,
    )


def process_age(root: Path = _ROOT) -> float:
    """Seconds since this process began, its interpreter's start included."""
    # Field 22, counted behind the name, which may hold blanks (proc_pid_stat(5)).
    fields = (root / "proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def _text(path: Path) -> str | None:
    """The stripped text of a small file; None if it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _machine(root: Path) -> str | None:
    raw = _text(root / "etc/machine-id") or ""
    if not re.fullmatch(r"[0-9a-f]{32}", raw) or not int(raw, 16):
        return None
    return hmac.new(bytes.fromhex(raw), _APPLICATION, hashlib.sha256).hexdigest()


def _kvm_modules(root: Path) -> list[str]:
    """Kvm and the modules that run it (kvm_intel, kvm_amd, kvm_pvm, …), loaded or built in."""
    paths = (root / "sys/module").glob("kvm*")
    return sorted(p.name for p in paths if p.name == "kvm" or p.name.startswith("kvm_"))


def _vendor(root: Path, modules: list[str]) -> str | None:
    found = re.search(r"^vendor_id\s*:\s*(\w+)", _text(root / "proc/cpuinfo") or "", re.MULTILINE)
    cpu = _CPU_VENDORS.get(found[1]) if found else None
    running = [name.removeprefix("kvm_") for name in modules if name != "kvm"]
    # Built in, the other vendor's module is there too, and the CPU decides.
    for vendor in (cpu, "intel", "amd"):
        if vendor in running:
            return vendor
    return running[0] if running else cpu


def _build_id(path: Path) -> str | None:
    """The GNU build id in a file of ELF notes (elf(5)), as hex."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = (
            int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4, 8)
        )
        start = at + 12 + (name_size + 3 & ~3)
        if kind == _NOTE_BUILD_ID and data[at + 12 : at + 12 + name_size] == b"GNU\0":
            return data[start : start + size].hex() or None
        at = start + (size + 3 & ~3)
    return None
