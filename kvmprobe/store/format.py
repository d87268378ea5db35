# SPDX-License-Identifier: MIT
"""What writer and reader of a capture agree on.

A capture is an Arrow IPC stream with lz4 buffers; any Arrow library reads it.  Its schema is
`schema.arrow_schema()` with two entries of metadata:

    kvmprobe        the header, a JSON object (docs/design.md, "The capture's header")
    kvmprobe.crc32  8 hexadecimal digits: crc32 of the header's bytes, a newline and `signature()`

Each record batch is one drain's worth and carries two entries of metadata:

    kvmprobe        a JSON object: "index" (of the batch, from 0), "first" (events before it),
                    "events" (in it), "crc32" (of the raw little-endian bytes of each column, in
                    the schema's order) and "losses" (what its LOSS events say: a list of
                    {"observation", "cpu", "cause", "records"})
    kvmprobe.crc32  8 hexadecimal digits: crc32 of that object's bytes, begun with the value of
                    the schema's kvmprobe.crc32, so that no batch passes for one of another capture

The stream ends with Arrow's end mark; a file without it was cut.  Within a major version columns
and observations are only added: a reader ignores columns it doesn't know, fills columns an older
minor version lacks with 0, and counts events of types it doesn't know.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from kvmprobe import __version__
from kvmprobe.errors import CaptureError
from kvmprobe.probes import schema

KEY = b"kvmprobe"
KEY_CRC = b"kvmprobe.crc32"
#: In a capture as Parquet: what its reading showed that it was made of, and the checksum.
KEY_END = b"kvmprobe.end"
KEY_END_CRC = b"kvmprobe.end.crc32"
#: A Parquet file begins and ends with this.
PARQUET = b"PAR1"

#: Most rows in a batch, 7 MiB of events: what a writer and a reader need memory for.
MAX_ROWS = 1 << 17
#: Most bytes of a message's metadata; the header is in one.
MAX_METADATA = 4 << 20
#: A message begins with this, then the length of its metadata: 0 for the end mark.
MESSAGE = b"\xff\xff\xff\xff"
#: The numpy type code of each column of this schema version.
CODES = {f.name: f.dtype.lstrip("<") for f in schema.FIELDS}


def signature(columns: Iterable[tuple[str, str]]) -> bytes:
    """The columns as checked text: pairs of name and numpy type code (such as "u8" for 64 bits)."""
    return ",".join(f"{name}:{code}" for name, code in columns).encode()


def header_crc(header: bytes, columns: Iterable[tuple[str, str]]) -> int:
    """The checksum of a capture's header and columns."""
    return zlib.crc32(header + b"\n" + signature(columns))


def encode_crc(crc: int) -> bytes:
    """A checksum as 8 hexadecimal digits."""
    return b"%08x" % crc


def parse_header(text: bytes) -> dict[str, Any]:
    """Parse and check an untrusted header; raises CaptureError."""
    try:
        header = json.loads(text, parse_constant=_refuse_constant)
        # A lone surrogate would make every later print() fail.
        json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise CaptureError("the header is no JSON object") from None
    check_version(header)
    check_header(header)
    return dict(header)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class _Map:
    """An object of any keys whose values have one shape."""

    def __init__(self, shape: object) -> None:
        self.shape = shape


_NAME = (str, type(None))
_NUMBER = (int, type(None))
_FILTER = (int, str, list, type(None))

#: The header's shape: an object's keys, a list's elements, or the types allowed.
_HEADER: Mapping[str, object] = {
    "schema": {"major": (int,), "minor": (int,)},
    "tool": {"name": (str,), "version": (str,)},
    "started": _NAME,
    "clock": {"monotonic_ns": _NUMBER, "wall_ns": _NUMBER},
    "source": {"kind": (str,), "note": _NAME},
    "host": {
        "boot_id": _NAME,
        "machine": _NAME,
        "kernel": _NAME,
        "vendor": _NAME,
        "modules": _Map(_NAME),
        "parameters": _Map(_NAME),
    },
    "layout": _Map((int,)),
    "plan": [
        {
            "observation": (str,),
            "site": _NAME,
            "attachment": _NAME,
            "attached": (bool,),
            "reason": _NAME,
        }
    ],
    "filters": {"pid": _FILTER, "vm": _FILTER, "vcpu": _FILTER},
    "command": [(str,)],
}


def new_header(kind: str) -> dict[str, Any]:
    """A header of source `kind` ("live" or "converted") with every key, nothing known yet."""
    return {
        "schema": {"major": schema.SCHEMA_MAJOR, "minor": schema.SCHEMA_MINOR},
        "tool": {"name": "kvmprobe", "version": __version__},
        "started": None,
        "clock": {"monotonic_ns": None, "wall_ns": None},
        "source": {"kind": kind, "note": None},
        "host": {
            "boot_id": None,
            "machine": None,
            "kernel": None,
            "vendor": None,
            "modules": {},
            "parameters": {},
        },
        "layout": {},
        "plan": [],
        "filters": {"pid": None, "vm": None, "vcpu": None},
        "command": [],
    }


def check_header(header: object) -> None:
    """Check that a header has every key of docs/design.md with a value of its type.

    Keys beyond those are allowed: a newer minor version may add some.  Raises CaptureError that
    names the first key that is wrong.
    """
    if not isinstance(header, dict):
        raise CaptureError("the header is no object")
    _check(header, _HEADER, "")
    if header["source"]["kind"] not in ("live", "converted"):
        raise CaptureError("the header's source.kind is neither live nor converted")
    started = header["started"]
    if started is not None:
        try:
            known = datetime.fromisoformat(started).utcoffset() is not None
        except ValueError:
            known = False
        if not known:
            raise CaptureError("the header's started is no RFC 3339 time with an offset")


def _check(value: object, shape: object, where: str) -> None:
    if isinstance(shape, tuple):
        # Not isinstance(): a bool is no number here.
        if type(value) not in shape:
            raise CaptureError(f"the header's {where} has a wrong type")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise CaptureError(f"the header's {where} is out of range")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise CaptureError(f"the header's {where} is no list")
        for i, element in enumerate(value):
            _check(element, shape[0], f"{where}[{i}]")
    elif not isinstance(value, dict):
        raise CaptureError(f"the header's {where} is no object")
    elif isinstance(shape, _Map):
        for key, element in value.items():
            _check(element, shape.shape, f"{where}.{printable(key)}")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            name = f"{where}.{key}" if where else key
            if key not in value:
                raise CaptureError(f"the header lacks {name}")
            _check(value[key], inner, name)


def printable(text: str, longest: int = 60) -> str:
    """Text of an untrusted file, fit for one line of a message."""
    return re.sub(r"[^ -~]", "?", text[:longest])


def number(value: object) -> int:
    """A count of at most 64 bits in untrusted JSON; raises ValueError when it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError("no count")
    return value


def check_version(header: object) -> None:
    """Refuse another major version, before anything else of the header is looked at."""
    version = header.get("schema") if isinstance(header, dict) else None
    try:
        major, minor = number(version["major"]), number(version["minor"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise CaptureError("the header names no schema version") from None
    if major > schema.SCHEMA_MAJOR:
        raise CaptureError(
            f"written by a newer kvmprobe (schema {major}.{minor}); "
            f"this one reads {schema.SCHEMA_MAJOR}.x; upgrade kvmprobe"
        )
    if major < schema.SCHEMA_MAJOR:
        raise CaptureError(f"the header names schema {major}.{minor}, which never was")


def places(columns: Sequence[tuple[str, str]], minor: int) -> dict[str, int]:
    """Where each column this kvmprobe knows stands among those of the file: name -> index.

    Raises CaptureError when they are not those of schema version 1.`minor`.
    """
    places = {name: i for i, (name, _) in enumerate(columns)}
    codes = dict(columns)
    if len(codes) != len(columns):
        raise CaptureError("a column is there twice")
    for name, code in codes.items():
        if name not in CODES and minor <= schema.SCHEMA_MINOR:
            raise CaptureError(f"a column {name!r} that its schema version doesn't have")
        if code != CODES.get(name, code):
            raise CaptureError(f"column {name} holds {code}, not {CODES[name]}")
    for name in CODES:
        # The first version already had the type, and nothing can be read without it.
        if name not in codes and (minor >= schema.SCHEMA_MINOR or name == "type"):
            raise CaptureError(f"column {name} is missing")
    return {name: place for name, place in places.items() if name in CODES}
