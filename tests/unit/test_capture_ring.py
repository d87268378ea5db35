# SPDX-License-Identifier: MIT
"""The drain against a ring laid out as the kernel's, in ordinary memory."""

from __future__ import annotations

import mmap
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.capture.ring import BUSY, DISCARD, STRIDE, Ring
from kvmprobe.errors import HostError
from kvmprobe.probes.schema import EVENT

PAGE = mmap.PAGESIZE


class Kernel:
    """The kernel's side: what bpf_ringbuf_reserve() and bpf_ringbuf_commit() do.

    A descriptor of the kernel's maps the data area twice; a file has no such thing, so whatever is
    written goes to both places.
    """

    def __init__(self, size: int, start: int) -> None:
        self.size = size
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + 2 * size)
        self.memory = mmap.mmap(self.fd, 2 * PAGE + 2 * size)
        self.position = start
        self.memory[0:8] = start.to_bytes(8, "little")
        self.memory[PAGE : PAGE + 8] = start.to_bytes(8, "little")

    def consumer(self) -> int:
        return int.from_bytes(self.memory[0:8], "little")

    def write(self, position: int, data: bytes) -> None:
        for i in range(0, len(data), 8):
            at = 2 * PAGE + (position + i) % self.size
            for copy in (at, at + self.size):
                self.memory[copy : copy + len(data[i : i + 8])] = data[i : i + 8]

    def reserve(self, length: int = EVENT.itemsize) -> int | None:
        """Reserve a record and return its position; None when the ring is full."""
        total = (length + 8 + 7) // 8 * 8
        if self.position + total - self.consumer() > self.size - 1:
            return None
        position = self.position
        self.write(position, (length | int(BUSY)).to_bytes(4, "little") + b"\x07\x00\x00\x00")
        self.position += total
        self.memory[PAGE : PAGE + 8] = self.position.to_bytes(8, "little")
        return position

    def commit(
        self, position: int, payload: bytes, *, discard: bool = False, length: int | None = None
    ) -> None:
        self.write(position + 8, payload)
        length = len(payload) if length is None else length
        self.write(
            position,
            (length | int(DISCARD) * discard).to_bytes(4, "little") + b"\x07\x00\x00\x00",
        )

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


@contextmanager
def ring_of(size: int, start: int = 0) -> Iterator[tuple[Kernel, Ring]]:
    kernel = Kernel(size, start)
    ring = Ring(kernel.fd, size)
    try:
        yield kernel, ring
    finally:
        ring.close()
        kernel.close()


def payload(number: int) -> bytes:
    return b"".join(((number * 7 + i) & (1 << 64) - 1).to_bytes(8, "little") for i in range(7))


#: What happens next: a record is reserved, the oldest or the newest open one is committed or
#: discarded, or the drain comes.
STEPS = st.lists(
    st.sampled_from(
        ["reserve", "reserve", "commit", "commit", "commit newest", "discard", "drain"]
    ),
    max_size=300,
)
#: Positions only grow; a long recording's are far above any ring's size.
STARTS = st.integers(0, 1 << 40).map(lambda n: n * 8)


@given(STEPS, STARTS)
def test_nothing_is_lost_or_invented(steps: list[str], start: int) -> None:
    with ring_of(PAGE, start) as (kernel, ring):
        open_records: list[tuple[int, int]] = []
        fates: dict[int, str] = {}  # by number, in ring order
        got: list[bytes] = []
        number = 0
        drained = 0

        def drain() -> None:
            nonlocal drained
            rows = ring.read()
            assert rows.dtype == EVENT
            got.extend(row.tobytes() for row in rows)
            # As far as the first record that is still open, and no further.
            while drained < number and fates[drained] != "open":
                drained += 1
            assert kernel.consumer() == start + drained * STRIDE
            assert ring.pending() == (number - drained) * STRIDE

        for step in steps:
            if step == "reserve":
                position = kernel.reserve()
                if position is not None:
                    open_records.append((number, position))
                    fates[number] = "open"
                    number += 1
            elif step == "drain":
                drain()
            elif open_records:
                done, position = open_records.pop(-1 if step == "commit newest" else 0)
                kernel.commit(position, payload(done), discard=step == "discard")
                fates[done] = "discarded" if step == "discard" else "sent"
        for done, position in open_records:
            kernel.commit(position, payload(done))
            fates[done] = "sent"
        drain()
        assert got == [payload(n) for n in range(number) if fates[n] == "sent"]
        assert ring.pending() == 0


def test_a_batch_that_wraps_is_one_array() -> None:
    # No multiple of 64: the last record lies across the end of the data area.
    with ring_of(PAGE, PAGE - 3 * STRIDE - 24) as (kernel, ring):
        for number in range(60):
            position = kernel.reserve()
            assert position is not None
            kernel.commit(position, payload(number))
        assert [row.tobytes() for row in ring.read()] == [payload(n) for n in range(60)]
        assert len(ring.read()) == 0


def test_what_was_read_stays_when_the_ring_is_written_over() -> None:
    with ring_of(PAGE) as (kernel, ring):
        rounds = []
        for number in range(200):
            position = kernel.reserve()
            assert position is not None
            kernel.commit(position, payload(number))
            if number % 50 == 49:
                rounds.append(ring.read())
        rows = np.concatenate(rounds)
        assert [row.tobytes() for row in rows] == [payload(n) for n in range(200)]


def test_a_full_ring_has_room_again_after_a_read() -> None:
    with ring_of(PAGE) as (kernel, ring):
        sent = 0
        while (position := kernel.reserve()) is not None:
            kernel.commit(position, payload(sent))
            sent += 1
        assert sent == PAGE // STRIDE - 1
        assert len(ring.read()) == sent
        assert kernel.reserve() is not None


@pytest.mark.parametrize("length", [0, 48, 55, 57, 64])
def test_a_record_of_another_size_is_an_error(length: int) -> None:
    with ring_of(PAGE) as (kernel, ring):
        position = kernel.reserve()
        assert position is not None
        kernel.commit(position, payload(0), length=length)
        with pytest.raises(HostError, match="a record of another size") as error:
            ring.read()
        assert "\n" not in str(error.value)


def test_the_size_of_a_busy_record_is_not_looked_at() -> None:
    with ring_of(PAGE) as (kernel, ring):
        kernel.reserve(48)
        kernel.reserve()
        assert len(ring.read()) == 0


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(PAGE, 0)
    try:
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
        with pytest.raises(HostError, match="recording needs x86-64, this is aarch64"):
            Ring(kernel.fd, PAGE)
    finally:
        kernel.close()
