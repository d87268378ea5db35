# SPDX-License-Identifier: MIT
"""Whether a session's maps, programs and attachments find room among this process's descriptors."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

from kvmprobe.errors import HostError

#: A session with every kprobe that there is holds fewer; a test counts those of one here.
NEEDED = 128
#: What the kernel answers when something of the host's is used up: no target's own fault.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def require_descriptors() -> None:
    """Say before anything is compiled that descriptors will not suffice.

    Raises:
        HostError: fewer than `NEEDED` can still be opened.

    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = sum(1 for _ in Path("/proc/self/fd").iterdir())
    if limit != resource.RLIM_INFINITY and limit - used < NEEDED:
        raise HostError(
            f"too few file descriptors: {used} of {limit} are open and {NEEDED} more are needed; "
            "raise the limit (ulimit -n 1024, in a service LimitNOFILE=1024)"
        )
