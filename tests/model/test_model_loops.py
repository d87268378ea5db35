# SPDX-License-Identifier: MIT
"""The importers' loops, compiled: the same events as by columns, of any bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmprobe.analysis.jit import available
from kvmprobe.formats.compiled import Loops, loops
from tests.fuzz_import import KINDS, agree, damaged
from tests.traces import TRACES, check_many_threads, check_real_trace

pytestmark = pytest.mark.skipif(not available(), reason="numba is missing, or KVMPROBE_NO_JIT set")


@pytest.fixture(scope="module")
def compiled() -> Loops:
    return loops()


@pytest.mark.parametrize("path", sorted(TRACES.rglob("*.xz")), ids=lambda path: path.name)
def test_same_events_and_counts_of_real_traces(path: Path, compiled: Loops) -> None:
    check_real_trace(path, compiled)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_same_of_damaged_traces(kind: str, compiled: Loops) -> None:
    for seed in range(100):
        agree(damaged(kind, seed), salvage=bool(seed & 1), loops=compiled)


def test_many_threads_and_vcpus(compiled: Loops) -> None:
    check_many_threads(compiled)
