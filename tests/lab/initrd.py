# SPDX-License-Identifier: MIT
"""The first program in the VM: a static busybox that finds the disks and hands over."""

import gzip
import shutil
from pathlib import Path

from tests.lab.base import MissingError, built, cache_dir, content_key, find_program, run_program
from tests.lab.kernels import BOOT_MODULES, Kernel

# The root disk is the first one, the run's own the second; where they end up in /dev is the
# kernel's choice, so each is told by what it holds.
_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module" || echo "lab: no $module"; done < /modules/order
tries=0
until [ -e /root/opt/venv ] && [ -e /run-disk/init ]; do
    for disk in /dev/sd[a-d]; do
        [ -b "$disk" ] || continue
        mount -t ext4 -o noatime "$disk" /probe 2>/dev/null || continue
        if [ -e /probe/init ]; then mount --move /probe /run-disk
        elif [ -e /probe/opt/venv ]; then mount --move /probe /root
        else umount /probe
        fi
    done
    tries=$((tries + 1))
    if [ "$tries" = 60 ]; then echo "LAB-BROKEN no disks"; poweroff -f; fi
    sleep 0.2
done
mount --move /run-disk /root/lab
umount /proc /sys
mount --move /dev /root/dev
exec switch_root /root /lab/init
"""


def get_initrd(kernel: Kernel) -> Path:
    """Return the initrd that boots this kernel, made if need be."""
    busybox = Path("/bin/busybox")
    if not busybox.exists():
        raise MissingError("busybox is not installed; apt-get install busybox-static")
    stat = busybox.stat()
    key = content_key(_INIT, kernel.folder.name, stat.st_size, stat.st_mtime_ns)
    path = cache_dir() / "initrds" / f"{kernel.release}-{key}.gz"
    with built(path, 50) as scratch:
        if scratch is not None:
            _make(kernel, busybox, scratch / "tree", scratch / path.name)
    return path


def _make(kernel: Kernel, busybox: Path, tree: Path, target: Path) -> None:
    for name in ("bin", "proc", "sys", "dev", "root", "run-disk", "probe", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin" / "busybox")
    order = kernel.load_order(BOOT_MODULES)
    for module in order:
        shutil.copy(module, tree / "modules")
    (tree / "modules" / "order").write_text("".join(f"{module.name}\n" for module in order))
    init = tree / "init"
    init.write_text(_INIT)
    init.chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    raw = target.with_suffix(".cpio")
    cpio = find_program("cpio", "cpio")
    run_program([cpio, "--quiet", "-o", "-H", "newc", "-O", str(raw)], cwd=tree, stdin=names)
    target.write_bytes(gzip.compress(raw.read_bytes(), compresslevel=6, mtime=0))
