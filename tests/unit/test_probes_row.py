# SPDX-License-Identifier: MIT
"""The row of equal faults without progress that the probe counts: its C, compiled here."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable

import pytest

from kvmprobe.probes.schema import HERE, Flag

_SECOND = 10**9
_SOURCE = """
#include <stdint.h>
#include <string.h>
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
typedef int16_t s16;
#include "{header}"
#undef __always_inline
#define __always_inline inline
#define OFF_VCPU_PF_TAKEN 0
{structs}
static u64 now_ns;
static u64 bpf_ktime_get_ns(void) {{ return now_ns; }}
static int bpf_probe_read_kernel(void *to, u32 n, const void *from)
{{
	if (from)
		memcpy(to, from, n);
	return !from;
}}
static u32 lost;
static void count(u32 cause, u8 type) {{ lost++; }}
{function}
static struct vcpu_state st;
void begin(void) {{ memset(&st, 0, sizeof(st)); lost = 0; }}
u32 fault(u64 now, u64 *counters, u64 addr, u64 error)
{{
	now_ns = now;
	return test_row(&st, (u64)counters, addr, error);
}}
u32 losses(void) {{ return lost; }}
"""

#: (time in ns, address, error code, taken, fixed, emulate, spurious) -> told
Fault = Callable[..., bool]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    gcc = shutil.which("gcc") or shutil.which("cc")
    if gcc is None:
        pytest.skip("no C compiler: install gcc")
    state, faults = ((HERE / name).read_text() for name in ("state.h", "faults.bpf.c"))
    wanted = r"^struct (?:mmio_cache|open_calls|slot_memo|vcpu_state) \{.*?^\};"
    structs = re.findall(wanted, state, re.M | re.S)
    assert len(structs) == 4
    function = re.search(r"^#define ROW_LENGTH.*?^\}", faults, re.M | re.S)
    assert function is not None
    place = tmp_path_factory.mktemp("row")
    text = _SOURCE.format(
        header=(HERE / "events.h").resolve(), structs="\n".join(structs), function=function[0]
    )
    (place / "row.c").write_text(text)
    command = [gcc, "-O2", "-shared", "-fPIC", "-o", str(place / "row.so"), str(place / "row.c")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(place / "row.so"))


@pytest.fixture
def fault(library: ctypes.CDLL) -> Fault:
    library.begin()

    def fault(now: int, addr: int = 0x5000, error: int = 3, *counters: int) -> bool:
        values = (ctypes.c_uint64 * 4)(*counters)
        said = library.fault(
            ctypes.c_uint64(now), values, ctypes.c_uint64(addr), ctypes.c_uint64(error)
        )
        assert said in (0, Flag.STUCK)
        return bool(said)

    return fault


def _row(fault: Fault, count: int, step: int, first: int = 1, start: int = 5) -> list[int]:
    """Repeat one fault `count` times, `step` ns apart; return the numbers of those told."""
    return [
        n for n in range(first, first + count) if fault(start + n * step, 0x5000, 3, n, 7, 8, 9)
    ]


def test_told_at_a_thousand_and_at_each_doubling(fault: Fault) -> None:
    assert _row(fault, 9000, 2 * 10**6) == [1000, 2000, 4000, 8000]


def test_not_told_before_a_second(fault: Fault) -> None:
    assert _row(fault, 10_000, 10**5) == []
    assert _row(fault, 1, 10**5, first=10_001) == [10_001]


@pytest.mark.parametrize("which", ["fixed", "emulate", "spurious", "address", "error", "not taken"])
def test_anything_that_differs_ends_the_row(fault: Fault, which: str) -> None:
    assert _row(fault, 999, 2 * 10**6) == []
    counters = {"taken": 1000, "fixed": 7, "emulate": 8, "spurious": 9}
    addr, error = 0x5000, 3
    if which == "address":
        addr += 8
    elif which == "error":
        error = 1
    elif which == "not taken":
        counters["taken"] = 999
    else:
        counters[which] += 1
    assert not fault(2 * _SECOND + 5, addr, error, *counters.values())


def test_a_new_row_begins_after_the_old(fault: Fault) -> None:
    assert _row(fault, 1500, 2 * 10**6) == [1000]
    assert not fault(4 * _SECOND, 0x9000, 3, 1501, 7, 8, 9)
    assert _row(fault, 1001, 2 * 10**6, first=1502, start=4 * _SECOND) == [1502 + 999]


def test_counters_that_cannot_be_read_are_counted(library: ctypes.CDLL) -> None:
    library.begin()
    said = library.fault(ctypes.c_uint64(5), None, ctypes.c_uint64(1), ctypes.c_uint64(1))
    assert (said, library.losses()) == (0, 1)
