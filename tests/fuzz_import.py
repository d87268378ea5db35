# SPDX-License-Identifier: MIT
"""Damaged traces for the importers: python -m tests.fuzz_import KIND COUNT SEED [SECONDS]

KIND is ftrace, perf-script, trace.dat or perf.data.  Each input is a real trace, cut, with bits
turned, numbers replaced by those that hurt, pieces moved or doubled; it may only give events or
CaptureError, with and without salvage.  The run fails on anything else, on an input that takes more
than ten seconds, and when the process needs more than 1 GiB.  After SECONDS it ends.
"""

from __future__ import annotations

import io
import lzma
import resource
import signal
import sys
import time
from functools import cache

import numpy as np

from kvmprobe.errors import CaptureError
from kvmprobe.formats.detect import Source
from tests.traces import TRACES, path_of, translated

KINDS = ("ftrace", "perf-script", "trace.dat", "perf.data")
_HURT = (0, 1, 7, 8, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
_SECONDS = 10


@cache
def base(kind: str) -> bytes:
    """The trace that is damaged: the end of a real one."""
    if kind in ("trace.dat", "perf.data"):
        return lzma.decompress((TRACES / f"small.{kind}.xz").read_bytes())
    name = "ftrace.txt" if kind == "ftrace" else "perf.txt"
    text = lzma.decompress(path_of("intel-6.1", name).read_bytes())
    return b"".join(text.splitlines(keepends=True)[580:700])


def damaged(kind: str, seed: int) -> bytes:
    """One damaged trace; equal for equal seeds."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    data = bytearray(base(kind))
    for _ in range(int(rng.integers(1, 9))):
        at, size = int(rng.integers(0, len(data) or 1)), int(rng.integers(1, 200))
        what = int(rng.integers(0, 7))
        if not data:
            break
        if what == 0:
            del data[at:]
        elif what == 1:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif what == 2:
            width = int(rng.choice([1, 2, 4, 8]))
            value = _HURT[int(rng.integers(0, len(_HURT)))]
            data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif what == 3:
            del data[at : at + size]
        elif what == 4:
            data[at:at] = data[at : at + size]
        elif what == 5:
            data[at : at + size] = rng.integers(0, 256, size, np.uint8).tobytes()
        else:
            other = int(rng.integers(0, len(data)))
            data[at:at] = data[other : other + size]
    return bytes(data)


def read(kind: str, data: bytes, *, salvage: bool) -> int:
    """Read a trace; returns the number of events, -1 when it was refused."""
    file = io.BytesIO(data)
    source = Source("ftrace" if kind in KINDS[:2] else kind, file, file)
    try:
        events, _ = translated(source, salvage=salvage)
    except io.UnsupportedOperation:
        # A form that is left to perf itself, which needs a real file.
        return -1
    except CaptureError as error:
        if "\n" in str(error):
            raise AssertionError("more than one line") from error
        return -1
    return len(events)


def main(kind: str, count: int, seed: int, most: float = float("inf")) -> None:
    """Try `count` inputs from `seed` on, for at most so many seconds."""
    started = time.monotonic()
    refused = tried = 0
    for number in range(seed, seed + count):
        if time.monotonic() - started > most:
            break
        tried += 1
        signal.alarm(_SECONDS)
        try:
            refused += read(kind, damaged(kind, number), salvage=bool(number & 1)) < 0
        except BaseException:
            print(f"{kind}: seed {number}", file=sys.stderr)
            raise
    signal.alarm(0)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    seconds = time.monotonic() - started
    print(f"{kind}: {tried} inputs from seed {seed}, {refused} refused, {seconds:.0f} s, {mib} MiB")
    if mib > 1024:
        raise SystemExit(f"{kind}: {mib} MiB")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:5]))
