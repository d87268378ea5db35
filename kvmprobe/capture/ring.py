# SPDX-License-Identifier: MIT
"""Draining a BPF ring buffer of equal records as one numpy view: no call per event.

The ABI (kernel/bpf/ringbuf.c): page 0 of the map's descriptor is the consumer position; then, read
only, a page with the producer position and the data area mapped twice in a row, so that a batch
that wraps is contiguous.  A record is a u32 length with BUSY in bit 31 and DISCARD in bit 30, a u32
page offset, the payload, padded to 8 bytes.

Order: the kernel publishes a record with xchg() and the producer position with a store-release.  On
x86-64 plain loads are acquires and an aligned 8-byte store is a release, and numpy's copies are
opaque calls that no compiler reorders, so position, headers, payload, consumer position is the
right order.  KVM's MMU faults exist on x86 only; other machines are refused.
"""

from __future__ import annotations

import mmap
import platform
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import HostError
from kvmprobe.probes.schema import EVENT

BUSY = np.uint32(1 << 31)
DISCARD = np.uint32(1 << 30)
LENGTH = np.uint32((1 << 30) - 1)
STRIDE = EVENT.itemsize + 8

_RECORD = np.dtype(
    {
        "names": ["length", "event"],
        "formats": ["<u4", EVENT],
        "offsets": [0, 8],
        "itemsize": STRIDE,
    }
)


class Ring:
    """The consumer's side of one ring buffer map; a ring has one consumer."""

    def __init__(self, fd: int, size: int) -> None:
        """Map the ring behind descriptor `fd`, whose data area is `size` bytes.

        Raises:
            HostError: this machine is not x86-64.

        """
        if platform.machine() != "x86_64":
            raise HostError(f"recording needs x86-64, this is {platform.machine()}")
        page = mmap.PAGESIZE
        self.size = size
        self._consumer_map = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer_map = mmap.mmap(
            fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self._consumer = np.frombuffer(self._consumer_map, "<u8", 1)
        self._producer = np.frombuffer(self._producer_map, "<u8", 1)
        self._position = int(self._consumer[0])

    def pending(self) -> int:
        """Bytes written by the kernel and not yet read."""
        return int(self._producer[0]) - self._position

    def read(self) -> NDArray[Any]:
        """Take all finished records: a new array of dtype `EVENT`, in ring order, maybe empty."""
        n = self.pending() // STRIDE
        offset = mmap.PAGESIZE + (self._position & (self.size - 1))
        records = np.frombuffer(self._producer_map, _RECORD, n, offset)
        lengths = records["length"].copy()
        if (lengths != EVENT.itemsize).any():
            busy = np.flatnonzero(lengths & BUSY)
            if len(busy):
                n = int(busy[0])
                records, lengths = records[:n], lengths[:n]
            if ((lengths & LENGTH) != EVENT.itemsize).any():
                raise HostError(
                    "a record of another size is in the ring: this is a bug in kvmprobe"
                )
        events = records["event"].copy()
        self._position += n * STRIDE
        self._consumer[0] = self._position
        discarded = (lengths & DISCARD) != 0
        return events[~discarded] if discarded.any() else events

    def close(self) -> None:
        """Give the mappings up.

        They go with their last view: an error on its way out of `read` may still hold one, and
        unmapping by force would then hide that error behind another.
        """
        del self._consumer, self._producer, self._consumer_map, self._producer_map
