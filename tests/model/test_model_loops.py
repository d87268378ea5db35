# SPDX-License-Identifier: MIT
"""The importers' loops, compiled: the same events as by columns, of any bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest

from kvmprobe.analysis.jit import available
from kvmprobe.formats.compiled import Loops, LoopTranslator, loops
from kvmprobe.formats.detect import open_trace
from kvmprobe.formats.ftrace import TextReader
from kvmprobe.formats.records import Tally
from kvmprobe.formats.translate import Translator
from tests.fuzz_import import KINDS, agree, damaged
from tests.traces import TRACES, events_of_text, line, translated

pytestmark = pytest.mark.skipif(not available(), reason="numba is missing, or KVMPROBE_NO_JIT set")


@pytest.fixture(scope="module")
def compiled() -> Loops:
    return loops()


@pytest.mark.parametrize("path", sorted(TRACES.rglob("*.xz")), ids=lambda path: path.name)
def test_same_events_and_counts_of_real_traces(path: object, compiled: Loops) -> None:
    found = []
    for way in (None, compiled):
        source = open_trace(path)  # type: ignore[arg-type]
        with source.file:
            found.append(translated(source, (), loops=way))
    (events, tally), (others, other_tally) = found
    assert len(events) > 20
    np.testing.assert_array_equal(events, others)
    assert tally == other_tally


@pytest.mark.parametrize("kind", KINDS[:4])
def test_same_of_damaged_traces(kind: str, compiled: Loops) -> None:
    for seed in range(100):
        agree(damaged(kind, seed), salvage=bool(seed & 1), loops=compiled)


def test_many_threads_and_vcpus(compiled: Loops) -> None:
    text = "".join(
        line(
            i, "kvm_entry", f"vcpu {i % 700}, rip 0x0", task=f"CPU {i % 700}/KVM-{4000 + i % 1400}"
        )
        + line(i, "kvm_mmio", "mmio write len 4 gpa 0xfee000b0 val 0x0", task=f"x-{4000 + i % 900}")
        for i in range(3000)
    )
    translator = LoopTranslator((), compiled)
    (block,) = TextReader(io.BytesIO(text.encode()), Tally())
    events = np.concatenate([translator.feed(block), translator.finish()])
    assert len(events) > 3000
    np.testing.assert_array_equal(events, events_of_text(text, ()))
    again = Translator(()).feed(block)
    assert again.tobytes() == events[: len(again)].tobytes()
