# SPDX-License-Identifier: MIT
"""Large traces for the importers' bench: a real one again and again, with times that go on."""

from __future__ import annotations

import io
import lzma
import re
import struct
import subprocess
from pathlib import Path

import numpy as np

from kvmprobe.errors import KvmprobeError
from kvmprobe.formats.perfdata import PerfDataReader
from kvmprobe.formats.records import Tally
from kvmprobe.formats.tracedat import TraceDatReader
from kvmprobe.formats.tracedat_header import read_header
from tests.traces import path_of

_TIME = re.compile(rb" +(\d+)\.(\d{6}): ")
_ROUND = np.array([8 << 48 | 68], np.uint64)
#: Between two repetitions, ns.
_PAUSE = 1_000_000


def _real(kind: str) -> bytes:
    return lzma.decompress(path_of("intel-6.1", kind).read_bytes())


def text(path: Path, size: int) -> int:
    """Write about `size` bytes of ftrace text; returns the number of events."""
    heads, tails, times = [], [], []
    for line in _real("ftrace.txt").splitlines(keepends=True):
        if line[:1] != b"#" and (m := _TIME.search(line)):
            heads.append(line[: m.start()])
            tails.append(line[m.end() :])
            times.append(int(m[1]) * 10**6 + int(m[2]))
    span = times[-1] - times[0] + _PAUSE // 1000
    copies = 0
    with path.open("wb") as file:
        while file.tell() < size:
            moments = [divmod(at + copies * span, 10**6) for at in times]
            parts = zip(heads, moments, tails, strict=True)
            file.write(b"".join(b"%b %8d.%06d: %b" % (h, *at, t) for h, at, t in parts))
            copies += 1
    return copies * len(times)


def perf_data(path: Path, copies: int) -> int:
    """Write a perf.data whose samples come `copies` times; returns their number."""
    data = _real("perf.data")
    reader = PerfDataReader(io.BytesIO(data), Tally())
    begin, end = reader.data
    words = np.frombuffer(data[begin:end] + bytes(64), "<u8")
    at, sizes = reader.candidates(words, (end - begin) // 8)
    samples = np.concatenate([*(words[a : a + n] for a, n in zip(at, sizes, strict=True)), _ROUND])
    times = np.cumsum([0, *sizes[:-1]]) + reader.form.time // 8
    span = np.uint64(np.ptp(samples[times]) + _PAUSE)
    with path.open("wb") as file:
        file.write(data[:end])
        for _ in range(copies - 1):
            samples[times] += span
            file.write(samples.data)
        more = (copies - 1) * samples.nbytes
        features = sum(byte.bit_count() for byte in data[72:104])
        table = np.frombuffer(data[end : end + 16 * features], "<u8").copy()
        table[::2] += np.uint64(more)
        file.write(table.data)
        file.write(data[end + table.nbytes :])
        file.seek(48)
        file.write(struct.pack("<Q", end - begin + more))
    return copies * len(at)


def trace_dat(path: Path, copies: int) -> int:
    """Write a trace.dat of version 6 whose pages come `copies` times; returns its events.

    Raises:
        KvmprobeError: trace-cmd, which makes version 6 of the real one, is missing.

    """
    real, old = path.with_suffix(".real"), path.with_suffix(".old")
    real.write_bytes(_real("trace.dat"))
    command = ["trace-cmd", "convert", "--file-version", "6", "-i", str(real), "-o", str(old)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise KvmprobeError("trace-cmd convert does not run: install trace-cmd") from error
    data = old.read_bytes()
    (cpu,) = read_header(io.BytesIO(data)).cpus
    pages = np.frombuffer(data, "<u8", cpu.size // 8, cpu.offset).copy()
    times = pages[:: cpu.page // 8]
    span = np.uint64(np.ptp(times) + _PAUSE)
    place = struct.pack("<QQ", cpu.offset, cpu.size)
    with path.open("wb") as file:
        file.write(
            data[: cpu.offset].replace(place, struct.pack("<QQ", cpu.offset, copies * cpu.size))
        )
        for _ in range(copies):
            file.write(pages.data)
            times += span
    real.unlink()
    old.unlink()
    tally = Tally()
    for _ in TraceDatReader(io.BytesIO(data), tally):
        pass
    return copies * tally.read
