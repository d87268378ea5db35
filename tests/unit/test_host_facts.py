# SPDX-License-Identifier: MIT
"""Host facts, access and symbols, on made-up hosts and on this one."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kvmprobe.errors import HostError
from kvmprobe.host.facts import HostFacts, access, host_facts
from kvmprobe.host.symbols import Symbols, kprobes_available

ROOT = Path(__file__).parents[2]
MACHINE = "00112233445566778899aabbccddeeff"
# Fixed for ever: captures of one host are matched by it.
HASHED = "c9d78eb168ef52b748cdaf5f816b6b4089a9df16741373532643c0c8f60fdc84"
BUILD_ID = bytes(range(20))
ALL_CAPABILITIES = "CapEff:\t000001ffffffffff\n"


def write(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def note(name: bytes, kind: int, content: bytes) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return struct.pack("<III", len(name), len(content), kind) + padded(name) + padded(content)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """An Intel host with KVM as modules, everything in order."""
    gnu = note(b"GNU\0", 3, BUILD_ID)
    write(tmp_path, "proc/sys/kernel/random/boot_id", "01234567-89ab-4cde-8f01-23456789abcd\n")
    write(tmp_path, "proc/sys/kernel/osrelease", "6.1.0-56-amd64\n")
    write(tmp_path, "proc/sys/kernel/unprivileged_bpf_disabled", "2\n")
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\n")
    write(tmp_path, "proc/self/status", f"Name:\tpython\n{ALL_CAPABILITIES}")
    write(tmp_path, "etc/machine-id", MACHINE + "\n")
    write(tmp_path, "sys/kernel/notes", note(b"Linux\0", 257, b"x" * 30) + gnu)
    write(tmp_path, "sys/kernel/btf/vmlinux", b"")
    write(tmp_path, "sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    write(tmp_path, "sys/class/misc/kvm/dev", "10:232\n")
    write(tmp_path, "sys/module/kvm/notes/.note.gnu.build-id", gnu)
    write(tmp_path, "sys/module/kvm/parameters/mmio_caching", "Y\n")
    write(tmp_path, "sys/module/kvm_intel/parameters/unrestricted_guest", "N\n")
    write(tmp_path, "sys/module/kvmgt/parameters/x", "1\n")
    write(tmp_path, "dev/kvm", b"")
    return tmp_path


def test_facts_of_an_intel_host(host: Path) -> None:
    expected: HostFacts = {
        "boot_id": "01234567-89ab-4cde-8f01-23456789abcd",
        "machine": HASHED,
        "kernel": "6.1.0-56-amd64",
        "vendor": "intel",
        "modules": {"vmlinux": BUILD_ID.hex(), "kvm": BUILD_ID.hex(), "kvm_intel": None},
        "parameters": {"kvm.mmio_caching": "Y", "kvm_intel.unrestricted_guest": "N"},
    }
    assert host_facts(host) == expected


def test_facts_of_an_empty_host(tmp_path: Path) -> None:
    expected: HostFacts = {
        "boot_id": None,
        "machine": None,
        "kernel": None,
        "vendor": None,
        "modules": {"vmlinux": None},
        "parameters": {},
    }
    assert host_facts(tmp_path) == expected


@pytest.mark.parametrize("text", ["uninitialized\n", "", "0" * 32, MACHINE[:31], MACHINE.upper()])
def test_a_machine_id_that_is_none_gives_null(host: Path, text: str) -> None:
    write(host, "etc/machine-id", text)
    assert host_facts(host)["machine"] is None


@pytest.mark.parametrize(
    ("cpu", "modules", "vendor"),
    [
        ("AuthenticAMD", ["kvm_intel", "kvm_amd"], "amd"),
        ("GenuineIntel", ["kvm_intel", "kvm_amd"], "intel"),
        ("AuthenticAMD", ["kvm_pvm"], "pvm"),
        ("HygonGenuine", [], "amd"),
        ("CentaurHauls", ["kvm_intel"], "intel"),
        ("CentaurHauls", [], None),
    ],
)
def test_vendor(tmp_path: Path, cpu: str, modules: list[str], vendor: str | None) -> None:
    write(tmp_path, "proc/cpuinfo", f"vendor_id\t: {cpu}\n")
    for name in ["kvm", *modules]:
        (tmp_path / "sys/module" / name).mkdir(parents=True)
    assert host_facts(tmp_path)["vendor"] == vendor


@pytest.mark.parametrize(
    "notes", [b"", b"\xff" * 40, note(b"GNU\0", 3, BUILD_ID)[:10], note(b"GNU\0", 3, b"")]
)
def test_notes_without_a_build_id(host: Path, notes: bytes) -> None:
    write(host, "sys/kernel/notes", notes)
    assert host_facts(host)["modules"]["vmlinux"] is None


def test_nothing_stands_in_the_way(host: Path) -> None:
    found = access(host)
    assert found.capabilities == {"CAP_SYS_ADMIN", "CAP_PERFMON", "CAP_BPF"}
    assert (found.lockdown, found.unprivileged_bpf_disabled) == ("integrity", 2)
    assert (found.kvm_loaded, found.kvm_device, found.kvm_usable, found.btf) == (True,) * 4
    assert found.root == (os.geteuid() == 0)
    assert found.advice() == []
    assert found.problem() is None


def test_every_problem_is_one_line_with_advice(tmp_path: Path) -> None:
    write(tmp_path, "sys/kernel/security/lockdown", "none integrity [confidentiality]\n")
    found = access(tmp_path)
    advice = found.advice()
    for line, words in zip(
        advice, ("modprobe kvm_intel", "CONFIG_DEBUG_INFO_BTF", "sudo", "lockdown="), strict=True
    ):
        assert words in line
        assert "\n" not in line
    problem = found.problem()
    assert isinstance(problem, HostError)
    assert str(problem) == advice[0]
    assert (found.unprivileged_bpf_disabled, found.kvm_usable) == (None, False)


@pytest.mark.parametrize(
    ("bits", "enough"),
    [((21,), True), ((38, 39), True), ((38,), False), ((39,), False), ((), False)],
)
def test_capabilities_that_suffice(host: Path, bits: tuple[int, ...], enough: bool) -> None:
    write(host, "proc/self/status", f"CapEff:\t{sum(1 << bit for bit in bits):016x}\n")
    found = access(host)
    assert found.may_trace == enough
    assert (found.problem() is None) == enough


def test_this_host() -> None:
    facts = json.loads(json.dumps(host_facts()))
    assert facts["kernel"] == os.uname().release
    assert re.fullmatch(r"[0-9a-f-]{36}", facts["boot_id"])
    raw = Path("/etc/machine-id")
    assert not raw.exists() or raw.read_text().strip() not in json.dumps(facts)
    assert access().root == (os.geteuid() == 0)


KALLSYMS = """\
0000000000000000 T schedule
0000000000000000 t vcpu_is_mmio_gpa.part.0\t[kvm]
0000000000000000 t kvm_faultin_pfn\t[kvm]
0000000000000000 t kvm_faultin_pfn.cold\t[kvm]
0000000000000000 t handle_exception
0000000000000000 t handle_exception\t[kvm_intel]
0000000000000000 t f.isra.0.constprop.1
0000000000000000 t f.isra.0
0000000000000000 t f.isra.0
0000000000000000 d a_variable
0000000000000000 W weak

broken
"""


def test_symbols_without_addresses() -> None:
    symbols = Symbols(KALLSYMS.splitlines(keepends=True))
    assert symbols.has("schedule")
    assert symbols.has("weak")
    assert not symbols.has("a_variable")
    assert not symbols.has("vcpu_is_mmio_gpa")
    assert symbols.module("schedule") == "vmlinux"
    assert symbols.module("kvm_faultin_pfn") == "kvm"
    assert symbols.module("handle_exception") == "vmlinux"
    assert symbols.module("nothing") is None
    assert symbols.variants("vcpu_is_mmio_gpa") == ["vcpu_is_mmio_gpa.part.0"]
    assert symbols.variants("f") == ["f.isra.0", "f.isra.0.constprop.1"]
    assert symbols.variants("kvm_faultin_pfn") == []


def test_symbols_of_this_kernel(tmp_path: Path) -> None:
    if not Path("/proc/kallsyms").exists():
        pytest.skip("this kernel has no /proc/kallsyms")
    symbols = Symbols.live()
    assert symbols.module("schedule") == "vmlinux"
    assert not symbols.has("there_is_no_such_function")
    with pytest.raises(HostError, match="No such file"):
        Symbols.live(tmp_path / "missing")
    write(tmp_path, "empty", "")
    with pytest.raises(HostError, match="names no functions"):
        Symbols.live(tmp_path / "empty")


@pytest.mark.parametrize(
    "path",
    [
        "sys/bus/event_source/devices/kprobe/type",
        "sys/kernel/tracing/kprobe_events",
        "sys/kernel/debug/tracing/kprobe_events",
    ],
)
def test_kprobes_are_told_by_their_interfaces(tmp_path: Path, path: str) -> None:
    assert not kprobes_available(tmp_path)
    write(tmp_path, path, "")
    assert kprobes_available(tmp_path)


def imported(code: str, *names: str) -> set[str]:
    """Which of these modules are loaded after `code` ran in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return set(names) & set(done.stdout.split())


def test_importing_the_host_rooms_loads_nothing_heavy() -> None:
    rooms = sorted(path.stem for path in (ROOT / "kvmprobe/host").glob("[a-z]*.py"))
    code = "\n".join(f"import kvmprobe.host.{room}" for room in rooms)
    assert imported(code, "bcc", "pandas", "pyarrow", "numba") == set()
    light = "import kvmprobe.host.facts, kvmprobe.host.symbols, kvmprobe.host.bccload"
    assert imported(light, "numpy") == set()
