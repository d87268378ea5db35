# SPDX-License-Identifier: MIT
"""`python -m tests.bench [PART...]`: measure, print, and write docs/benchmarks.md.

Without names all parts run but `full`, for 20 minutes at most.  Each runs in a process of its own,
for a limited time.  The page keeps the latest table of every other part.  The status is 1 when a
part could not be measured; its older table stays.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from kvmprobe.errors import KvmprobeError  # noqa: E402
from kvmprobe.host.bccload import load_bcc  # noqa: E402
from tests.bench import page  # noqa: E402
from tests.bench.result import Result  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Part:
    """A module of this folder with `run() -> Result`, and the seconds it may take."""

    limit: float
    by_name: bool = False  # only when it is asked for


#: Seconds for all parts together.
TOTAL = 1180.0
PARTS = {
    "drain": Part(240),
    "writer": Part(60),
    "start": Part(120),
    "resident": Part(90),
    "stat": Part(120),
    "detector": Part(90),
    "analysis": Part(420),
    "compact": Part(150),
    "importers": Part(360),
    "guest": Part(420),  # last: it takes what time there is
    "full": Part(3600, by_name=True),
}


def machine() -> str:
    """The table of what is measured on."""
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = ("numpy", "numba", "pandas", "pyarrow")
    packages = [f"{name} {metadata.version(name)}" for name in names]
    peers = Path(__file__).with_name("peers.lock").read_text(encoding="utf-8").splitlines()
    packages += [line.split(" \\")[0].replace("==", " ") for line in peers if "==" in line]
    try:
        packages.append(f"bcc {load_bcc().version}")
    except KvmprobeError:
        packages.append("no bcc")
    lines = {
        "machine": f"{cpu}, {os.cpu_count()} CPUs, {memory:.0f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "packages": ", ".join(packages),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
    return f"| | |\n| --- | --- |\n{rows}\n"


def _measure(name: str, limit: float) -> str:
    """Run a part in a process of its own: its section.  KvmprobeError when it can't be measured."""
    if limit <= 0:
        raise KvmprobeError("the time for all parts is over")
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="kvmprobe-bench-") as folder:
        found = Path(folder) / "result"
        # What a part that is stopped leaves behind goes with its folder.
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.bench", "--result", found, name],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            _stop(child)
            raise KvmprobeError(f"it was not done within {limit:.0f} s") from None
        except BaseException:
            _stop(child)
            raise
        if status or not found.exists():
            raise KvmprobeError(f"it ended with status {status}")
        said = json.loads(found.read_text(encoding="utf-8"))
    if "error" in said:
        raise KvmprobeError(said["error"])
    when = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    note = f"Measured {when}, in {time.monotonic() - began:.0f} s, at a load of {load:.1f} before."
    return page.section(Result(**said), note)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started and that stayed in its session's group."""
    for which, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, which)
            child.wait(patience)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue


def _child(name: str, found: Path) -> int:
    """Run a part in this process; what it gives, or why it could not, goes to a file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        said = asdict(import_module(f"tests.bench.{name}").run())
    except KvmprobeError as error:
        said = {"error": str(error)}
    found.write_text(json.dumps(said), encoding="utf-8")
    return 0


def _write(parts: dict[str, str]) -> None:
    """Write the page: root measures, but it belongs to who owns the checkout."""
    new = PAGE.with_suffix(".new")
    new.write_text(page.page(machine(), parts, PARTS), encoding="utf-8")
    os.chown(new, ROOT.stat().st_uid, ROOT.stat().st_gid)
    new.replace(PAGE)


def main(names: list[str]) -> int:
    """Run the named parts, or all; the exit status."""
    if names[:1] == ["--result"] and len(names) == 3:
        return _child(names[2], Path(names[1]))
    if {"-h", "--help"} & set(names):
        print(f"{__doc__}\nParts: {', '.join(PARTS)}")
        return 0
    unknown = sorted(set(names) - PARTS.keys())
    if unknown:
        print(f"bench: no part {', '.join(unknown)}; {', '.join(PARTS)}", file=sys.stderr)
        return 2
    status = 0
    end = time.monotonic() + (math.inf if names else TOTAL)
    for name in names or [name for name, part in PARTS.items() if not part.by_name]:
        limit = max(0.0, min(PARTS[name].limit, end - time.monotonic()))
        print(f"bench: {name}, at most {limit:.0f} s", file=sys.stderr, flush=True)
        failed: dict[str, str] = {}
        measured: dict[str, str] = {}
        try:
            measured[name] = _measure(name, limit)
            print(measured[name], flush=True)
        except KvmprobeError as error:
            status = 1
            failed[name] = f"## {name.capitalize()}\n\nNot measured: {error}."
            print(f"bench: {name}: not measured: {error}", file=sys.stderr, flush=True)
        # Read only now: somebody else may have measured another part meanwhile.
        _write(failed | page.sections(PAGE.read_text(encoding="utf-8")) | measured)
    print(f"bench: {PAGE.relative_to(ROOT)} is written", file=sys.stderr)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        sys.exit(130)
