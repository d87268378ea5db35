# SPDX-License-Identifier: MIT
"""Intel hosts: Bochs emulates VMX in full, on CPU models of choice.

The Nehalem model has EPT and VPID but no unrestricted guest, so an unmodified kvm_intel makes its
internal memslots (hidden TSS, identity map) and uses them.
"""

import shutil
import sys
from pathlib import Path

from tests.lab.base import MissingError, find_program, run_program
from tests.lab.vm import Boot

_TERMINAL = Path(__file__).with_name("bochs_terminal.py")
CPU_MODEL = "corei5_lynnfield_750"

# Each line of boot log costs emulated serial time; the rest spares Bochs work that shows nothing.
_KERNEL_OPTIONS = (
    "console=ttyS0",
    "quiet",
    "loglevel=3",
    "panic=-1",
    "nokaslr",
    "mitigations=off",
    "tsc=reliable",
    "lpj=1000000",
    "no_timer_check",
    "nowatchdog",
    "audit=0",
    "apparmor=0",
    "ima=off",
)

# Sound has no back end under this build and aborts it, so its drivers are dummies and the
# speaker is off.  sync=none: emulated time follows executed instructions, not the wall clock.
_CONFIG = """\
display_library: term
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
cpu: model={model}, count=1, ips=200000000, reset_on_triple_fault=0
memory: guest={memory}, host={memory}
clock: sync=none
boot: cdrom
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path="{cd}", status=inserted
ata0-slave: type=disk, path="{root}", mode=volatile
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata1-master: type=disk, path="{run_disk}", mode=flat
com1: enabled=1, mode=file, dev="{serial}"
panic: action=report
error: action=ignore
info: action=ignore
debug: action=ignore
log: "{log}"
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
plugin_ctrl: unmapped=true, biosdev=true, speaker=false, extfpuirq=true, parallel=false, \
serial=true, gameport=false
"""


def require_bochs() -> str:
    """Return the path of Bochs; MissingError when it isn't here, or what it boots from."""
    for path, package in (
        ("/usr/share/bochs/BIOS-bochs-latest", "bochsbios"),
        ("/usr/share/vgabios/vgabios.bin", "vgabios"),
        # GRUB for BIOS machines
        ("/usr/lib/grub/i386-pc", "grub-pc-bin"),
    ):
        if not Path(path).exists():
            raise MissingError(f"{path} is missing; apt-get install {package}")
    for program, package in (("xorriso", "xorriso"), ("mformat", "mtools")):
        find_program(program, package)
    return find_program("bochs", "bochs bochs-term")


def bochs_command(boot: Boot, model: str = CPU_MODEL) -> list[str]:
    """Return the command line that boots a VM with VMX in Bochs; changes to the root are dropped.

    Bochs has one processor, whatever `boot.processors` says.
    """
    configuration = boot.folder / "bochsrc"
    configuration.write_text(
        _CONFIG.format(
            model=model,
            memory=boot.memory,
            cd=_boot_cd(boot),
            root=boot.root,
            run_disk=boot.run_disk,
            serial=boot.serial,
            log=boot.folder / "bochs.log",
        )
    )
    # Debian's build has the debugger, which waits for a command: continue.
    commands = boot.folder / "debugger"
    commands.write_text("c\n")
    bochs = [require_bochs(), "-q", "-f", str(configuration)]
    return [sys.executable, str(_TERMINAL), *bochs, "-rc", str(commands)]


def _boot_cd(boot: Boot) -> Path:
    tree = boot.folder / "cd"
    (tree / "boot" / "grub").mkdir(parents=True)
    shutil.copy(boot.kernel, tree / "vmlinuz")
    shutil.copy(boot.initrd, tree / "initrd")
    options = " ".join(_KERNEL_OPTIONS + boot.options)
    (tree / "boot" / "grub" / "grub.cfg").write_text(
        f"set timeout=0\nlinux /vmlinuz {options}\ninitrd /initrd\nboot\n"
    )
    mkrescue = find_program("grub-mkrescue", "grub-common")
    cd = boot.folder / "boot.iso"
    formats = ["-d", "/usr/lib/grub/i386-pc"]
    run_program([mkrescue, *formats, "-o", str(cd), str(tree)])
    return cd
