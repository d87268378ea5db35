# SPDX-License-Identifier: MIT
"""Which kernel functions exist under which name, and whether kprobes can reach them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from kvmprobe.errors import HostError

VMLINUX = "vmlinux"
_TEXT = frozenset("tTwW")


class Symbols:
    """The function symbols of a kernel and its modules.  Addresses are never kept."""

    def __init__(self, lines: Iterable[str]) -> None:
        """`lines` are those of /proc/kallsyms: address, type, name and, for a module, [module]."""
        self._modules: dict[str, str] = {}
        self._variants: dict[str, list[str]] = {}
        for line in lines:
            words = line.split()
            if len(words) < 3 or words[1] not in _TEXT:
                continue
            name = words[2]
            self._modules.setdefault(name, words[3].strip("[]") if len(words) > 3 else VMLINUX)
            base, dot, suffix = name.partition(".")
            # name.cold is only the unlikely part of a function that is otherwise whole.
            if dot and not suffix.startswith("cold"):
                self._variants.setdefault(base, []).append(name)

    @classmethod
    def live(cls, path: Path = Path("/proc/kallsyms")) -> Self:
        """The running kernel's symbols; works where the kernel shows addresses as zeros.

        Raises HostError if the kernel shows no symbols.
        """
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                symbols = cls(lines)
        except OSError as error:
            raise HostError(
                f"{path}: {error.strerror}: boot a kernel with CONFIG_KALLSYMS"
            ) from error
        if not symbols._modules:
            raise HostError(f"{path} names no functions: boot a kernel with CONFIG_KALLSYMS")
        return symbols

    def has(self, name: str) -> bool:
        """Whether there is a function with exactly this name."""
        return name in self._modules

    def module(self, name: str) -> str | None:
        """Where the function is: "vmlinux" or a module's name; None if it does not exist.

        Of several functions with one name it is the first, which is also the one that a kprobe by
        name gets: vmlinux goes before modules.
        """
        return self._modules.get(name)

    def variants(self, name: str) -> list[str]:
        """What the compiler made of the function besides or instead: name.isra.0 and the like.

        A function of which only these exist can't be probed by its name: the rest was inlined, or
        its parameters are no longer those of the source.
        """
        return sorted(set(self._variants.get(name, [])))


def kprobes_available(root: Path = Path("/")) -> bool:
    """Whether this kernel has kprobes, told by the interfaces that it offers for them."""
    return any(
        (root / path).exists()
        for path in (
            "sys/bus/event_source/devices/kprobe/type",
            "sys/kernel/tracing/kprobe_events",
            "sys/kernel/debug/tracing/kprobe_events",
        )
    )
