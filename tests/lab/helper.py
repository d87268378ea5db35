# SPDX-License-Identifier: MIT
"""The lab's kernel module (slot/lab_slot.c), built against Debian's headers for one kernel.

Debian's build programs need their own release's C library, so it is built in a root of that
release, by that release's compiler, which is thrown away afterwards.
"""

import shutil
from pathlib import Path

from tests.lab.base import (
    LabError,
    built,
    cache_dir,
    content_key,
    find_program,
    run_program,
    say,
)
from tests.lab.kernels import Kernel
from tests.lab.packages import Package, Release
from tests.lab.rootfs import bootstrap

_SOURCE = Path(__file__).with_name("slot")
_TOOLS = ("gcc", "make", "libc6-dev")


def get_helper(kernel: Kernel, release_name: str) -> Path:
    """Return lab_slot.ko for this kernel, built if need be.

    Raises MissingError when the mirror holds no headers for exactly this kernel, and LabError when
    the module doesn't compile or link against it.
    """
    sources = [path.read_text() for path in sorted(_SOURCE.iterdir())]
    folder = cache_dir() / "helpers"
    module = folder / f"lab_slot-{kernel.release}-{content_key(kernel.folder.name, sources)}.ko"
    release = Release(release_name)
    with built(module, 2000) as scratch:
        if scratch is not None:
            name = f"linux-headers-{kernel.release}"
            packages = _headers(release, release.show(name, kernel.package_version))
            say(f"building the helper module for {kernel.release}; takes minutes")
            _build(kernel, release, packages, scratch / "tree")
            shutil.copy(scratch / "tree" / "slot" / "lab_slot.ko", scratch / module.name)
    return module


def _headers(release: Release, package: Package) -> list[Package]:
    """Return the headers package and those of the kernel's own it depends on."""
    found = [package]
    for name, version in package.depends:
        if name.startswith(("linux-headers-", "linux-kbuild-")):
            found += _headers(release, release.show(name, version or package.version))
    return found


def _tools(packages: list[Package]) -> tuple[str, ...]:
    """Return what building needs: a compiler, and all the headers ask for outside the kernel."""
    names = {name for package in packages for name, _ in package.depends}
    return (*_TOOLS, *sorted(name for name in names if not name.startswith("linux-")))


def _build(kernel: Kernel, release: Release, packages: list[Package], tree: Path) -> None:
    bootstrap(release.name, _tools(packages), tree)
    (tree / "debs").mkdir()
    debs = [Path(shutil.copy(release.fetch(package), tree / "debs")).name for package in packages]
    shutil.copytree(_SOURCE, tree / "slot")
    chroot = [find_program("chroot", "coreutils"), str(tree)]
    run_program([*chroot, "dpkg", "--unpack", "--force-depends", *(f"/debs/{deb}" for deb in debs)])
    headers = f"/usr/src/linux-headers-{kernel.release}"
    try:
        run_program([*chroot, "make", "-C", headers, "M=/slot", "modules"])
    except LabError as error:
        raise LabError(f"the helper module doesn't build for {kernel.release}: {error}") from None
