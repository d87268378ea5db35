# SPDX-License-Identifier: MIT
"""`python tests/bench [NAME...]`: measure and print; without names write docs/benchmarks.md.

The names are drain, detector, start, guest, writer and importers; without any, all run.  The status
is 1 when one could not.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from kvmprobe.errors import KvmprobeError  # noqa: E402
from kvmprobe.host.bccload import load_bcc  # noqa: E402
from tests.bench import detector, drain, guest, importers, start, stat, writer  # noqa: E402
from tests.bench.result import Result  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks.md"
BENCHES: dict[str, Callable[[], Result]] = {
    "drain": drain.run,
    "detector": detector.run,
    "start": start.run,
    "guest": guest.run,
    "writer": writer.run,
    "importers": importers.run,
    "stat": stat.run,
}

INTRODUCTION = """\
<!-- SPDX-License-Identifier: MIT -->
# Benchmarks

`make bench` writes this page. What a table compares was measured in one run, in turns, so that
other work on the machine meets all alike: trust the ratios, and take the figures as those of this
machine.

"""


def _machine() -> str:
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = [
        f"{name} {metadata.version(name)}" for name in ("numpy", "numba", "pandas", "pyarrow")
    ]
    lines = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{cpu}, {os.cpu_count()} CPUs, {memory:.0f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "packages": ", ".join([*packages, f"bcc {load_bcc().version}"]),
        "load when it began": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
    return f"| | |\n| --- | --- |\n{rows}\n"


def main(names: list[str]) -> int:
    """Run the named benches, or all; the exit status."""
    unknown = set(names) - set(BENCHES)
    if unknown:
        print(f"bench: no such bench: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    sections = [_machine()]
    status = 0
    for name in names or BENCHES:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            sections.append(BENCHES[name]().markdown())
        except KvmprobeError as error:
            sections.append(f"## {name.capitalize()}\n\nNot measured: {error}.\n")
            status = error.exit_code
        print(sections[-1], flush=True)
    if not names:
        # Root measures; the page belongs to who owns the checkout.
        PAGE.write_text(INTRODUCTION + "\n".join(sections), encoding="utf-8")
        os.chown(PAGE, ROOT.stat().st_uid, ROOT.stat().st_gid)
        print(f"wrote {PAGE.relative_to(ROOT)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
