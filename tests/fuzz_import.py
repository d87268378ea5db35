# SPDX-License-Identifier: MIT
"""Damaged traces for the importers: python -m tests.fuzz_import KIND COUNT [--seed N] ...

KIND is a kind of trace, or gzip, xz or zstd: text packed so.  Each input is a small real trace,
cut, with bits turned, numbers and words replaced by those that hurt, pieces moved or doubled.  It
may only give events or CaptureError, with and without salvage.  The run fails, naming the seed, on
anything else, on an input that takes more than ten seconds of CPU or makes the process grow by more
than 512 MiB, and where the compiled readers, which check each index here, and those that work by
columns don't give the same (tried on one input of --compare).
"""

from __future__ import annotations

import argparse
import gzip
import io
import lzma
import os
import random
import resource
import signal
import sys
import time
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from kvmprobe.errors import CaptureError
from kvmprobe.formats import raw
from kvmprobe.formats.compiled import Loops, loops
from kvmprobe.formats.detect import detect
from tests.traces import TRACES, path_of, translated

PACKED = ("gzip", "xz", "zstd")
KINDS = ("ftrace", "perf-script", "trace.dat", "perf.data", *PACKED)
_HURT = (0, 1, 7, 8, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
_WORDS = (
    b"\n", b" ", b":", b"18446744073709551616", b"99999999999999999", b"0x", b"ffffffffffffffff0",
    b"-1", b" [000] ", b" [65536] ", b"(   4000)", b"1/2", b"CPU:1 [LOST 17 EVENTS]\n", b"#", b"\0",
    b"kvm_nested_vmenter:", b"kvm_smm_transition: vcpu 0: entering SMM", b" failed\n",
    b"vcpu 65535",
)  # fmt: skip
_SECONDS = 10
_GROWTH = 512 << 20


@cache
def base(kind: str) -> bytes:
    """The trace that is damaged: the end of a real one."""
    if kind in ("trace.dat", "perf.data"):
        return lzma.decompress((TRACES / f"small.{kind}.xz").read_bytes())
    name = "perf.txt" if kind == "perf-script" else "ftrace.txt"
    text = lzma.decompress(path_of("intel-6.1", name).read_bytes())
    text = b"".join(text.splitlines(keepends=True)[585:650])
    if kind == "zstd":
        import pyarrow as pa

        packed: bytes = pa.Codec("zstd").compress(text, asbytes=True)
        return packed
    if kind == "gzip":
        return gzip.compress(text)
    return lzma.compress(text) if kind == "xz" else text


def _body(kind: str) -> tuple[int, int]:
    """Where the records of a kind's trace stand; the rest of a binary file is its header."""
    size = len(base(kind))
    if kind == "perf.data":
        begin, length = (int.from_bytes(base(kind)[at : at + 8], "little") for at in (40, 48))
        return begin, begin + length
    return size - (16384 if kind == "trace.dat" else size), size


def damaged(kind: str, seed: int) -> bytes:
    """One damaged trace; equal for equal seeds."""
    rng = random.Random(seed << 4 | KINDS.index(kind))
    data = bytearray(base(kind))
    binary = kind not in KINDS[:2]
    begin, end = _body(kind)
    # A binary file whose bytes moved is soon refused: mostly they stay in place.
    ways = (0, 1, 1, 2, 2, 2, 3, 4, 5, 5, 6) if binary else range(8)
    for _ in range(rng.randint(1, 4 if binary else 8)):
        draw = [rng.getrandbits(62) for _ in range(4)]
        if not data:
            break
        what, at, size = ways[draw[0] % len(ways)], draw[1] % len(data), 1 + draw[2] % 200
        if draw[3] & 1 << 40 and begin < len(data):
            at = begin + draw[1] % (min(end, len(data)) - begin)
        if what == 0:
            # A cut leaves little to damage: others come more often.
            del data[at if draw[3] % 4 == 0 else len(data) :]
        elif what == 1:
            data[at] ^= 1 << draw[3] % 8
        elif what == 2:
            width = 1 << draw[2] % 4
            value = _HURT[draw[3] % len(_HURT)]
            data[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif what == 3:
            del data[at : at + size]
        elif what == 4:
            data[at:at] = data[at : at + size]
        elif what == 5:
            data[at : at + size] = rng.randbytes(size)
        elif what == 6:
            other = draw[3] % len(data)
            data[at:at] = data[other : other + size]
        else:
            word = _WORDS[draw[3] % len(_WORDS)]
            data[at : at + len(word) * (draw[2] % 2)] = word
    return bytes(data)


def outcome(data: bytes, *, salvage: bool, loops: Loops | None = None) -> tuple[bytes, object]:
    """Read a trace: the events' bytes and what was counted, or b"" and why it was refused."""
    file: Any = io.BufferedReader(io.BytesIO(data))
    try:
        source = detect(Path("trace"), file)
        with source.file:
            events, tally = translated(source, salvage=salvage, loops=loops)
    except io.UnsupportedOperation:
        # A form that is left to perf itself, which needs a real file.
        return b"", "for perf"
    except CaptureError as error:
        if "\n" in str(error):
            raise AssertionError("more than one line") from error
        return b"", str(error)
    return events.tobytes(), tally


def agree(data: bytes, *, salvage: bool, loops: Loops) -> None:
    """Fail where both ways of reading give different things."""
    fast, slow = (outcome(data, salvage=salvage, loops=way) for way in (loops, None))
    if fast != slow:
        raise AssertionError(f"compiled {fast[1]!r:.300}, by columns {slow[1]!r:.300}")


def _limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = size * resource.getpagesize() + _GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def run(kind: str, count: int, seed: int, compare: int, most: float, ways: Loops | None) -> None:
    """Try `count` inputs from `seed` on, for at most so many seconds."""
    outcome(base(kind), salvage=False, loops=ways)  # compiles
    started, processor = time.monotonic(), time.process_time()
    refused = tried = compared = 0
    _limit_memory()
    for number in range(seed, seed + count):
        if time.monotonic() - started > most:
            break
        # Of this process's own time: a busy machine is no hang.
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            data, salvage = damaged(kind, number), bool(number & 1)
            refused += not outcome(data, salvage=salvage, loops=ways)[0]
            if ways is not None and number % compare == 0:
                agree(data, salvage=salvage, loops=ways)
                compared += 1
        except BaseException:
            print(f"{kind}: seed {number}", file=sys.stderr)
            raise
        tried += 1
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(
        f"{kind}: {tried} inputs from seed {seed} by {'columns' if ways is None else 'loops'}, "
        f"{refused} without events, {compared} compared, {time.monotonic() - started:.0f} s, "
        f"{time.process_time() - processor:.0f} s of CPU, "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB at most",
        flush=True,
    )


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--compare", type=int, default=64, metavar="N")
    parser.add_argument("--columns", action="store_true", help="don't compile")
    given = parser.parse_args()
    # Compiled anew, with a check of each index, and nothing of it kept.
    os.environ.update(NUMBA_BOUNDSCHECK="1", CACHE_DIRECTORY="/dev/null")
    ways = None if given.columns else loops()
    # Most of a header stays as it was: its descriptions of tracepoints are read once.
    raw.described = lru_cache(1 << 12)(raw.described)
    run(given.kind, given.count, given.seed, given.compare, given.seconds, ways)


if __name__ == "__main__":
    main()
