# SPDX-License-Identifier: MIT
"""Captures of every schema version stay readable, for ever."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvmprobe.probes import schema
from kvmprobe.store.reader import CaptureReader

GOLDEN = Path(__file__).parents[1] / "data/golden"


def rows_1_0() -> NDArray[Any]:
    """The events of schema-1.0.kvmprobe: each field another multiple of its row's number."""
    dtype = [("ts", "<u8"), ("vm", "<u4"), ("seq", "<u4"), ("vcpu", "<u2"), ("type", "u1")]
    dtype += [("site", "u1"), ("flags", "<u4"), ("addr", "<u8"), ("value", "<u8"), ("gen", "<u8")]
    dtype += [("aux", "<u4"), ("slot", "<i2"), ("kind", "u1"), ("len", "u1")]
    rows = np.zeros(140, dtype)
    number = np.arange(140, dtype=np.uint64)
    for i, (name, code) in enumerate(dtype):
        # Odd, so that all bits of every width are in use.
        factor = np.uint64(0x9E3779B97F4A7C15 * (2 * i + 1) % (1 << 64))
        rows[name] = ((number * factor) >> np.uint64(64 - 8 * np.dtype(code).itemsize)).astype(
            np.dtype(code)
        )
    rows["type"] = number % np.uint64(14) + np.uint64(1)
    return rows


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.kvmprobe")), ids=lambda path: path.name)
def test_golden_captures_are_whole(path: Path) -> None:
    with CaptureReader(path) as reader:
        expected = reader.count()
        assert reader.header["schema"]["major"] == schema.SCHEMA_MAJOR
        assert sum(len(batch["ts"]) for batch in reader.batches()) == expected > 0
        assert (reader.damaged, reader.truncated, reader.unknown_events) == ([], None, {})


def test_schema_1_0_gives_the_events_it_was_made_of() -> None:
    expected = rows_1_0()
    with CaptureReader(GOLDEN / "schema-1.0.kvmprobe") as reader:
        assert reader.header["schema"] == {"major": 1, "minor": 0}
        assert reader.header["command"] == ["made", "by", "hand"]
        batches = list(reader.batches())
        losses = [loss for info in reader.infos() for loss in info.losses]
    assert [len(batch["ts"]) for batch in batches] == [100, 40]
    for name in expected.dtype.names or ():
        got = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_array_equal(got, expected[name])
    assert len(losses) == 10
    assert losses[0].records == int(expected["addr"][13])
