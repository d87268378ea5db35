# SPDX-License-Identifier: MIT
"""The self-description at the front of a capture of a live host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from kvmprobe import __version__
from kvmprobe.capture.session import Session
from kvmprobe.host.facts import host_facts
from kvmprobe.probes.schema import SCHEMA_MAJOR, SCHEMA_MINOR


def live_header(session: Session, command: Sequence[str]) -> dict[str, Any]:
    """Describe a prepared session, as docs/design.md says; the clocks are read here, together."""
    monotonic_ns, wall_ns = time.monotonic_ns(), time.time_ns()
    started = datetime.fromtimestamp(wall_ns // 1000 / 1e6, UTC)
    filters = session.filters
    return {
        "schema": {"major": SCHEMA_MAJOR, "minor": SCHEMA_MINOR},
        "tool": {"name": "kvmprobe", "version": __version__},
        "started": started.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "clock": {"monotonic_ns": monotonic_ns, "wall_ns": wall_ns},
        "source": {"kind": "live", "note": None},
        "host": dict(host_facts()),
        "layout": session.layout.values,
        "plan": session.plan.rows(),
        "filters": {"pid": filters.pid, "vm": filters.vm, "vcpu": filters.vcpu},
        "command": list(command),
    }
