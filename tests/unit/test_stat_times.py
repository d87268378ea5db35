# SPDX-License-Identifier: MIT
"""Histograms: the kernel's buckets are the ones that are read out, and quantiles are near."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.probes.schema import HERE
from kvmprobe.stat.histogram import BUCKETS, Times, bucket_start

TIMES = st.integers(0, bucket_start(BUCKETS) - 1)


@pytest.fixture(scope="module")
def bucket_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], int]:
    """bucket_of() of probes/stat.h, compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt install gcc")
    found = re.search(r"^static __always_inline u32 bucket_of.*?^}", _header(), re.S | re.M)
    assert found is not None
    text = (
        f"#include <stdint.h>\n#define BUCKETS {BUCKETS}\n"
        "typedef uint64_t u64; typedef uint32_t u32;\n"
        + found[0].replace("static __always_inline u32", "u32")
    )
    directory = tmp_path_factory.mktemp("buckets")
    source, library = directory / "b.c", directory / "b.so"
    source.write_text(text)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).bucket_of
    function.argtypes, function.restype = (ctypes.c_uint64,), ctypes.c_uint32
    return lambda ns: int(function(ns))


def _header() -> str:
    return (Path(HERE) / "stat.h").read_text(encoding="utf-8")


def test_every_bucket_is_the_kernels(bucket_of: Callable[[int], int]) -> None:
    for bucket in range(BUCKETS):
        assert bucket_of(bucket_start(bucket)) == bucket
        assert bucket_of(bucket_start(bucket + 1) - 1) == bucket
    assert bucket_of((1 << 64) - 1) == BUCKETS - 1


def test_buckets_are_narrow() -> None:
    starts = [bucket_start(bucket) for bucket in range(BUCKETS + 1)]
    for start, end in itertools.pairwise(starts):
        assert 0 < end - start <= max(32, start / 8)


def times_of(values: list[int]) -> Times:
    starts = [bucket_start(bucket) for bucket in range(BUCKETS)]
    buckets = np.searchsorted(starts, values, "right") - 1
    histogram = np.bincount(buckets, minlength=BUCKETS).astype(np.int64)
    return Times(len(values), sum(values), min(values), max(values), histogram)


@given(st.lists(TIMES, min_size=1, max_size=200), st.sampled_from([0.5, 0.99, 1.0]))
def test_quantiles_are_near(values: list[int], part: float) -> None:
    times = times_of(values)
    got = times.quantile(part)
    assert min(values) <= got <= max(values)
    rank = max(int(np.ceil(part * len(values))) - 1, 0)
    true = sorted(values)[rank]
    assert abs(got - true) <= max(32, true / 8)


@given(st.lists(TIMES, min_size=1), st.lists(TIMES, min_size=1))
def test_sums_are_as_if_measured_together(first: list[int], second: list[int]) -> None:
    together, added = times_of(first + second), times_of(first) + times_of(second)
    assert (added.count, added.total, added.min, added.max) == (
        together.count,
        together.total,
        together.min,
        together.max,
    )
    assert (added.histogram == together.histogram).all()
    assert added.mean == pytest.approx(np.mean(np.array(first + second, float)))
