# SPDX-License-Identifier: MIT
"""Large traces are read by loops: the same events as by columns.

Here they run as they stand; tests/model compiles them, and tries damaged traces too.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvmprobe.formats import loops_binary, loops_events, loops_text
from kvmprobe.formats.compiled import Loops, LoopTranslator, loops_for
from kvmprobe.formats.ftrace import TextReader
from kvmprobe.formats.records import Tally
from kvmprobe.formats.translate import Translator
from kvmprobe.probes.schema import Type
from tests.fuzz_import import KINDS, agree, damaged
from tests.traces import TRACES, check_many_threads, check_real_trace, line

#: The loops as Python runs them.
LOOPS = Loops(
    loops_text.scan, loops_binary.scan_pages, loops_binary.scan_perf, loops_events.translate
)


@pytest.fixture(autouse=True)
def _numbers_that_wrap() -> Iterator[None]:
    """Compiled, a product of 64 bits wraps without a word."""
    with np.errstate(over="ignore"):
        yield


@pytest.mark.parametrize("path", sorted(TRACES.rglob("*.xz")), ids=lambda path: path.name)
def test_same_events_and_counts_of_real_traces(path: Path) -> None:
    check_real_trace(path, LOOPS)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_same_of_damaged_traces(kind: str) -> None:
    for seed in range(10):
        agree(damaged(kind, seed), salvage=bool(seed & 1), loops=LOOPS)


def test_many_threads_and_vcpus() -> None:
    check_many_threads(LOOPS)


def test_small_traces_do_without() -> None:
    assert loops_for(1 << 20) is None


def test_the_same_events_count_as_lost() -> None:
    text = "".join(
        line(i, "kvm_mmio", "mmio write len 4 gpa 0xfee000b0 val 0x0", task=f"x-{4000 + i % 3}")
        for i in range(9)
    )
    text += line(10, "kvm_entry", "vcpu 0, rip 0x0", task="x-4001")
    (block,) = TextReader(io.BytesIO(text.encode()), Tally())
    for translator in (Translator(()), LoopTranslator((), LOOPS)):
        translator.feed(block)
        translator.finish()
        assert translator.unplaced == {Type.MMIO: 6}
