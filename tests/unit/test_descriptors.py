# SPDX-License-Identifier: MIT
"""Too few file descriptors end a start at once, and what is used up is no target's fault."""

from __future__ import annotations

import ctypes
import errno
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmprobe.capture.descriptors import NEEDED, require_descriptors
from kvmprobe.capture.program import AttachError, _one_target
from kvmprobe.errors import HostError


@pytest.fixture
def limit() -> Iterator[int]:
    """Descriptors open now, this one's limit being put back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield sum(1 for _ in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_too_few_are_refused_in_one_line(limit: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + NEEDED - 1, hard))
    with pytest.raises(HostError, match="ulimit -n") as caught:
        require_descriptors()
    assert "\n" not in str(caught.value)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + NEEDED, hard))
    require_descriptors()


@pytest.mark.parametrize(
    ("error", "only_this"),
    [(errno.EMFILE, False), (errno.ENOMEM, False), (errno.EACCES, True), (errno.ENOENT, True)],
)
def test_what_is_used_up_is_no_targets_fault(error: int, only_this: bool) -> None:
    def fail() -> None:
        with _one_target("kvm_mmio", "refused"):
            ctypes.set_errno(error)
            raise RuntimeError("bcc's words")

    with pytest.raises(AttachError) as caught:
        fail()
    assert caught.value.only_this is only_this
    assert str(caught.value) == "kvm_mmio: refused: bcc's words"
