# SPDX-License-Identifier: MIT
"""The VMM's restatement of KVM's ABI, and the assembled guests, against the real sources."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmprobe.guests import kvm

GUESTS = Path(kvm.__file__).parent
C_HEADER = Path("/usr/include/linux/kvm.h")

IOCTLS = (
    *(
        "GET_API_VERSION",
        "CREATE_VM",
        "GET_VCPU_MMAP_SIZE",
        "CREATE_VCPU",
        "CREATE_IRQCHIP",
        "GET_SUPPORTED_CPUID",
        "SET_CPUID2",
        "SET_USER_MEMORY_REGION",
    ),
    *("SET_TSS_ADDR", "SET_IDENTITY_MAP_ADDR", "RUN", "GET_REGS", "SET_REGS", "GET_SREGS"),
    *("SET_SREGS", "SET_SIGNAL_MASK", "API_VERSION", "MEM_LOG_DIRTY_PAGES", "MEM_READONLY"),
)
STRUCTS = {
    "kvm_segment": kvm.Segment,
    "kvm_dtable": kvm.DescriptorTable,
    "kvm_sregs": kvm.SpecialRegisters,
    "kvm_regs": kvm.Registers,
    "kvm_userspace_memory_region": kvm.MemoryRegion,
}
RUN_MEMBERS = {
    "IMMEDIATE_EXIT": "immediate_exit",
    "EXIT_REASON": "exit_reason",
    "ENTRY_FAILURE_REASON": "fail_entry.hardware_entry_failure_reason",
    "IO_DIRECTION": "io.direction",
    "IO_SIZE": "io.size",
    "IO_PORT": "io.port",
    "IO_COUNT": "io.count",
    "IO_DATA_OFFSET": "io.data_offset",
    "MMIO_GPA": "mmio.phys_addr",
    "MMIO_DATA": "mmio.data",
    "MMIO_LEN": "mmio.len",
    "MMIO_IS_WRITE": "mmio.is_write",
    "INTERNAL_SUBERROR": "internal.suberror",
}


def members(struct: type[ctypes.Structure]) -> list[str]:
    return [field[0] for field in struct._fields_]


def test_abi_equals_the_kernel_header(tmp_path: Path) -> None:
    if shutil.which("gcc") is None or not C_HEADER.exists():
        pytest.skip("gcc or <linux/kvm.h> (package linux-libc-dev) is missing")
    ours: dict[str, int] = {f"KVM_{name}": getattr(kvm, name) for name in IOCTLS}
    ours |= {f"KVM_EXIT_{reason.name}": reason.value for reason in kvm.ExitReason}
    ours |= {"KVM_EXIT_IO_IN": kvm.IO_IN, "KVM_EXIT_IO_OUT": kvm.IO_OUT}
    for c_name, struct in STRUCTS.items():
        ours[f"sizeof(struct {c_name})"] = ctypes.sizeof(struct)
        for member in members(struct):
            ours[f"offsetof(struct {c_name}, {member})"] = getattr(struct, member).offset
    assert set(RUN_MEMBERS) == {name for name in vars(kvm.RunOffset) if name.isupper()}
    for name, member in RUN_MEMBERS.items():
        ours[f"offsetof(struct kvm_run, {member})"] = getattr(kvm.RunOffset, name)
    lines = "\n".join(f'printf("%lu\\n", (unsigned long)({name}));' for name in ours)
    source = tmp_path / "abi.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n"
        f"int main(void) {{\n{lines}\nreturn 0; }}\n"
    )
    program = tmp_path / "abi"
    subprocess.run(["gcc", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    theirs = dict(zip(ours, map(int, output.split()), strict=True))
    assert ours == theirs


@pytest.mark.parametrize("source", sorted(GUESTS.glob("*.S")), ids=lambda path: path.name)
def test_assembled_guest_is_its_source(source: Path, tmp_path: Path) -> None:
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("as or ld (package binutils) is missing")
    object_file, binary = tmp_path / "guest.o", tmp_path / "guest.bin"
    bits, target = ("64", "elf_x86_64") if ".code64" in source.read_text() else ("32", "elf_i386")
    subprocess.run(["as", f"--{bits}", "-o", object_file, source], check=True)
    link = ["ld", "-m", target, "-Ttext=0x1000", "-e", "0x1000", "--oformat", "binary"]
    subprocess.run([*link, "-o", binary, object_file], check=True)
    assert binary.read_bytes() == source.with_suffix(".bin").read_bytes()


def test_every_guest_has_source_and_binary() -> None:
    sources = {path.stem for path in GUESTS.glob("*.S")}
    assert sources == {path.stem for path in GUESTS.glob("*.bin")}
    assert "load" in sources
