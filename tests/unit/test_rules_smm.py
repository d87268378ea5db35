# SPDX-License-Identifier: MIT
"""The step tables of the SMM fault (CVE-2026-99082), row by row, on kernels with it and without.

Memory: X is RAM in SMM only, Y outside SMM only, Z nowhere until the VMM adds it to SMM's view, and
H nowhere.  Address space 0 begins at generation 4 and address space 1 at 5.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvmprobe.analysis.candidates import candidates
from kvmprobe.analysis.detector import Detector
from kvmprobe.probes.schema import Flag, MmioType, Site, SpteChange, Type, columns
from tests.streams import ev, stream

X, Y, Z, H, LOW = 0xA0000, 0xC0000, 0xE0000, 0xF0000, 0x1000
READ, WRITE = MmioType.UNSATISFIED_READ, MmioType.WRITE
MISREAD, PROOF, FIXED = "address-space-mixup", "address-space-generation", "fixed"

Events = list[dict[str, Any]]


@dataclass
class Probe:
    """What the probes say of one vCPU, from the cache and the memslots as the tables give them."""

    generations: list[int] = field(default_factory=lambda: [4, 5])
    slots: list[dict[int, int]] = field(default_factory=lambda: [{LOW: 0, Y: 1}, {LOW: 0, X: 1}])
    smm_seen: bool = False
    entry: tuple[int, int, int] = (0, 0, 0)  # page, generation, address space of the fill

    def _event(
        self,
        kind_of: Type,
        smm: bool,
        address: int,
        gen: int,
        **fields: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        self.smm_seen |= smm
        flags = Flag.LEVEL_KNOWN | Flag.AS_KNOWN | Flag.TWO_AS | Flag.SLOT_KNOWN | Flag.GEN_KNOWN
        flags |= Flag.SMM * smm | Flag.SMM_SEEN * self.smm_seen
        flags |= Flag.GEN_IS_AS0 * (gen == self.generations[0])
        flags |= Flag.GEN_IS_CURRENT * (gen == self.generations[smm])
        if kind_of is not Type.FILL:
            flags |= Flag.FILL_AS_KNOWN | Flag.OTHER_AS * (self.entry[2] != smm)
        slot = self.slots[smm].get(address & ~0xFFF, -1)
        return ev(
            kind_of, flags | fields.pop("flags", 0), addr=address, slot=slot, gen=gen, **fields
        )

    def runs(self, smm: bool) -> Events:
        """An access that the processor completes, or an instruction emulated on memory."""
        return [self._event(Type.EMULATE, smm, LOW, 0)]

    def fill(self, smm: bool, page: int, gen: int) -> Events:
        """The first touch of a hole: a fill, then the emulator believes it, rightly."""
        self.entry = page, gen, int(smm)
        return [self._event(Type.FILL, smm, page, gen), *self.hit(smm, page)]

    def hit(self, smm: bool, address: int, kind: int = READ) -> Events:
        """The emulator believes the entry."""
        gen, write = self.entry[1], Flag.WRITE * (kind == WRITE)
        return [
            self._event(Type.EMULATE, smm, LOW, 0),
            self._event(Type.MATCH, smm, address, gen, flags=Flag.BY_GPA | write),
            self._event(Type.MMIO, smm, address, gen, flags=Flag.MATCHED | write, kind=kind),
        ]

    def fault_hit(self, smm: bool, address: int, kind: int = READ) -> Events:
        """A plain access: the fault's reserved bit, the belief, and the emulator's."""
        rsvd = self._event(
            Type.MATCH, smm, address, self.entry[1], flags=Flag.BY_GPA, site=Site.RSVD
        )
        fault = self._event(Type.FAULT, smm, address, 0, flags=Flag.BELIEVED)
        return [rsvd, *self.hit(smm, address, kind), fault]

    def missed(self, smm: bool, address: int) -> Events:
        """MMIO without the cache, on a hole."""
        return [
            self._event(Type.EMULATE, smm, LOW, 0),
            self._event(Type.MMIO, smm, address, self.entry[1], kind=READ),
        ]

    def stale(self, smm: bool, address: int) -> Events:
        """A plain access whose MMIO SPTE is of an old generation: mapped anew."""
        return [
            self._event(
                Type.SPTE, smm, address, 0, kind=SpteChange.STALE, site=Site.CHECK_MMIO_SPTE
            )
        ]

    def change(self, space: int, page: int | None = None) -> Events:
        """A memslot of an address space changes: a flag, or memory added at `page`."""
        self.generations[space] += 2
        if page is not None:
            self.slots[space][page] = 7
        gen = self.generations[space]
        event = ev(Type.GENERATION, Flag(0), vcpu=0xFFFF, addr=0, slot=-1, gen=gen, len=space)
        return [event | {"site": Site.MEMSLOTS_UPDATED}]


def forward(p: Probe, b: bool) -> list[tuple[str, Events, Counter[str]]]:
    """F1 to F12: filled outside SMM, used in SMM."""
    return [
        ("F1 F2", p.runs(True), Counter()),
        ("F3", p.fill(False, X, 4), Counter()),
        ("F4", p.hit(False, X), Counter()),
        ("F5", p.runs(True), Counter()),
        ("F6", p.hit(True, X) if b else p.runs(True), Counter({MISREAD: b})),
        ("F7", p.hit(True, X + 0x10, WRITE) if b else p.runs(True), Counter({MISREAD: b})),
        ("F8 F9 F10", p.runs(True) * 3, Counter()),
        ("its change", p.change(1), Counter()),
        ("F11", p.hit(True, X) if b else p.runs(True), Counter({MISREAD: b})),
        ("the other's", p.change(0), Counter()),
        ("F12", p.runs(True), Counter()),
    ]


def reverse(p: Probe, b: bool) -> list[tuple[str, Events, Counter[str]]]:
    """V1 to V7: filled in SMM, used outside."""
    believed = Counter({PROOF: 2}) if b else Counter({FIXED: 1})
    return [
        ("V1 V2", p.runs(False) * 2, Counter()),
        ("V3", p.fill(True, Y, 4 if b else 5), believed),
        ("V4", p.runs(False), Counter()),
        ("V5", p.hit(False, Y) if b else p.runs(False), Counter({MISREAD: b})),
        ("V6", p.hit(False, Y + 0x10, WRITE) if b else p.runs(False), Counter({MISREAD: b})),
        ("V7", p.runs(False), Counter()),
    ]


def same(p: Probe, b: bool) -> list[tuple[str, Events, Counter[str]]]:
    """S1 to S8: memory added to SMM's view only."""
    believed = Counter({PROOF: 2}) if b else Counter({FIXED: 1})
    return [
        ("S1", p.fill(True, Z, 4 if b else 5), believed),
        ("S2", p.fault_hit(True, Z), Counter({PROOF: b})),
        ("Z becomes memory", p.change(1, Z), Counter()),
        ("S3", p.fault_hit(True, Z) if b else p.stale(True, Z), Counter({MISREAD: b})),
        ("S4", p.hit(True, Z) if b else p.runs(True), Counter({MISREAD: b})),
        ("S5", p.fault_hit(True, Z + 16, WRITE) if b else p.runs(True), Counter({MISREAD: b})),
        ("S6", p.fill(False, Z, 4), Counter()),
        ("the other's", p.change(0), Counter()),
        ("S7 S8", p.runs(True) * 2, Counter()),
    ]


def harmless(p: Probe, b: bool) -> list[tuple[str, Events, Counter[str]]]:
    """H1 to H4: a hole in both."""
    believed = Counter({PROOF: 2}) if b else Counter({FIXED: 1})
    return [
        ("H1", p.fill(False, H, 4), Counter()),
        ("H2", p.hit(True, H) if b else p.missed(True, H), Counter({PROOF: b})),
        ("H3", p.fill(True, H, 4 if b else 5), believed),
        ("H4", p.hit(False, H) if b else p.missed(False, H), Counter({PROOF: b})),
    ]


TABLES = {"F": forward, "V": reverse, "S": same, "H": harmless}


def _said(detector: Detector) -> Counter[str]:
    said = Counter({f.rule.id: f.count for f in detector.findings()})
    said[FIXED] = sum(a.count for a in detector.acquittals())
    return said


@pytest.mark.parametrize("vulnerable", [True, False], ids=["vulnerable", "fixed"])
@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_the_step_tables(table: str, vulnerable: bool) -> None:
    whole, few = Detector(), Detector()
    seen: Events = []
    for step, events, expected in TABLES[table](Probe(), vulnerable):
        before = _said(whole)
        batch = columns(stream([*seen, *events])[len(seen) :])
        seen += events
        chosen = candidates(batch)
        whole.feed(batch)
        few.feed({name: column[chosen] for name, column in batch.items()})
        now = _said(whole)
        now.subtract(before)
        assert +now == +expected, step
        assert _said(few) == _said(whole), step


@pytest.mark.parametrize("table", TABLES)
def test_first_misread_is_where_the_table_has_it(table: str) -> None:
    detector = Detector()
    steps = TABLES[table](Probe(), True)
    detector.feed(columns(stream([event for _, events, _ in steps for event in events])))
    found = {f.rule.id: f for f in detector.findings()}
    where = {"F": (X, 1), "V": (Y, 1), "S": (Z, 7)}
    if table == "H":
        assert MISREAD not in found
        return
    misread = found[MISREAD]
    assert (misread.gpa, misread.slot, misread.level) == (*where[table], "L1")
    assert [Type(e["type"]).name for e in misread.evidence][:2] == ["MATCH", "MMIO"]
