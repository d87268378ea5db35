# SPDX-License-Identifier: MIT
"""Attaching that fails half way: all or nothing, in one line."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kvmprobe.capture.session import Filters, Session
from kvmprobe.errors import HostError
from tests.watched import left_behind, programs_of

#: Attachments that still find room: some do, not all.
ROOM = 3


@contextmanager
def no_descriptors_but(room: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1 + room, limits[1]))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(room):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_out_of_descriptors_half_way() -> None:
    before = programs_of(os.getpid())
    with Session(Filters(), watch=True, flight=True) as session:
        session.prepare()
        loaded = programs_of(os.getpid()) - before
        assert len(loaded) > ROOM
        with no_descriptors_but(ROOM), pytest.raises(HostError) as raised:
            session.attach()
    assert "Too many open files" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert programs_of(os.getpid()) == before
    assert left_behind(loaded) == set()
