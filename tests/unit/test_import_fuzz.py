# SPDX-License-Identifier: MIT
"""A short run of tests/fuzz_import.py: damaged traces give events or CaptureError, nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmprobe.probes.schema import EVENT
from tests.fuzz_import import KINDS, base, damaged, outcome


def events(data: bytes, *, salvage: bool) -> int:
    return len(np.frombuffer(outcome(data, salvage=salvage)[0], EVENT))


@pytest.mark.parametrize("kind", KINDS)
def test_undamaged(kind: str) -> None:
    assert events(base(kind), salvage=False) > 10


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(seed=st.integers(0, 2**63), salvage=st.booleans())
def test_damaged(kind: str, seed: int, salvage: bool) -> None:
    # Each byte of a trace can stand for one event at most.
    assert events(damaged(kind, seed), salvage=salvage) <= 1 << 20


@pytest.mark.parametrize("kind", KINDS[:4])
@settings(max_examples=60)
@given(data=st.binary(max_size=300))
def test_any_bytes_after_the_magic(kind: str, data: bytes) -> None:
    magic = {"trace.dat": base(kind)[:12], "perf.data": base(kind)[:16]}.get(kind, b"")
    assert events(magic + data, salvage=True) <= len(data)
