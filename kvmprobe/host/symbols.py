# SPDX-License-Identifier: MIT
"""Which kernel functions exist under which name, and whether kprobes can reach them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from kvmprobe.errors import HostError

VMLINUX = "vmlinux"
_TEXT = frozenset("tTwW")


class Symbols:
    """The function symbols of a kernel and its modules.

    The text is searched when a name is asked for: a kernel has some 200,000 symbols, and ten are
    asked for.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        """`lines` are those of /proc/kallsyms: address, type, name and, for a module, [module]."""
        self._text = "\n" + "\n".join(line.rstrip("\n") for line in lines) + "\n"

    @classmethod
    def live(cls, path: Path = Path("/proc/kallsyms")) -> Self:
        """The running kernel's symbols; works where the kernel shows addresses as zeros.

        Raises HostError if the kernel shows no symbols.
        """
        try:
            text = path.read_bytes().decode(errors="replace")
        except OSError as error:
            raise HostError(
                f"{path}: {error.strerror}: boot a kernel with CONFIG_KALLSYMS"
            ) from error
        if re.search(r" [tTwW] ", text) is None:
            raise HostError(f"{path} names no functions: boot a kernel with CONFIG_KALLSYMS")
        return cls([text])

    def has(self, name: str) -> bool:
        """Whether there is a function with exactly this name."""
        return self.module(name) is not None

    def module(self, name: str) -> str | None:
        """Where the function is: "vmlinux" or a module's name; None if it does not exist.

        Of several functions with one name it is the first, which is also the one that a kprobe by
        name gets: vmlinux goes before modules.
        """
        for found, module in self._find(name):
            if found == name:
                return module
        return None

    def variants(self, name: str) -> list[str]:
        """What the compiler made of the function besides or instead: name.isra.0 and the like.

        A function of which only these exist can't be probed by its name: the rest was inlined, or
        its parameters are no longer those of the source.
        """
        # name.cold is only the unlikely part of a function that is otherwise whole.
        return sorted(
            {
                found
                for found, _ in self._find(name)
                if found != name and not found.removeprefix(name).startswith(".cold")
            }
        )

    def _find(self, name: str) -> Iterator[tuple[str, str]]:
        """Every function that is `name` or begins with `name.`, with its module, in order."""
        at = -1
        while (at := self._text.find(f" {name}", at + 1)) >= 0:
            start = self._text.rfind("\n", 0, at) + 1
            words = self._text[start : self._text.find("\n", at)].split()
            if (
                len(words) >= 3
                and words[1] in _TEXT
                and (words[2] == name or words[2].startswith(f"{name}."))
            ):
                yield words[2], words[3].strip("[]") if len(words) > 3 else VMLINUX


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
