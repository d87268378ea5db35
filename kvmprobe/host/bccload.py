# SPDX-License-Identifier: MIT
"""Finding bcc: the distribution's own package, from any interpreter.

The distribution's bcc is pure Python over libbcc.so, so it need not be on `sys.path`: it is loaded
by its path, from a virtual environment or a newer interpreter alike.  PyPI has an unrelated package
called `bcc` (a lattice); it is never used.
"""

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from kvmprobe.errors import HostError

OS_RELEASE = Path("/etc/os-release")

_PACKAGES = {
    "debian": "apt install python3-bpfcc",
    "ubuntu": "apt install python3-bpfcc",
    "fedora": "dnf install python3-bcc",
    "rhel": "dnf install python3-bcc",
    "centos": "dnf install python3-bcc",
    "arch": "pacman -S python-bcc",
    "opensuse": "zypper install python3-bcc",
    "suse": "zypper install python3-bcc",
    "alpine": "apk add py3-bcc",
}


class Bcc(NamedTuple):
    """The loaded package and its version."""

    module: ModuleType
    version: str


def search_path(lib: Path = Path("/usr/lib")) -> list[Path]:
    """Where distributions keep Python packages: Debian's directory, then others, newest first."""

    def version(path: Path) -> int:
        return int(path.parent.name.removeprefix("python3."))

    found = [
        path
        for path in lib.glob("python3.*/site-packages")
        if re.fullmatch(r"python3\.\d+", path.parent.name)
    ]
    return [lib / "python3/dist-packages", *sorted(found, key=version, reverse=True)]


def load_bcc(paths: Sequence[Path] | None = None, os_release: Path = OS_RELEASE) -> Bcc:
    """Load the distribution's bcc and give the module and its version.

    `sys.path` stays as it is; the module stands in `sys.modules` as `bcc`, because its parts import
    one another by that name.  Raises HostError if it is not installed (the message names the
    package), can't be loaded, or another package called bcc was imported before.
    """
    loaded = sys.modules.get("bcc")
    if loaded is not None:
        if loaded.__file__ is None or not _is_bcc(Path(loaded.__file__).parent):
            raise HostError(
                f"another package called bcc is imported already, from {loaded.__file__}: "
                "PyPI's bcc is a lattice and has nothing to do with BPF; uninstall it"
            )
        return Bcc(loaded, _version(loaded))
    for directory in search_path() if paths is None else paths:
        if _is_bcc(directory / "bcc"):
            module = _load(directory / "bcc")
            return Bcc(module, _version(module))
    raise HostError(f"bcc is not installed: {install_command(os_release)}")


def install_command(os_release: Path = OS_RELEASE) -> str:
    """The command that installs bcc on this distribution, told by ID and ID_LIKE in os-release."""
    try:
        text = os_release.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields = dict(re.findall(r"""^(ID|ID_LIKE)=["']?([^"'\n]*)""", text, re.MULTILINE))
    for word in f"{fields.get('ID', '')} {fields.get('ID_LIKE', '')}".split():
        # openSUSE's IDs are opensuse-leap, opensuse-tumbleweed, …
        for name in (word, word.partition("-")[0]):
            if name in _PACKAGES:
                return _PACKAGES[name]
    return "install your distribution's Python 3 package of bcc (not PyPI's bcc, a lattice)"


def _is_bcc(package: Path) -> bool:
    """Whether the directory is the BPF Compiler Collection: only it has bindings of libbcc."""
    return (package / "__init__.py").is_file() and (package / "libbcc.py").is_file()


def _version(module: ModuleType) -> str:
    return str(getattr(module, "__version__", "unknown"))


def _load(package: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "bcc", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise HostError(f"{package}: this Python can't load it")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        # A half-loaded package must not be what the next import finds.
        for name in [n for n in sys.modules if n == "bcc" or n.startswith("bcc.")]:
            del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise HostError(f"bcc in {package} can't be loaded, reinstall it: {error}") from error
    return module
