# SPDX-License-Identifier: MIT
"""Batches as DataFrames: names for what the numbers mean, and no value changed on the way.

64-bit columns stay uint64: pandas would turn them into floats, wrong above 2**53, wherever it has
to put a missing value in.  What can be missing has a nullable dtype instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvmprobe.probes.schema import (
    FIELDS,
    NO_VCPU,
    Columns,
    Flag,
    MemslotChange,
    Site,
    Type,
)

Header = Mapping[str, Any]

#: Rows of findings that a notebook shows.
_SHOWN = 100

#: Derived columns and the fields they are made of.
_MADE_OF = {"time": "ts", "level": "flags", "address_space": "flags"}
#: The columns of an events frame.
EVENT_COLUMNS = ("time", *(f.name for f in FIELDS), "level", "address_space")
#: Bytes a row takes in an events frame.
COLUMN_BYTES = {
    **{f.name: np.dtype(f.dtype).itemsize for f in FIELDS},
    **{"time": 8, "vcpu": 5, "level": 1, "address_space": 2},
}


def fields_of(wanted: Sequence[str]) -> set[str]:
    """The fields of an event that the columns `wanted` of an events frame are made of."""
    return {_MADE_OF.get(name, name) for name in wanted}


def events_frame(
    columns: Columns, header: Header, wanted: Sequence[str] = EVENT_COLUMNS
) -> pd.DataFrame:
    """Events as they are, one a row.

    `wanted` names its columns, of `EVENT_COLUMNS`: the fields of the event, and `time`
    (datetime64[ns, UTC]; NaT in a capture without a clock), `level` (L1, L2, unknown) and
    `address_space` (Int8, NA where unknown).  `type` and `site` are categoricals, `vcpu` is Int32
    (NA: no vCPU); the other fields keep their dtypes.
    """
    return _frame({name: _EVENT[name](columns, header) for name in wanted})


def fills_frame(columns: Columns, header: Header) -> pd.DataFrame:
    """FILL and CACHE events: the MMIO cache as written or as found, one a row."""
    flags = columns["flags"]
    return _frame(
        {
            **_who(columns, header),
            "observation": _EVENT["type"](columns, header),
            "site": _EVENT["site"](columns, header),
            "level": _level(columns, header),
            "address_space": _address_space(columns, header),
            "gpa": columns["addr"],
            "gva": columns["value"],
            "access": columns["kind"],
            "mmio_gen": columns["gen"],
            "current_gen_low": columns["aux"],
            "slot": columns["slot"],
            "slot_known": _has(flags, Flag.SLOT_KNOWN),
            "slot_presumed": _has(flags, Flag.SLOT_PRESUMED),
            "slot_readonly": _has(flags, Flag.SLOT_READONLY),
            "slot_invalid": _has(flags, Flag.SLOT_INVALID),
            "unstable": _has(flags, Flag.UNSTABLE),
            "direct": _has(flags, Flag.DIRECT),
            "nested_mmu": _has(flags, Flag.NESTED_MMU),
            "flags": flags,
        }
    )


def memslots_frame(columns: Columns, header: Header) -> pd.DataFrame:
    """MEMSLOT events: what happened to memslots, one change a row."""
    return _frame(
        {
            **_who(columns, header),
            "address_space": columns["len"],
            "id": columns["slot"],
            "change": _named(columns["kind"], MemslotChange),
            "base_gpa": columns["addr"],
            "npages": columns["value"],
            "generation": columns["gen"],
            "slot_flags": columns["aux"],
        }
    )


class FindingsFrame(pd.DataFrame):
    """Findings, one a row; a notebook shows them with addresses as people write them."""

    @property
    def _constructor(self) -> type[FindingsFrame]:
        return FindingsFrame

    def _repr_html_(self) -> str:
        from kvmprobe.analysis.html import table

        shown = self.head(_SHOWN)
        rows = [
            [
                f"0x{value:x}" if name == "gpa" else value
                for name, value in zip(shown, row, strict=True)
            ]
            for row in shown.itertuples(index=False, name=None)
        ]
        more = f"; the first {_SHOWN} are shown" if len(self) > _SHOWN else ""
        return table(f"{len(self):,} findings{more}", tuple(map(str, shown)), rows)


def _frame(data: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(data, copy=False)


def _who(columns: Columns, header: Header) -> dict[str, Any]:
    return {
        "time": _time(columns, header),
        "ts": columns["ts"],
        "vm": columns["vm"],
        "vcpu": _vcpu(columns, header),
        "seq": columns["seq"],
    }


def wall_time(ts: NDArray[np.uint64], header: Header) -> pd.DatetimeIndex:
    """CLOCK_MONOTONIC ns as UTC; NaT when the header has no pair of clocks."""
    clock = header["clock"]
    if clock["wall_ns"] is None or clock["monotonic_ns"] is None:
        return pd.DatetimeIndex(np.full(len(ts), "NaT", "M8[ns]"), tz="UTC")
    offset = np.uint64((clock["wall_ns"] - clock["monotonic_ns"]) % (1 << 64))
    return pd.DatetimeIndex((ts + offset).view("M8[ns]"), tz="UTC")


def _time(columns: Columns, header: Header) -> pd.DatetimeIndex:
    return wall_time(columns["ts"], header)


def _vcpu(columns: Columns, _: Header) -> pd.arrays.IntegerArray:
    vcpu = columns["vcpu"]
    return pd.arrays.IntegerArray(vcpu.astype(np.int32), vcpu == NO_VCPU)


def _named(values: NDArray[Any], enum: type[IntEnum]) -> pd.Categorical[str]:
    """Numbers as the names of an enum; NaN for those it doesn't have."""
    codes = np.full(256, -1, np.int8)
    codes[list(enum)] = range(len(enum))
    return pd.Categorical.from_codes(codes[values], pd.Index([member.name for member in enum]))


def _has(flags: NDArray[np.uint32], flag: Flag) -> NDArray[np.bool_]:
    has: NDArray[np.bool_] = (flags & np.uint32(flag)) != 0
    return has


def _level(columns: Columns, _: Header) -> pd.Categorical[str]:
    flags = columns["flags"]
    codes = np.where(_has(flags, Flag.LEVEL_KNOWN), _has(flags, Flag.L2), 2).astype(np.int8)
    return pd.Categorical.from_codes(codes, pd.Index(["L1", "L2", "unknown"]))


def _address_space(columns: Columns, _: Header) -> pd.arrays.IntegerArray:
    flags = columns["flags"]
    return pd.arrays.IntegerArray(
        _has(flags, Flag.SMM).astype(np.int8), ~_has(flags, Flag.AS_KNOWN)
    )


def _plain(name: str) -> Callable[[Columns, Header], Any]:
    return lambda columns, _: columns[name]


_EVENT: dict[str, Callable[[Columns, Header], Any]] = {
    **{f.name: _plain(f.name) for f in FIELDS},
    "time": _time,
    "vcpu": _vcpu,
    "type": lambda columns, _: _named(columns["type"], Type),
    "site": lambda columns, _: _named(columns["site"], Site),
    "level": _level,
    "address_space": _address_space,
}
