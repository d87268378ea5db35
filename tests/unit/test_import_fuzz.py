# SPDX-License-Identifier: MIT
"""A short run of tests/fuzz_import.py: damaged traces give events or CaptureError, nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz_import import KINDS, base, damaged, read


@pytest.mark.parametrize("kind", KINDS)
def test_undamaged(kind: str) -> None:
    assert read(kind, base(kind), salvage=False) > 10


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(seed=st.integers(0, 2**63), salvage=st.booleans())
def test_damaged(kind: str, seed: int, salvage: bool) -> None:
    events = read(kind, damaged(kind, seed), salvage=salvage)
    # Each byte of a trace can stand for one event at most.
    assert -1 <= events <= 2 * len(base(kind))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(data=st.binary(max_size=300))
def test_any_bytes_after_the_magic(kind: str, data: bytes) -> None:
    magic = {"trace.dat": base(kind)[:12], "perf.data": base(kind)[:16]}.get(kind, b"")
    assert read(kind, magic + data, salvage=True) <= len(data)
