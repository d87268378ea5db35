# SPDX-License-Identifier: MIT
"""The shipped unit in the lab's VM, where systemd is PID 1: expected against seen.

python -m tests.lab.service [--code DIR] [--results DIR]

Debian's 6.1 (QEMU, AMD, with the lab's module for the slot).  service_inside.py says what is tried.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.lab.base import CHECKOUT, LabError, say
from tests.lab.helper import get_helper
from tests.lab.kernels import get_kernel, parse_spec
from tests.lab.production import render, seen_in
from tests.lab.qemu import qemu_command
from tests.lab.rootfs import get_root
from tests.lab.vm import Job, run_job

_KERNEL = "6.1"
_LIMIT = 7200.0


def main() -> int:
    """Run the command line; the exit status: 0 when all is as expected."""
    parser = argparse.ArgumentParser(prog="tests.lab.service", description=__doc__)
    parser.add_argument("--code", type=Path, default=CHECKOUT, help="checkout to run")
    parser.add_argument("--results", type=Path, help="folder for what was said, and the console")
    arguments = parser.parse_args()
    results = arguments.results or Path(tempfile.mkdtemp(prefix="kvmprobe-lab-"))
    # As at Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    here, release = Path(__file__).parent, parse_spec(_KERNEL)[0]
    try:
        kernel = get_kernel(_KERNEL)
        extra = {
            "first": here / "service_first.sh",
            "nested": here / "nested",
            "inside.py": here / "production_inside.py",
            "service_inside.py": here / "service_inside.py",
            "kvmprobe-watch.service": CHECKOUT / "packaging/kvmprobe-watch.service",
            "lab_slot.ko": get_helper(kernel, release),
        }
        command = (
            "export PYTHONPATH=/opt/kvmprobe\n/opt/venv/bin/python /lab/service_inside.py /out"
        )
        root = get_root(release, ("systemd",))
        job = Job(kernel, root, "amd", command, arguments.code, extra, limit=_LIMIT)
        say(f"booting {kernel.release} ({kernel.package_version}) with systemd")
        outcome = run_job(job, qemu_command, results)
        rows = seen_in(outcome, results)
    except LabError as error:
        say(f"error: {error}")
        return 1
    print(render(_KERNEL, rows), flush=True)
    say(f"results in {results}")
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
