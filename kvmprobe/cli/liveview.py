# SPDX-License-Identifier: MIT
"""What goes on in a recording or a watch: each vCPU's rate, level and MMIO cache, as a table."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from kvmprobe.analysis.candidates import beliefs
from kvmprobe.analysis.findings import Finding, level_of
from kvmprobe.analysis.text import slot_name
from kvmprobe.analysis.vms import VmNames
from kvmprobe.analysis.words import FIXED, INCONCLUSIVE, VULNERABLE
from kvmprobe.cli.live import finding_line
from kvmprobe.probes.schema import NO_VCPU, Flag, LifecycleChange, Type

_Told = TypeVar("_Told")

#: vCPUs that are followed; more than fit on any terminal.
_MAX_VCPUS = 4096
#: Lines for findings, at most.
_MAX_FINDINGS = 5
#: A drain's last events, that say where vCPUs run now.
_NEWEST = 512
#: By severity, and by verdict.
COLOURS = {
    "critical": "bold red",
    "warning": "yellow",
    "info": "cyan",
    VULNERABLE: "bold red",
    INCONCLUSIVE: "yellow",
    FIXED: "green",
}


@dataclass
class _Vcpu:
    """A vCPU as last seen; `events` and `believed` since the last picture."""

    level: str = "?"
    cache: tuple[int, int] | None = None  # page's address and generation
    memory: str = ""  # the memslot that stands there
    filler: str = "?"
    events: int = 0
    believed: int = 0
    seq: int | None = None  # of the flight recorder's newest event


class View:
    """Follows a stream of events for its picture; a drain costs it about a ms."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._vcpus: dict[tuple[int, int], _Vcpu] = {}
        self.names = VmNames()

    def feed(self, rows: NDArray[Any]) -> None:
        """Take in what a drain gave: rows of dtype `schema.EVENT`."""
        kinds, vcpu = rows["type"], rows["vcpu"]
        own = (vcpu != NO_VCPU) & (rows["vm"] != 0)
        keys = rows["vm"].astype(np.int64) << 16 | vcpu
        for key, count in _counted(keys[own]):
            self._vcpu(key).events += count
        said = beliefs({name: rows[name] for name in ("type", "flags", "slot")})
        for key, count in _counted(keys[own & said]):
            self._vcpu(key).believed += count
        newest = np.flatnonzero(own[-_NEWEST:]) + max(0, len(rows) - _NEWEST)
        for key, at in _last(keys, newest):
            self._vcpu(key).level = _level(rows[at])
        cached = own & ((kinds == Type.FILL) | (kinds == Type.CACHE))
        for key, at in _last(keys, np.flatnonzero(cached)):
            _show_cache(self._vcpu(key), rows[at])
        lives = kinds == Type.LIFECYCLE
        if lives.any():
            self._follow_lives(rows[lives])

    def sample(self, rows: NDArray[Any]) -> None:
        """Take in what the flight recorder holds of the vCPUs that were met: all of their events.

        Where a drain gives what a rule needs only, this tells rates, levels and caches.

        Args:
            rows: of dtype `schema.EVENT`, sorted by (vm, vcpu, seq): `Session.flight`'s.

        """
        keys = rows["vm"].astype(np.int64) << 16 | rows["vcpu"]
        said = beliefs({name: rows[name] for name in ("type", "flags", "slot")})
        cached = said | (rows["type"] == Type.FILL) | (rows["type"] == Type.CACHE)
        holding = dict(_last(keys, np.flatnonzero(cached)))
        for key, at in _last(keys, np.arange(len(rows))):
            vcpu = self._vcpus.get((key >> 16, key & 0xFFFF))
            if vcpu is None:
                continue
            newest = int(rows["seq"][at])
            if vcpu.seq is not None:
                # It begins anew where the recorder had no room for a vCPU.
                vcpu.events = newest - vcpu.seq if newest >= vcpu.seq else newest + 1
            vcpu.seq = newest
            vcpu.level = _level(rows[at])
            if key in holding:
                _show_cache(vcpu, rows[holding[key]])

    def keep(self, vms: Container[int]) -> None:
        """Forget the vCPUs of all other VMs."""
        for key in [key for key in self._vcpus if key[0] not in vms]:
            del self._vcpus[key]

    def picture(
        self,
        head: Sequence[Text],
        findings: Sequence[_Told],
        line: Callable[[_Told], Text],
        seconds: float,
        height: int,
        verdicts: Mapping[int, str] | None = None,
    ) -> RenderableType:
        """Draw all that fits into a terminal.

        Args:
            head: the first lines.
            findings: the newest last.
            line: what to say of a finding.
            seconds: since the last picture.
            height: lines of the terminal.
            verdicts: by VM, if they are known; they take the place of what was believed.

        """
        most = max(1, min(_MAX_FINDINGS, (height - 4 - len(head)) // 2))
        told = [line(finding) for finding in findings[-most:]][::-1]
        if len(findings) > len(told):
            told.append(Text(f"and {len(findings) - len(told)} more findings", style="dim"))
        room = max(1, height - 3 - len(head) - len(told))
        ranked = sorted(self._vcpus, key=lambda key: -self._vcpus[key].events)
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        table.add_column("VM", no_wrap=True, overflow="ellipsis", ratio=2)
        for name in ("vCPU", "events/s", "level", "believed/s" if verdicts is None else "verdict"):
            justify: JustifyMethod = "left" if name == "verdict" else "right"
            table.add_column(name, justify=justify, no_wrap=True)
        table.add_column("MMIO cache", no_wrap=True, overflow="ellipsis", ratio=3)
        for key in sorted(ranked[:room]):
            table.add_row(*self._row(key, seconds, verdicts))
        more = len(ranked) - room
        rest = [Text(f"and {more} quieter vCPUs", style="dim")] if more > 0 else []
        for vcpu in self._vcpus.values():
            vcpu.events = vcpu.believed = 0
        lines = [*head, *told]
        for each in lines:
            each.no_wrap, each.overflow = True, "ellipsis"
        return Group(*head, table, *rest, *told)

    def _row(
        self, key: tuple[int, int], seconds: float, verdicts: Mapping[int, str] | None
    ) -> list[Text]:
        vcpu, vm = self._vcpus[key], self.names.get(key[0])
        who = f"{vm.id} {vm.name}" if vm.name else str(vm.id)
        # A watch is told of every page in which memory stands, and of few others.
        cache = Text("?" if verdicts is None else "no memory seen", style="dim")
        if vcpu.cache is not None:
            page, _ = vcpu.cache
            cache = Text("empty", style="dim")
            if page:
                place = f"0x{page:x}, by {vcpu.filler}"
                cache = Text(f"{place}, {vcpu.memory}" if vcpu.memory else place)
            if vcpu.memory:
                cache.stylize("bold red")
        level = Text(vcpu.level, style="yellow" if vcpu.level == "L2" else "")
        says = Text(f"{vcpu.believed / seconds:,.0f}")
        if verdicts is not None:
            word = verdicts.get(key[0], "")
            says = Text(word, style=COLOURS.get(word, ""))
        rate = Text(f"{vcpu.events / seconds:,.0f}")
        return [Text(who), Text(str(key[1])), rate, level, says, cache]

    def _vcpu(self, key: int) -> _Vcpu:
        at = key >> 16, key & 0xFFFF
        found = self._vcpus.get(at)
        if found is None:
            found = _Vcpu()
            if len(self._vcpus) < _MAX_VCPUS:
                self._vcpus[at] = found
        return found

    def _follow_lives(self, rows: NDArray[Any]) -> None:
        self.names.feed({name: rows[name] for name in rows.dtype.names or ()})
        for row in rows:
            if row["kind"] == LifecycleChange.VCPU_GONE:
                self._vcpus.pop((int(row["vm"]), int(row["vcpu"])), None)
            elif row["kind"] == LifecycleChange.VM_GONE:
                gone = [key for key in self._vcpus if key[0] == row["vm"]]
                for key in gone:
                    del self._vcpus[key]


def told(finding: Finding, names: VmNames) -> Text:
    """A finding's line, in the colour of its severity."""
    return Text(finding_line(finding, names), style=COLOURS[finding.rule.severity])


def counts(line: str) -> Text:
    """A line of counts, in which losses and findings are red."""
    text = Text(line)
    text.highlight_regex(r"[1-9][\d,]* (lost|findings?)", "bold red")
    return text


def _level(row: np.void) -> str:
    level = level_of(int(row["flags"]))
    return "?" if level == "unknown" else level


def _counted(keys: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Each key and how often it is there."""
    if not len(keys):
        return []
    low = int(keys.min())
    if int(keys.max()) - low < 1 << 20:
        counts = np.bincount(keys - low)
        found = np.flatnonzero(counts)
        return list(zip((found + low).tolist(), counts[found].tolist(), strict=True))
    found, counts = np.unique(keys, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


def _last(keys: NDArray[np.int64], rows: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Each key among some rows, and the last row that has it."""
    found, back = np.unique(keys[rows[::-1]], return_index=True)
    return list(zip(found.tolist(), rows[::-1][back].tolist(), strict=True))


def _show_cache(vcpu: _Vcpu, row: np.void) -> None:
    """Keep what an event says of the cache; only a FILL tells who filled it."""
    flags = int(row["flags"])
    content = (int(row["addr"]) & ~0xFFF, int(row["gen"])) if row["addr"] | row["value"] else (0, 0)
    if row["type"] == Type.FILL:
        vcpu.filler = "SMM" if flags & Flag.SMM else _level(row)
    elif content != vcpu.cache:
        vcpu.filler = "?"
    vcpu.cache = content
    vcpu.memory = slot_name(int(row["slot"])) if row["slot"] >= 0 and content[0] else ""
