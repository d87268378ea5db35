# SPDX-License-Identifier: MIT
"""Captures that may be given away: who and where is replaced, what happened stays.

Everything is made anew from what is known to be harmless: a part of a header that isn't known here
doesn't get through.  Findings and verdicts stay the same but for what names somebody and for the
offset in the page of each gpa.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import Columns, Flag, Site, Type
from kvmprobe.store.format import new_header

NOTE = "anonymized: names, ids, times of day, gva and rip are not the original ones"

#: Where the clock of an anonymized capture starts: an uptime tells a host from others.  No real
#: uptime is longer, so events from before the start don't fall below 0.
_START = 10**18
_MODULES = ("vmlinux", "kvm", "kvm_intel", "kvm_amd", "kvm_pvm")
_VENDORS = ("intel", "amd", "pvm")
_WORDS = ("auto", "never", "always", "cond", "force", "on", "off")
#: A method and a name of the kernel's: "kprobe:kvm_mmu_page_fault", "tracepoint kvm_mmio".
_ATTACHMENT = re.compile(
    r"(?:kprobe|fentry|raw_tracepoint|tracepoint|none)[: ][a-z_0-9]{1,64}(?:\.[a-z.0-9]{1,32})?"
)

_PAGE = np.uint64(0xFFFFFFFFFFFFF000)
#: Observations whose addr is a gpa, and those whose value is a gva.
_GPA = np.zeros(256, np.bool_)
_GPA[[Type.FAULT, Type.FAULTIN, Type.FILL, Type.CACHE, Type.MATCH, Type.MMIO, Type.SPTE]] = True
_GPA[Type.MEMSLOT] = True
_GVA = np.zeros(256, np.bool_)
_GVA[[Type.FILL, Type.CACHE, Type.MATCH]] = True


class Anonymizer:
    """Replaces names and ids by pseudonyms: the same one for the same thing, within one export.

    The salt is made here and kept nowhere, so nobody can try which name makes a pseudonym.
    """

    def __init__(self) -> None:
        """Choose the salt."""
        self._salt = secrets.token_bytes(32)
        self._shift = np.uint64(0)

    def header(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """The header to write; call it before `batch`, which needs its clock."""
        out = new_header(header["source"]["kind"])
        out["schema"] = {name: int(header["schema"][name]) for name in ("major", "minor")}
        out["source"]["note"] = NOTE
        start = header["clock"]["monotonic_ns"]
        if start is not None:
            self._shift = np.uint64((_START - start) % (1 << 64))
            out["clock"]["monotonic_ns"] = _START
        host = header["host"]
        out["host"] = {
            "boot_id": self._text("boot", host["boot_id"]),
            "machine": self._text("machine", host["machine"]),
            "kernel": self._kernel(host["kernel"]),
            "vendor": host["vendor"] if host["vendor"] in _VENDORS else None,
            "modules": {
                name: self._text("build", host["modules"][name])
                for name in _MODULES
                if name in host["modules"]
            },
            "parameters": {
                name: value
                for name, value in host["parameters"].items()
                if re.fullmatch(rf"({'|'.join(_MODULES)})\.[a-z0-9_]{{1,64}}", name)
                and re.fullmatch(rf"[YN]|-?[0-9]{{1,20}}|{'|'.join(_WORDS)}", value or "")
            },
        }
        out["plan"] = [
            {
                "observation": row["observation"],
                "site": row["site"],
                "attachment": _harmless(row["attachment"]),
                "attached": row["attached"],
                "reason": None,
            }
            for row in header["plan"]
            if row["observation"] in Type.__members__
            and (row["site"] is None or row["site"] in Site.__members__)
        ]
        filters = header["filters"]
        out["filters"] = {
            "pid": self._id(filters["pid"]),
            "vm": self._text("vm", filters["vm"]),
            "vcpu": filters["vcpu"] if type(filters["vcpu"]) is int else None,
        }
        out["command"] = [str(self._text("command", header["command"]))]
        return out

    def batch(self, columns: Columns) -> dict[str, NDArray[Any]]:
        """One batch's events, in new arrays where something was replaced."""
        kinds, flags = columns["type"], columns["flags"]
        addr, value = columns["addr"].copy(), columns["value"].copy()
        addr[_GPA[kinds]] &= _PAGE
        # A fault in a guest whose MMU is neither direct nor nested is told by its gva.
        physical = (flags & np.uint32(Flag.DIRECT | Flag.NESTED_MMU)) != 0
        addr[(kinds == Type.FAULT) & ~physical] = 0
        value[_GVA[kinds]] = 0
        emulate = kinds == Type.EMULATE
        addr[emulate] = 0
        value[emulate] = 0
        out = {**columns, "ts": columns["ts"] + self._shift, "addr": addr, "value": value}
        life = np.flatnonzero(kinds == Type.LIFECYCLE)
        if len(life):
            out |= {name: columns[name].copy() for name in ("gen", "aux")}
            addr[life] = 0
            for i in life.tolist():
                comm = b"".join(int(half[i]).to_bytes(8, "little") for half in (value, out["gen"]))
                alias = self._comm(comm)
                value[i] = int.from_bytes(alias[:8], "little")
                out["gen"][i] = int.from_bytes(alias[8:], "little")
                out["aux"][i] = self._id(int(out["aux"][i]))
        return out

    def _digest(self, kind: str, text: bytes) -> bytes:
        return hashlib.blake2b(text, key=self._salt, person=kind.encode()).digest()

    def _text(self, kind: str, value: object) -> str | None:
        if value is None:
            return None
        return f"{kind}-{self._digest(kind, repr(value).encode('utf-8', 'replace')).hex()[:16]}"

    def _comm(self, comm: bytes) -> bytes:
        """A task's name: 15 letters and a null byte, as in the kernel."""
        name = comm.split(b"\0")[0]
        return f"task-{self._digest('comm', name).hex()[:10]}\0".encode() if name else bytes(16)

    def _id(self, value: object) -> int | None:
        """A process or thread id; 0 and None stay."""
        if value is None or value == 0:
            return None if value is None else 0
        # A filter's id and an event's must give the same pseudonym.
        digest = self._digest("id", repr(value).encode("utf-8", "replace"))
        return int.from_bytes(digest[:4], "little") % ((1 << 30) - 1) + 1

    def _kernel(self, release: str | None) -> str | None:
        """The version's numbers; what a builder added behind them names him or his host."""
        found = re.match(r"[0-9]+(?:[.][0-9]+)*", release or "")
        return found[0] if found else None


def _harmless(attachment: str | None) -> str | None:
    known = attachment is not None and _ATTACHMENT.fullmatch(attachment)
    return attachment if known else None
