# SPDX-License-Identifier: MIT
"""Finding bcc, and the headers that it compiles against."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmprobe.errors import HostError
from kvmprobe.host.bccload import install_command, load_bcc, search_path
from kvmprobe.host.headers import header_directory

ROOT = Path(__file__).parents[2]
PROGRAM = """
BPF_ARRAY(count, u64, 1);

RAW_TRACEPOINT_PROBE(sys_enter)
{
    int zero = 0;
    u64 *value = count.lookup(&zero);

    if (value)
        __sync_fetch_and_add(value, 1);
    return 0;
}

int second_argument(struct pt_regs *ctx)
{
    return PT_REGS_PARM2(ctx) == sizeof(struct pt_regs);
}
"""
COMPILE = """
import os, sys
from kvmprobe.host.bccload import load_bcc
from kvmprobe.host.headers import header_directory
bcc = load_bcc()
with header_directory() as path:
    os.environ["BCC_KERNEL_SOURCE"] = str(path)
    bpf = bcc.module.BPF(text=sys.stdin.read())
    bpf.load_func("second_argument", bpf.KPROBE)
os.getppid()
print("calls", bpf["count"][0].value > 0)
"""


@pytest.fixture
def clean() -> Iterator[None]:
    """No bcc in sys.modules before and after; the real one is put back if it was there."""

    def take() -> dict[str, object]:
        names = [name for name in sys.modules if name == "bcc" or name.startswith("bcc.")]
        return {name: sys.modules.pop(name) for name in names}

    before = take()
    yield
    take()
    sys.modules.update(before)  # type: ignore[arg-type]


def package(directory: Path, init: str = "", *, binding: str | None = "lib = 1\n") -> Path:
    (directory / "bcc").mkdir(parents=True)
    (directory / "bcc" / "__init__.py").write_text(init)
    if binding is not None:
        (directory / "bcc" / "libbcc.py").write_text(binding)
    return directory


def os_release(directory: Path, text: str) -> Path:
    path = directory / "os-release"
    path.write_text(text)
    return path


@pytest.mark.usefixtures("clean")
def test_bcc_is_loaded_by_its_path(tmp_path: Path) -> None:
    lattice = package(tmp_path / "lattice", "__version__ = '0.1.10'", binding=None)
    real = package(tmp_path / "real", "from .libbcc import lib\n__version__ = '0.31.0'")
    before = list(sys.path)
    found = load_bcc([tmp_path / "nowhere", lattice, real])
    assert found.version == "0.31.0"
    assert found.module.__file__ == str(real / "bcc" / "__init__.py")
    assert found.module.lib == 1
    assert sys.path == before
    assert load_bcc([]) == found


@pytest.mark.usefixtures("clean")
def test_the_lattice_on_sys_path_is_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lattice = package(tmp_path / "lattice", "__version__ = '0.1.10'", binding=None)
    monkeypatch.syspath_prepend(str(lattice))
    with pytest.raises(HostError, match="not installed: pacman -S python-bcc"):
        load_bcc([lattice], os_release(tmp_path, "ID=arch\n"))
    import bcc  # type: ignore[import-not-found,unused-ignore]

    with pytest.raises(HostError, match="another package called bcc is imported already"):
        load_bcc([package(tmp_path / "real")])
    assert sys.modules["bcc"] is bcc


@pytest.mark.usefixtures("clean")
def test_a_bcc_that_can_not_be_loaded_leaves_nothing_behind(tmp_path: Path) -> None:
    init = "from .libbcc import lib"
    broken = package(tmp_path, init, binding="raise OSError('libbcc.so.0 is not there')")
    with pytest.raises(HostError, match=r"can't be loaded, reinstall it: libbcc\.so\.0 is not"):
        load_bcc([broken])
    assert not [name for name in sys.modules if name.split(".")[0] == "bcc"]


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("ID=debian\n", "apt install python3-bpfcc"),
        ('NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n', "apt install python3-bpfcc"),
        ("ID=linuxmint\nID_LIKE='ubuntu debian'\n", "apt install python3-bpfcc"),
        ("ID=fedora\n", "dnf install python3-bcc"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf install python3-bcc"),
        ("ID=arch\n", "pacman -S python-bcc"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', "zypper install python3-bcc"),
        ("ID=alpine\n", "apk add py3-bcc"),
        ("ID=plan9\nVERSION_ID=debian\n", "your distribution's"),
        ("", "your distribution's"),
    ],
)
def test_the_package_is_named_for_the_distribution(tmp_path: Path, text: str, command: str) -> None:
    assert command in install_command(os_release(tmp_path, text))


def test_an_unknown_distribution_gets_advice_too(tmp_path: Path) -> None:
    assert "bcc" in install_command(tmp_path / "missing")


def test_newer_pythons_are_searched_first(tmp_path: Path) -> None:
    for name in ("python3.9", "python3.11", "python3.10", "python3.x"):
        (tmp_path / name / "site-packages").mkdir(parents=True)
    assert [path.parent.name for path in search_path(tmp_path)] == [
        "python3",
        "python3.11",
        "python3.10",
        "python3.9",
    ]


def test_the_header_directory_is_private_and_goes_away() -> None:
    with header_directory() as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*.h"))
        assert files == [
            "include/asm/page.h",
            "include/linux/bpf_common.h",
            "include/linux/kconfig.h",
            "include/linux/log2.h",
            "include/linux/types.h",
            "include/linux/version.h",
            "include/uapi/linux/bpf.h",
            "include/uapi/linux/if_packet.h",
        ]
    assert not path.exists()


def test_bcc_compiles_and_runs_with_these_headers() -> None:
    try:
        load_bcc()
    except HostError as error:
        pytest.skip(str(error))
    if os.geteuid() != 0:
        pytest.skip("loading BPF needs root")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=PROGRAM,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("this kernel refuses to load BPF (EPERM)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "calls True\n"
    assert "warning" not in done.stderr
