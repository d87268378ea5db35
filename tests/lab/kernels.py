# SPDX-License-Identifier: MIT
"""Debian's kernels: the image and the few modules the lab needs, unpacked for its use."""

import lzma
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.lab.base import LabError, built, cache_dir, content_key, find_program, run_program, say
from tests.lab.packages import Package, Release

RELEASES = {"6.1": "bookworm", "6.12": "trixie", "7.2": "sid"}
META_PACKAGE = "linux-image-amd64"

BOOT_MODULES = ("crc32c_generic", "ata_piix", "sd_mod", "ext4")
LATER_MODULES = ("irqbypass", "ccp", "kvm", "kvm_intel", "kvm_amd")
# From 6.9 on Debian's images are split; -image then holds only what depends on these.
_PARTS = ("linux-image-", "linux-binary-", "linux-modules-")


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: `vmlinuz`, and `modules` in a folder `lib/modules/RELEASE`."""

    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        """The folder `lib/modules/RELEASE`: decompressed, with modules.dep."""
        return next((self.folder / "lib" / "modules").iterdir())

    @property
    def release(self) -> str:
        """What `uname -r` says in it."""
        return self.modules.name

    @property
    def package_version(self) -> str:
        """The exact Debian version, such as "6.1.192-1"."""
        return (self.folder / "version").read_text().strip()

    def load_order(self, wanted: tuple[str, ...]) -> list[Path]:
        """Return the files to insmod for these modules, dependencies first.

        A module that is built in, or that this kernel doesn't have, needs no file.
        """
        depends: dict[str, tuple[Path, list[str]]] = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            file, _, rest = line.partition(":")
            depends[_module_name(file)] = (
                self.modules / file,
                [_module_name(each) for each in reversed(rest.split())],
            )
        order: dict[Path, None] = {}
        for name in wanted:
            if name in depends:
                file_path, needs = depends[name]
                order.update({depends[need][0]: None for need in needs})
                order[file_path] = None
        return list(order)


def _module_name(file: str) -> str:
    return Path(file).name.split(".")[0].replace("-", "_")


def get_kernel(spec: str) -> Kernel:
    """Return a kernel from the cache, unpacked from Debian's packages if need be.

    `spec` is one of RELEASES' short names (the newest of that release), or
    "RELEASE/PACKAGE[=VERSION]", such as "bookworm/linux-image-6.1.0-50-amd64".
    Raises MissingError when the mirror doesn't hold it.
    """
    release_name, name, version = parse_spec(spec)
    release = Release(release_name)
    packages = _resolve(release, release.show(name, version))
    key = content_key([(each.name, each.version) for each in packages], _RECIPE)
    folder = cache_dir() / "kernels" / f"{packages[-1].version}-{key}"
    with built(folder, 2000) as scratch:
        if scratch is not None:
            say(f"unpacking kernel {packages[-1].version} ({release_name})")
            _unpack([release.fetch(each) for each in packages], scratch, scratch / folder.name)
            (scratch / folder.name / "version").write_text(packages[-1].version + "\n")
    return Kernel(folder)


def parse_spec(spec: str) -> tuple[str, str, str | None]:
    """Split a kernel's specification into release, package and exact version (or None)."""
    if spec in RELEASES:
        return RELEASES[spec], META_PACKAGE, None
    release, slash, package = spec.partition("/")
    if not slash:
        raise LabError(
            f"unknown kernel {spec!r}; use {', '.join(RELEASES)} or RELEASE/PACKAGE[=VERSION]"
        )
    name, _, version = package.partition("=")
    return release, name, version or None


def _resolve(release: Release, package: Package) -> list[Package]:
    """Follow the image package to those that hold files; the last one is the image proper."""
    parts = [
        release.show(name, version) for name, version in package.depends if name.startswith(_PARTS)
    ]
    if not parts:
        return [package]
    return [found for part in parts for found in _resolve(release, part)]


# Part of the cache's key: what _unpack does with the packages.
_RECIPE = [BOOT_MODULES, LATER_MODULES, 1]


def _unpack(debs: list[Path], scratch: Path, target: Path) -> None:
    tree = scratch / "tree"
    for deb in debs:
        run_program([find_program("dpkg-deb", "dpkg"), "-x", str(deb), str(tree)])
    images = [*tree.glob("boot/vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz")]
    sources = [path.parent for path in tree.glob("**/lib/modules/*/kernel")]
    if len(images) != 1 or len(sources) != 1:
        raise LabError(f"{', '.join(deb.name for deb in debs)} hold no kernel as the lab knows it")
    source = sources[0]
    modules = target / "lib" / "modules" / source.name
    modules.mkdir(parents=True)
    shutil.copy(images[0], target / "vmlinuz")
    for name in ("modules.builtin", "modules.order", "modules.builtin.modinfo"):
        if (source / name).exists():
            shutil.copy(source / name, modules)
    base = scratch / "base"
    (base / "lib" / "modules").mkdir(parents=True)
    (base / "lib" / "modules" / source.name).symlink_to(source)
    depmod = find_program("depmod", "kmod")
    run_program([depmod, "-b", str(base), source.name])
    # The closure is taken from the whole kernel, then only those files are copied.
    for file in Kernel(base).load_order(BOOT_MODULES + LATER_MODULES):
        copy = modules / file.relative_to(base / "lib" / "modules" / source.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.suffix == ".xz":
            copy.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
        else:
            shutil.copy(file, copy)
    run_program([depmod, "-b", str(target), source.name])
