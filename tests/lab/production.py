# SPDX-License-Identifier: MIT
"""doctor, check, verify and watch on a host where the fault happens: expected against seen.

python -m tests.lab.production [--kernel NAME …] [--part alone|watched] [--results DIR]

Boots each kernel once (QEMU, AMD) and does there what production_inside.py says.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.base import CHECKOUT, LabError, say
from tests.lab.helper import get_helper
from tests.lab.kernels import get_kernel, parse_spec
from tests.lab.qemu import qemu_command
from tests.lab.rootfs import get_root
from tests.lab.vm import Job, Outcome, run_job

_LIMIT = 7200.0
#: doctor, check and verify without a watch; and the watch, with check, ack and doctor beside.
PARTS = ("alone", "watched")


@dataclass(frozen=True)
class Host:
    """A kernel, the fault that is tried on it, and whether it has it."""

    spec: str
    fault: str
    state: str


HOSTS = {
    "6.1": Host("6.1", "internal-slot", "vulnerable"),
    "6.12": Host("6.12", "internal-slot", "fixed"),
    "6.12.107": Host("trixie/linux-image-6.12.107+deb13-amd64", "address-space", "vulnerable"),
    "7.2": Host("7.2", "address-space", "fixed"),
}


@dataclass(frozen=True)
class Seen:
    """What was expected and found; a measurement has no expectation."""

    what: str
    expected: str
    found: str
    right: bool


def try_host(host: Host, parts: Sequence[str], code: Path, results: Path) -> list[Seen]:
    """Boot one kernel and try everything; LabError when it did not come to its end."""
    kernel, release = get_kernel(host.spec), parse_spec(host.spec)[0]
    here = Path(__file__).parent
    extra = {"nested": here / "nested", "inside.py": here / "production_inside.py"}
    if host.fault == "internal-slot":
        extra["lab_slot.ko"] = get_helper(kernel, release)
    command = (
        "export PYTHONPATH=/opt/kvmprobe\n"
        f"/opt/venv/bin/python /lab/inside.py try {host.fault} {host.state} /out "
        f"{' '.join(parts)}; status=$?\n"
        "cp -r /var/lib/kvmprobe /out/state; exit $status\n"
    )
    job = Job(kernel, get_root(release), "amd", command, code=code, extra=extra, limit=_LIMIT)
    say(f"booting {kernel.release} ({kernel.package_version}): {host.fault}, {host.state}")
    return seen_in(run_job(job, qemu_command, results), results)


def seen_in(outcome: Outcome, results: Path) -> list[Seen]:
    """What a trial in the VM has noted; LabError when it did not come to its end."""
    if outcome.status:
        raise LabError(f"it broke off, see {results}/output: {outcome.output.splitlines()[-1]}")
    lines = (outcome.out / "seen.ndjson").read_text().splitlines()
    return [Seen(**json.loads(line)) for line in lines]


def render(name: str, rows: Iterable[Seen]) -> str:
    """One kernel's rows, as lines for a terminal."""
    lines = []
    for row in rows:
        state = "measured" if not row.expected else "as expected" if row.right else "DIFFERS"
        wanted = "" if row.right else f" (expected: {row.expected})"
        lines.append(f"{name:9} {state:12} {row.what}: {row.found}{wanted}")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; the exit status: 0 when all is as expected."""
    parser = argparse.ArgumentParser(prog="tests.lab.production", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=sorted(HOSTS), help="default: all")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: both")
    parser.add_argument("--code", type=Path, default=CHECKOUT, help="checkout to run")
    parser.add_argument("--results", type=Path, help="folder for what was said, and consoles")
    arguments = parser.parse_args()
    results = arguments.results or Path(tempfile.mkdtemp(prefix="kvmprobe-lab-"))
    # As at Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    right = True
    for name in arguments.kernel or HOSTS:
        try:
            rows = try_host(
                HOSTS[name], arguments.part or PARTS, arguments.code.resolve(), results / name
            )
        except LabError as error:
            say(f"error: {name}: {error}")
            right = False
            continue
        print(render(name, rows), flush=True)
        right = right and all(row.right for row in rows)
    say(f"results in {results}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
