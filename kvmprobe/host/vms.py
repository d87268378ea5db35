# SPDX-License-Identifier: MIT
"""The VMs that run on this host, as their processes show them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvmprobe.errors import UsageError


@dataclass(frozen=True)
class Vm:
    """A process that holds a KVM VM; `name` is the VMM's (QEMU's -name) or None."""

    pid: int
    name: str | None
    comm: str


def running_vms(proc: Path = Path("/proc")) -> Iterator[Vm]:
    """Yield every process with an open VM descriptor; those that end meanwhile are left out."""
    for directory in sorted(proc.glob("[0-9]*"), key=lambda d: int(d.name)):
        try:
            if _holds_vm(directory):
                comm = (directory / "comm").read_text(errors="replace").strip()
                pid = int(directory.name)
                yield Vm(pid, vm_name(pid, proc), comm)
        except OSError:
            continue


def find_vm(name: str, proc: Path = Path("/proc")) -> Vm:
    """Find the one running VM of that name.

    Raises UsageError when there is none or more than one; the message lists what there is.
    """
    vms = list(running_vms(proc))
    found = [vm for vm in vms if vm.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        pids = ", ".join(str(vm.pid) for vm in found)
        raise UsageError(f"more than one VM is called {name!r}: use --pid with one of {pids}")
    names = ", ".join(sorted(vm.name for vm in vms if vm.name)) or "none with a name"
    raise UsageError(f"no running VM is called {name!r}; running: {names}")


def vm_name(pid: int, proc: Path = Path("/proc")) -> str | None:
    """What the VMM of process `pid` calls its VM (QEMU's -name); None where it says nothing."""
    try:
        arguments = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return _qemu_name(arguments)


def nested_runs(pid: int, debug: Path = Path("/sys/kernel/debug/kvm")) -> int | None:
    """How often the vCPUs of a process's VMs entered an L2; None where debugfs does not say.

    It is the counter `nested_run` of kvm_vm_debugfs, which only root may read.
    """
    try:
        counts = [int(path.read_text()) for path in debug.glob(f"{pid}-*/nested_run")]
    except (OSError, ValueError):
        return None
    return sum(counts) if counts else None


def _holds_vm(directory: Path) -> bool:
    return any(str(fd.readlink()) == "anon_inode:kvm-vm" for fd in (directory / "fd").iterdir())


def _qemu_name(arguments: list[bytes]) -> str | None:
    """The VM's name from QEMU's `-name NAME` or `-name guest=NAME,…`; libvirt uses the latter."""
    for option, value in itertools.pairwise(arguments):
        if option in (b"-name", b"--name"):
            text = value.decode(errors="replace")
            for part in text.split(","):
                if part.startswith("guest="):
                    return part.removeprefix("guest=")
            return text.split(",")[0]
    return None
