# SPDX-License-Identifier: MIT
"""Draining the ring: kvmprobe's numpy view against BCC's callback."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmprobe.capture.ring import Ring
from kvmprobe.errors import HostError
from kvmprobe.host.bccload import load_bcc
from kvmprobe.host.headers import header_directory
from kvmprobe.probes.schema import EVENT, HEADER
from kvmprobe.store.format import new_header
from kvmprobe.store.writer import CaptureWriter
from tests.bench.result import Result, millions

TURNS = 3
SECONDS = 1.0
TICK = 0.002
RING_PAGES = 4096
#: Records of one system call: a call costs more than a record, and 8 M records a second are wanted.
BURST = 16
#: A consumer keeps up when it is done so soon after the producer: the ring hides 262,144 records.
LAG = 0.05
SYS_GETPPID = 110

PROGRAM = r"""
BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_ARRAY(producer, u32, 1);
BPF_PERCPU_ARRAY(counts, u64, 2);	/* made, lost */

RAW_TRACEPOINT_PROBE(sys_enter)
{
	int zero = 0, one = 1;
	u32 *tgid = producer.lookup(&zero);
	u64 *made = counts.lookup(&zero), *lost = counts.lookup(&one);

	if (!tgid || !made || !lost || ctx->args[1] != SYS_GETPPID)
		return 0;
	if (bpf_get_current_pid_tgid() >> 32 != *tgid)
		return 0;
#pragma unroll
	for (int i = 0; i < BURST; i++) {
		struct kvmprobe_event *e = events.ringbuf_reserve(sizeof(*e));

		(*made)++;
		if (!e) {
			(*lost)++;
			continue;
		}
		e->ts = bpf_ktime_get_ns();
		e->vm = 1;
		e->seq = *made;
		e->vcpu = 3;
		e->type = KVMPROBE_MMIO;
		e->site = KVMPROBE_AT_MMIO;
		e->flags = KVMPROBE_F_SLOT_KNOWN;
		e->addr = 0xfe000000 + (*made << 12);
		e->value = 6;
		e->gen = *made;
		e->aux = *made;
		e->slot = -1;
		e->kind = KVMPROBE_MMIO_WRITE;
		e->len = 4;
		events.ringbuf_submit(e, BPF_RB_NO_WAKEUP);
	}
	return 0;
}
"""

# bcc and what it hands to callbacks have no types.
Bpf = Any
Pointer = Any
#: Takes what is in the ring; the number of events.
Consume = Callable[[], int]


def _numpy_view(bpf: Bpf) -> tuple[Consume, Callable[[], None]]:
    ring = Ring(bpf["events"].map_fd, RING_PAGES * 4096)
    return lambda: len(ring.read()), ring.close


def _capture(bpf: Bpf) -> tuple[Consume, Callable[[], None]]:
    """Into a capture on disk, by the same thread: it must keep up by itself, not by its queue."""
    ring = Ring(bpf["events"].map_fd, RING_PAGES * 4096)
    folder = tempfile.TemporaryDirectory()
    writer = CaptureWriter(Path(folder.name) / "capture", new_header("live"))

    def consume() -> int:
        rows = ring.read()
        writer.write(rows)
        return len(rows)

    def close() -> None:
        ring.close()
        writer.close()
        folder.cleanup()

    return consume, close


def _callback(bpf: Bpf, take: Callable[[Pointer, int], None]) -> tuple[Consume, Callable[[], None]]:
    got = 0

    def callback(_context: Pointer, data: Pointer, size: int) -> None:
        nonlocal got
        take(data, size)
        got += 1

    def consume() -> int:
        before = got
        bpf.ring_buffer_consume()
        return got - before

    bpf["events"].open_ring_buffer(callback)
    return consume, lambda: None


def _callback_fields(bpf: Bpf) -> tuple[Consume, Callable[[], None]]:
    event, rows = bpf["events"].event, []

    def take(data: Pointer, _size: int) -> None:
        e = event(data)
        what = e.ts, e.vm, e.seq, e.vcpu, e.type, e.site, e.flags
        rows.append((*what, e.addr, e.value, e.gen, e.aux, e.slot, e.kind, e.len))
        if len(rows) >= 65536:
            rows.clear()

    return _callback(bpf, take)


def _callback_bytes(bpf: Bpf) -> tuple[Consume, Callable[[], None]]:
    batch = bytearray()

    def take(data: Pointer, size: int) -> None:
        batch.extend(ctypes.string_at(data, size))
        if len(batch) >= 65536 * EVENT.itemsize:
            batch.clear()

    return _callback(bpf, take)


@dataclass
class Contestant:
    """A consumer, the rates to offer it (events a second) and what it reached, turn by turn."""

    name: str
    make: Callable[[Bpf], tuple[Consume, Callable[[], None]]]
    ladder: list[float]
    reached: list[float]
    cost: list[float]


@dataclass(frozen=True)
class Trial:
    """One rate offered for a second."""

    made: int
    received: int
    lost: int
    rate: float  # truly produced, events a second
    lag: float  # seconds from the producer's end to the last event received
    cost: float  # CPU seconds of the consumer an event


@contextmanager
def _program() -> Iterator[Bpf]:
    bcc = load_bcc().module
    flags = [f"-DRING_PAGES={RING_PAGES}", f"-DBURST={BURST}", f"-DSYS_GETPPID={SYS_GETPPID}", "-w"]
    text = HEADER.read_text(encoding="utf-8") + PROGRAM
    with header_directory() as headers:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers)
        try:
            bpf = bcc.BPF(text=text, cflags=flags)
        except Exception as error:  # bcc raises Exception itself
            raise HostError(f"BPF can't be loaded, run as root: {error}") from error
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]
    try:
        yield bpf
    finally:
        bpf.cleanup()


def _counts(bpf: Bpf) -> tuple[int, int]:
    return bpf["counts"].sum(0).value, bpf["counts"].sum(1).value


def _trial(bpf: Bpf, consume: Consume, generator: Path, rate: float) -> Trial:
    command = ["taskset", "-c", "0", str(generator), f"{rate / BURST}", f"{SECONDS}"]
    made, lost = _counts(bpf)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        bpf["producer"][ctypes.c_int(0)] = ctypes.c_uint32(child.pid)
        received, last = 0, time.monotonic()
        cpu = time.process_time()
        child.stdin.write("x")
        child.stdin.flush()
        while True:
            running = child.poll() is None
            got = consume()
            if got:
                received, last = received + got, time.monotonic()
            elif not running:
                break
            time.sleep(TICK)
        cpu = time.process_time() - cpu
        calls, seconds, end = child.stdout.read().split()
    made, lost = (after - before for after, before in zip(_counts(bpf), (made, lost), strict=True))
    if made != BURST * int(calls) or received + lost != made:
        raise HostError(
            f"{made} events made, {received} received and {lost} lost: they must add up"
        )
    return Trial(made, received, lost, made / float(seconds), last - float(end), cpu / received)


def _climb(contestant: Contestant, generator: Path) -> None:
    """Offer higher and higher rates until one is not kept up with, twice in a row."""
    reached, cost = 0.0, float("nan")
    with _program() as bpf:
        consume, close = contestant.make(bpf)
        for rate in contestant.ladder:
            trials = (_trial(bpf, consume, generator, rate) for _ in range(2))
            trial = next((t for t in trials if not t.lost and t.lag <= LAG), None)
            if trial is None:
                break
            reached, cost = trial.rate, trial.cost
            if trial.rate < 0.9 * rate:  # the producer can do no more
                break
        close()
    contestant.reached.append(reached)
    contestant.cost.append(cost)


def _compile_generator(directory: Path) -> Path:
    source, program = Path(__file__).with_name("generator.c"), directory / "generator"
    try:
        subprocess.run(["gcc", "-O2", "-o", program, source], check=True)
    except FileNotFoundError:
        raise HostError("gcc is missing: install the package gcc") from None
    return program


def run() -> Result:
    """Measure; HostError when this machine can't (one CPU, no bcc, not root)."""
    affinity = os.sched_getaffinity(0)
    if not affinity >= {0, 1}:
        raise HostError("producer and consumer need CPU 0 and CPU 1")
    slow = [1e5, 1.5e5, 2e5, 2.5e5, 3e5, 4e5, 5e5, 6e5, 8e5, 1e6, 1.5e6, 2e6]
    fast = [1e6, 2e6, 3e6, 4e6, 5e6, 6e6, 7e6, 8e6, 10e6, 12e6, 16e6]
    contestants = [
        Contestant("BCC callback, fields read", _callback_fields, slow, [], []),
        Contestant("BCC callback, bytes copied", _callback_bytes, slow, [], []),
        Contestant("kvmprobe (one numpy view)", _numpy_view, fast, [], []),
        Contestant("kvmprobe, into a capture on disk", _capture, fast[:-2], [], []),
    ]
    os.sched_setaffinity(0, {1})
    try:
        with tempfile.TemporaryDirectory() as directory:
            generator = _compile_generator(Path(directory))
            for _ in range(TURNS):
                for contestant in contestants:
                    _climb(contestant, generator)
    finally:
        os.sched_setaffinity(0, affinity)
    if any(0 in c.reached for c in contestants):
        raise HostError("the machine is too busy: a consumer lost events at the lowest rate")
    medians = [statistics.median(c.reached) for c in contestants]
    rows = [
        (
            c.name,
            ", ".join(millions(rate) for rate in c.reached),
            millions(median),
            f"{statistics.median(c.cost) * 1e6:.2f}",
        )
        for c, median in zip(contestants, medians, strict=True)
    ]
    return Result(
        "Drain",
        "The highest offered rate that a consumer keeps up with: nothing lost in "
        f"{SECONDS:g} s and the last event taken within {LAG * 1e3:g} ms of the producer's end, in "
        f"one of two trials. Events of 56 bytes, a ring of {RING_PAGES * 4096 >> 20} MiB, no "
        f"wake-ups, a tick of {TICK * 1e3:g} ms, producer on CPU 0, consumer on CPU 1, {TURNS} "
        "turns. Loss is counted in BPF, and received + lost = made in every trial.",
        ("consumer", "events/s, turn by turn", "median", "µs of CPU an event"),
        rows,
        f"{medians[2] / medians[0]:.1f} times BCC's callback that reads the fields "
        f"(wanted: at least 10), {medians[2] / medians[1]:.1f} times the one that copies bytes; "
        f"{millions(medians[2])} into memory (wanted: 8 M), "
        f"{millions(medians[3])} into a file (wanted: 4 M)",
    )
