# SPDX-License-Identifier: MIT
"""AMD hosts: QEMU's own emulation (TCG) of SVM with nested paging; needs no /dev/kvm."""

from tests.lab.base import find_program
from tests.lab.vm import Boot

# Quick, and with a verdict of its own on every fault: panic=-1 ends the VM at once (-no-reboot).
_KERNEL_OPTIONS = (
    "console=ttyS0",
    "quiet",
    "loglevel=4",
    "panic=-1",
    "mitigations=off",
    "audit=0",
    "apparmor=0",
    # On a busy machine the emulated timer is late, and the kernel would stop for it.
    "no_timer_check",
)


def require_qemu() -> str:
    """Return QEMU's path; MissingError when it isn't here."""
    return find_program("qemu-system-x86_64", "qemu-system-x86")


def qemu_command(boot: Boot) -> list[str]:
    """Return the command line that boots a VM with SVM in QEMU; changes to the root are dropped."""
    append = " ".join(_KERNEL_OPTIONS + boot.options)
    drive = "format=raw,if=ide,media=disk"
    return [
        require_qemu(),
        # Processors take turns: with a thread each, TCG can run an int3 that the kernel, patching
        # its own code (static keys), has already replaced, and 6.12 stops with an oops.
        *("-accel", "tcg,thread=single"),
        *("-machine", "pc"),
        *("-cpu", "max"),
        *("-smp", str(boot.processors)),
        *("-m", str(boot.memory)),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-serial", f"file:{boot.serial}"),
        *("-kernel", str(boot.kernel)),
        *("-initrd", str(boot.initrd)),
        *("-append", append),
        *("-drive", f"file={boot.root},index=0,snapshot=on,{drive}"),
        *("-drive", f"file={boot.run_disk},index=1,cache=unsafe,{drive}"),
    ]
