# SPDX-License-Identifier: MIT
"""candidates() against the C function that BPF runs, compiled here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.analysis.candidates import Selection, beliefs, candidates
from kvmprobe.analysis.rules import RULES
from kvmprobe.probes.schema import HEADER, Flag, Type

_SOURCE = """
#include <stdint.h>
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
typedef int16_t s16;
#include "{header}"
void mask(long n, const u8 *type, const u32 *flags, const s16 *slot, u8 *out)
{{
	for (long i = 0; i < n; i++)
		out[i] = kvmprobe_candidate(type[i], flags[i], slot[i]);
}}
"""


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    gcc = shutil.which("gcc") or shutil.which("cc")
    if gcc is None:
        pytest.skip("no C compiler: install gcc")
    place = tmp_path_factory.mktemp("candidates")
    (place / "mask.c").write_text(_SOURCE.format(header=HEADER.resolve()))
    library = place / "mask.so"
    command = [gcc, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(place / "mask.c")], check=True)
    return ctypes.CDLL(str(library))


def _compare(
    library: ctypes.CDLL, kind: NDArray[Any], flags: NDArray[Any], slot: NDArray[Any]
) -> int:
    columns: dict[str, NDArray[Any]] = {
        "type": np.ascontiguousarray(kind, np.uint8),
        "flags": np.ascontiguousarray(flags, np.uint32),
        "slot": np.ascontiguousarray(slot, np.int16),
    }
    out = np.zeros(len(columns["type"]), np.uint8)
    library.mask(
        ctypes.c_long(len(out)),
        *(ctypes.c_void_p(column.ctypes.data) for column in columns.values()),
        ctypes.c_void_p(out.ctypes.data),
    )
    mine = candidates(columns)
    assert mine.dtype == np.bool_
    np.testing.assert_array_equal(mine, out.astype(bool))
    return int(out.sum())


def test_all_types_and_slots(in_c: ctypes.CDLL) -> None:
    kinds = np.repeat(np.arange(256), 1 << 16)
    slots = np.tile(np.arange(-(1 << 15), 1 << 15), 256)
    for flags in (
        0, 0xFFFFFFFF, Flag.PRESENT, Flag.BELIEVED, Flag.STUCK, Flag.SMM, Flag.OTHER_AS,
        Flag.SMM_SEEN, Flag.SMM_SEEN | Flag.GEN_IS_CURRENT,
    ):  # fmt: skip
        found = _compare(in_c, kinds, np.full(len(kinds), int(flags)), slots)
        assert 0 < found < len(kinds)


def test_all_types_and_flags(in_c: ctypes.CDLL) -> None:
    kinds, bits = np.meshgrid(np.arange(256), np.uint32(1) << np.arange(32, dtype=np.uint32))
    for slot in (-1, 0, 32763, 32764, 32767, -32768):
        assert _compare(in_c, kinds.ravel(), bits.ravel(), np.full(kinds.size, slot)) > 0


@given(st.integers(0, 2**32 - 1))
def test_random(in_c: ctypes.CDLL, seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = 500
    kinds = random.integers(0, 20, shape)
    flags, slots = random.integers(0, 2**32, shape), random.integers(-2, 32768, shape)
    assert _compare(in_c, kinds, flags, slots) >= 0


def test_every_watched_type_has_candidates() -> None:
    for rule in RULES:
        for kind in rule.watches:
            columns: dict[str, NDArray[Any]] = {
                "type": np.array([kind, kind], np.uint8),
                "flags": np.array([0, 0xFFFFFFFF], np.uint32),
                "slot": np.array([32766, -1], np.int16),
            }
            assert candidates(columns).any(), (rule.id, Type(kind).name)


def test_selection_of_types_picks_candidates_of_those() -> None:
    random = np.random.default_rng(5)
    columns: dict[str, NDArray[Any]] = {
        "type": random.integers(1, 15, 5000).astype(np.uint8),
        "flags": random.integers(0, 2**27, 5000).astype(np.uint32),
        "slot": random.choice((-1, 5, 32764), 5000).astype(np.int16),
    }
    for types in ({Type.FILL, Type.MATCH}, {Type.MMIO}, {Type.FAULT, Type.GENERATION}):
        wanted = candidates(columns) & np.isin(columns["type"], [int(t) for t in types])
        np.testing.assert_array_equal(Selection(types).pick(columns), np.flatnonzero(wanted))


def test_bulk_of_an_ordinary_guest_is_no_candidate() -> None:
    usual = Flag.LEVEL_KNOWN | Flag.AS_KNOWN | Flag.TWO_AS | Flag.SLOT_KNOWN | Flag.DIRECT
    live = Flag.GEN_KNOWN | Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT | Flag.FILL_AS_KNOWN
    for flags in (usual | live, usual | live | Flag.SMM_SEEN):
        columns: dict[str, NDArray[Any]] = {
            "type": np.array([Type.FAULT, Type.FILL, Type.MATCH, Type.MMIO], np.uint8),
            "flags": np.full(4, int(flags), np.uint32),
            "slot": np.full(4, -1, np.int16),
        }
        assert not candidates(columns).any()


def test_a_belief_is_told_by_its_match_or_by_the_mmio_that_took_its_place() -> None:
    matched = Flag.MATCHED
    events = [
        (Type.MATCH, Flag(0), 3, True),
        (Type.MMIO, matched, 3, False),  # its MATCH was sent: memory stands there
        (Type.MMIO, matched, -1, True),
        (Type.MMIO, Flag(0), -1, False),
        (Type.MMIO, matched | Flag.OTHER_AS, -1, False),
        (Type.MMIO, matched | Flag.SMM_SEEN, -1, False),
        (Type.MMIO, matched | Flag.SMM_SEEN | Flag.GEN_IS_CURRENT, -1, True),
        (Type.FAULT, matched, -1, False),
    ]
    columns: dict[str, NDArray[Any]] = {
        "type": np.array([kind for kind, *_ in events], np.uint8),
        "flags": np.array([flags for _, flags, *_ in events], np.uint32),
        "slot": np.array([slot for *_, slot, _ in events], np.int16),
    }
    assert beliefs(columns).tolist() == [told for *_, told in events]
