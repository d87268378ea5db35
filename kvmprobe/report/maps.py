# SPDX-License-Identifier: MIT
"""The guest-physical maps for the page: a row a memslot or cached page, and a strip of them all."""

from __future__ import annotations

from dataclasses import dataclass

from kvmprobe.analysis.rules.model import APIC_GFN
from kvmprobe.analysis.text import slot_name
from kvmprobe.probes.schema import SLOT_TSS
from kvmprobe.report.gather import Gathered
from kvmprobe.report.memory import Page, Placement

#: Maps, and rows of each, on the page; what is left out is counted there.
MAX_MAPS = 64
MAX_ROWS = 150
#: Of the strip, in its own units.
STRIP_WIDTH = 1000
_READONLY = 1 << 1  # KVM_MEM_READONLY
_PAGE = 4096


@dataclass(frozen=True)
class Row:
    """A line of the map.  `kind`: memory, internal, device, or taken (memory that was cached)."""

    kind: str
    range: str
    what: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Box:
    """A part of the strip, from `x` on, `width` wide; `title` says what it is."""

    kind: str
    x: float
    width: float
    title: str


@dataclass(frozen=True)
class VmMap:
    """One VM's map."""

    title: str
    rows: tuple[Row, ...]
    boxes: tuple[Box, ...]
    left_out: int
    taken: int


def vm_maps(found: Gathered) -> tuple[list[VmMap], int]:
    """Return the maps, of VMs with findings first, and how many were left out."""
    suspects = {finding.vm for finding in found.capture.findings}
    vms = sorted(found.memory.vms(), key=lambda vm: (vm not in suspects, vm))
    return [_map(found, vm) for vm in vms[:MAX_MAPS]], max(0, len(vms) - MAX_MAPS)


def _map(found: Gathered, vm: int) -> VmMap:
    placements, pages = found.memory.placements(vm), found.memory.pages(vm)
    # Internal slots and memory that was cached stay, whatever else has to go.
    rows = [(p.base, 0, p.slot < SLOT_TSS, _slot_row(p)) for p in placements]
    rows += [(p.gfn * _PAGE, 1, not _taken(p), _page_row(p)) for p in pages]
    kept = sorted(sorted(rows, key=lambda row: row[2])[:MAX_ROWS], key=lambda row: row[:2])
    name = found.capture.names.get(vm).name
    return VmMap(
        title=f"VM {vm}" + (f" ({name})" if name else ""),
        rows=tuple(row for *_, row in kept),
        boxes=tuple(_strip(placements, pages)),
        left_out=len(rows) - len(kept),
        taken=sum(map(_taken, pages)),
    )


def _taken(page: Page) -> bool:
    return page.slot >= 0 and page.gfn != APIC_GFN


def _range(base: int, npages: int) -> str:
    return f"0x{base:x}" + (f"-0x{base + npages * _PAGE - 1:x}" if npages > 1 else "")


def _size(npages: int) -> str:
    for unit, pages in (("GiB", 1 << 18), ("MiB", 1 << 8)):
        if npages >= pages:
            return f"{npages / pages:.4g} {unit}"
    return f"{npages * 4} KiB"


def _slot_row(slot: Placement) -> Row:
    internal = slot.slot >= SLOT_TSS
    notes = [_size(slot.npages)]
    if internal:
        notes.append("KVM made it for itself")
    if slot.flags & _READONLY:
        notes.append("read-only")
    spaces = slot.present or slot.spaces
    if spaces != {0}:
        notes.append(f"address space {' and '.join(map(str, sorted(spaces)))}")
    if slot.made > len(slot.spaces):
        notes.append(f"came {slot.made:,} times")
    if not slot.present:
        notes.append("gone at the end")
    what = slot_name(slot.slot) if internal else f"memory, {slot_name(slot.slot)}"
    return Row(
        "internal" if internal else "memory", _range(slot.base, slot.npages), what, tuple(notes)
    )


def _page_row(page: Page) -> Row:
    notes = [
        f"{what}: {count:,}"
        for count, what in (
            (page.fills_l1, "filled by L1"),
            (page.fills_l2, "filled by L2"),
            (page.fills_other, "filled, level unknown"),
            (page.matches, "believed"),
            (page.accesses, "accessed as MMIO"),
        )
        if count
    ]
    if page.gfn == APIC_GFN:
        what = "the APIC page, which is meant to be emulated"
    elif page.slot >= 0:
        what = f"memory taken for MMIO: {slot_name(page.slot)}"
    else:
        what = "device page: no memory"
    return Row(
        "taken" if _taken(page) else "device",
        f"0x{page.gfn * _PAGE:x}",
        what,
        tuple(notes) or ("held by the cache",),
    )


def _strip(placements: list[Placement], pages: list[Page]) -> list[Box]:
    """Lay out all there is in order of address; a part's width grows with the log of its size."""
    parts: list[tuple[int, int, str, str]] = []
    end = 0
    for slot in placements:
        if slot.present or not any(p.present for p in placements):
            size = max(slot.npages, 1) * _PAGE
            row = _slot_row(slot)
            parts.append((slot.base, size, row.kind, f"{row.range} {row.what}"))
    covered = sorted((base, base + size) for base, size, *_ in parts)
    inside: dict[int, list[Page]] = {}
    for page in pages:
        at = page.gfn * _PAGE
        home = next((base for base, stop in covered if base <= at < stop), None)
        if home is None:
            parts.append((at, _PAGE, "device", f"0x{at:x} device page"))
        else:
            inside.setdefault(home, []).append(page)
    parts.sort()
    laid: list[tuple[float, str, str, int, int]] = []
    for base, size, kind, title in parts[: 4 * MAX_ROWS]:
        if base > end:
            laid.append((2.0, "gap", f"nothing from 0x{end:x} to 0x{base - 1:x}", end, base - end))
        laid.append((2.0 + (size // _PAGE).bit_length(), kind, title, base, size))
        end = max(end, base + size)
    total = sum(weight for weight, *_ in laid) or 1.0
    boxes, x = [], 0.0
    for weight, kind, title, base, size in laid:
        width = weight / total * STRIP_WIDTH
        boxes.append(Box(kind, round(x, 2), round(width, 2), title))
        for page in inside.get(base, []):
            if kind != "gap" and _taken(page):
                place = x + (page.gfn * _PAGE - base) / size * width
                mark = max(3.0, width * _PAGE / size)
                boxes.append(Box("taken", round(place, 2), round(mark, 2), _page_row(page).what))
        x += width
    return boxes
