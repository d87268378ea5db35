# SPDX-License-Identifier: MIT
"""Real traces for the importers' tests."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.formats.compiled import Loops, LoopTranslator
from kvmprobe.formats.detect import Source, open_trace
from kvmprobe.formats.ftrace import TextReader
from kvmprobe.formats.importer import blocks
from kvmprobe.formats.records import Tally
from kvmprobe.formats.slots import Slot, stated
from kvmprobe.formats.translate import Translator

TRACES = Path(__file__).parent / "data/traces"
GOLDEN = Path(__file__).parent / "data/golden"
#: Where the VMM of these traces put KVM's slots.
STATED = ("tss=0xfffbd000:3", "identity=0xfffbc000:1")
SLOTS = tuple(stated(text) for text in STATED)


def path_of(name: str, kind: str) -> Path:
    """The file of one real trace, such as ("intel-6.1", "trace.dat")."""
    return TRACES / name / f"tss.{kind}.xz"


def translated(
    source: Source,
    slots: tuple[Slot, ...] = SLOTS,
    *,
    salvage: bool = False,
    loops: Loops | None = None,
) -> tuple[NDArray[Any], Tally]:
    """All events of a trace, and what its reader met."""
    tally = Tally()
    translator = Translator(slots) if loops is None else LoopTranslator(slots, loops)
    read = blocks(source, tally, salvage=salvage, loops=loops)
    events = [translator.feed(block) for block in read]
    return np.concatenate([*events, translator.finish()]), tally


@cache
def events_of(name: str, kind: str) -> NDArray[Any]:
    """All events of one real trace."""
    source = open_trace(path_of(name, kind))
    with source.file:
        return translated(source)[0]


def events_of_text(text: str, slots: tuple[Slot, ...] = SLOTS) -> NDArray[Any]:
    """The events of some lines."""
    translator = Translator(slots)
    events = [translator.feed(b) for b in TextReader(io.BytesIO(text.encode()), Tally())]
    return np.concatenate([*events, translator.finish()])


def line(at: float, name: str, text: str, *, task: str = "CPU 0/KVM-4001", cpu: int = 0) -> str:
    """One line of ftrace text."""
    return f" {task:>22}     [{cpu:03d}] d..1. {at:12.6f}: {name}: {text}\n"


def check_real_trace(path: Path, loops: Loops) -> None:
    """Fail unless a trace gives the same events and counts by loops and by columns."""
    found = []
    for way in (None, loops):
        source = open_trace(path)
        with source.file:
            found.append(translated(source, (), loops=way))
    (events, tally), (others, other_tally) = found
    assert len(events) > 20
    np.testing.assert_array_equal(events, others)
    assert tally == other_tally


def check_many_threads(loops: Loops) -> None:
    """Fail unless many threads and vCPUs give the same events by loops and by columns."""
    text = "".join(
        line(
            i, "kvm_entry", f"vcpu {i % 700}, rip 0x0", task=f"CPU {i % 700}/KVM-{4000 + i % 1400}"
        )
        + line(i, "kvm_mmio", "mmio write len 4 gpa 0xfee000b0 val 0x0", task=f"x-{4000 + i % 900}")
        for i in range(3000)
    )
    translator = LoopTranslator((), loops)
    (block,) = TextReader(io.BytesIO(text.encode()), Tally())
    events = np.concatenate([translator.feed(block), translator.finish()])
    assert len(events) > 3000
    np.testing.assert_array_equal(events, events_of_text(text, ()))
    again = Translator(()).feed(block)
    assert again.tobytes() == events[: len(again)].tobytes()
