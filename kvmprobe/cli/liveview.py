# SPDX-License-Identifier: MIT
"""What is going on in a recording: each vCPU's rate, level and MMIO cache, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvmprobe.analysis.candidates import beliefs
from kvmprobe.analysis.findings import Finding, level_of
from kvmprobe.analysis.text import slot_name
from kvmprobe.analysis.vms import VmNames
from kvmprobe.cli.live import finding_line
from kvmprobe.probes.schema import NO_VCPU, Flag, LifecycleChange, Type

#: vCPUs that are followed; more than fit on any terminal.
_MAX_VCPUS = 4096
#: Lines for findings, at most.
_MAX_FINDINGS = 5
#: A drain's last events, that say where vCPUs run now.
_NEWEST = 512
_COLOURS = {"critical": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass
class _Vcpu:
    """A vCPU as last seen; `events` and `believed` since the last picture."""

    level: str = "?"
    cache: tuple[int, int] | None = None  # page's address and generation
    memory: str = ""  # the memslot that stands there
    filler: str = "?"
    events: int = 0
    believed: int = 0


class View:
    """Follows the events of a recording for its picture; a drain costs it about a ms."""

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
            self._vcpu(key).level = level_of(int(rows["flags"][at]))
        cached = own & ((kinds == Type.FILL) | (kinds == Type.CACHE))
        for key, at in _last(keys, np.flatnonzero(cached)):
            _show_cache(self._vcpu(key), rows[at])
        lives = kinds == Type.LIFECYCLE
        if lives.any():
            self._follow_lives(rows[lives])

    def picture(
        self, head: str, findings: tuple[Finding, ...], seconds: float, height: int
    ) -> RenderableType:
        """Draw all that fits into `height` lines; `seconds` went by since the last picture."""
        most = max(1, min(_MAX_FINDINGS, (height - 5) // 2))
        told = [_finding(f, self.names) for f in findings[-most:]][::-1]
        if len(findings) > len(told):
            told.append(Text(f"and {len(findings) - len(told)} more findings", style="dim"))
        room = max(1, height - 4 - len(told))
        ranked = sorted(self._vcpus, key=lambda key: -self._vcpus[key].events)
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        table.add_column("VM", no_wrap=True, overflow="ellipsis", ratio=3)
        for name in ("vCPU", "events/s", "level", "believed/s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("MMIO cache", no_wrap=True, overflow="ellipsis", ratio=4)
        for key in sorted(ranked[:room]):
            table.add_row(*self._row(key, seconds))
        more = len(ranked) - room
        rest = [Text(f"and {more} quieter vCPUs", style="dim")] if more > 0 else []
        for vcpu in self._vcpus.values():
            vcpu.events = vcpu.believed = 0
        line = Text(head, no_wrap=True, overflow="ellipsis")
        line.highlight_regex(r"[1-9][\d,]* (lost|findings)", "bold red")
        return Group(line, table, *rest, *told)

    def _row(self, key: tuple[int, int], seconds: float) -> list[Text]:
        vcpu, vm = self._vcpus[key], self.names.get(key[0])
        who = f"{vm.id} {vm.name}" if vm.name else str(vm.id)
        cache = Text("?", style="dim")
        if vcpu.cache is not None:
            page, _ = vcpu.cache
            cache = Text("empty", style="dim")
            if page:
                place = f"0x{page:x}, by {vcpu.filler}"
                cache = Text(f"{place}, {vcpu.memory}" if vcpu.memory else place)
            if vcpu.memory:
                cache.stylize("bold red")
        level = Text(vcpu.level, style="yellow" if vcpu.level == "L2" else "")
        rates = (vcpu.events / seconds, vcpu.believed / seconds)
        events, believed = (Text(f"{rate:,.0f}") for rate in rates)
        return [Text(who), Text(str(key[1])), events, level, believed, cache]

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


def _finding(finding: Finding, names: VmNames) -> Text:
    line = Text(finding_line(finding, names), no_wrap=True, overflow="ellipsis")
    line.stylize(_COLOURS[finding.rule.severity])
    return line


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
    """Keep what a FILL or CACHE event says; a CACHE event doesn't tell who filled it."""
    flags = int(row["flags"])
    content = (int(row["addr"]) & ~0xFFF, int(row["gen"])) if row["addr"] | row["value"] else (0, 0)
    if row["type"] == Type.FILL:
        level = level_of(flags)
        vcpu.filler = "SMM" if flags & Flag.SMM else "?" if level == "unknown" else level
    elif content != vcpu.cache:
        vcpu.filler = "?"
    vcpu.cache = content
    vcpu.memory = slot_name(int(row["slot"])) if row["slot"] >= 0 and content[0] else ""
