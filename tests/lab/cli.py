# SPDX-License-Identifier: MIT
"""`python tests/lab`: boot Debian's kernels and run a command or the scenarios in them."""

import argparse
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path

from tests.lab.base import CHECKOUT, LabError, MissingError, prune_cache, say
from tests.lab.helper import get_helper
from tests.lab.here import run_here
from tests.lab.kernels import RELEASES, get_kernel, parse_spec
from tests.lab.matrix import (
    BACKENDS,
    EMULATORS,
    REQUIRED,
    choose_kernels,
    plan_boots,
    render,
    run_boots,
    select_scenarios,
)
from tests.lab.rootfs import get_root
from tests.lab.scenarios import FIXED, UNCLASSIFIED, VULNERABLE
from tests.lab.vm import Job, run_job, show_tail


def main() -> int:
    """Run the command line; return the exit status: that of the command in the VM, or 1."""
    arguments = _parser().parse_args()
    # As at Ctrl-C, what was started is ended and what was begun is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return int(arguments.function(arguments))
    except LabError as error:
        say(f"error: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests/lab", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser(
        "run",
        help="boot a kernel and run a shell command in it",
        description="Boot a kernel and run a shell command in it, as root, in /out. The current "
        "checkout's kvmprobe is in /opt/kvmprobe (`kvmprobe` and /opt/venv/bin/python use it). "
        "Ends with the command's status.",
    )
    run.set_defaults(function=_run)
    run.add_argument("--kernel", default="6.1", help=f"{', '.join(RELEASES)} or RELEASE/PACKAGE")
    run.add_argument("--vendor", default="amd", choices=sorted(EMULATORS))
    run.add_argument("--root", help="Debian release of the root disk (default: the kernel's)")
    run.add_argument("--command", help="bash script to run; else what follows --")
    run.add_argument("--code", type=Path, default=CHECKOUT, help="checkout to run (default: this)")
    run.add_argument(
        "--add", action="append", default=[], metavar="NAME=PATH", help="bring PATH as /lab/NAME"
    )
    run.add_argument("--append", default="", help="more kernel options: 'kvm.mmio_caching=0'")
    run.add_argument(
        "--slot", action="store_true", help="build and load lab_slot.ko: internal slots on AMD"
    )
    run.add_argument("--results", type=Path, help="folder for out/, output, serial.log")
    run.add_argument("--processors", type=int, default=2)
    run.add_argument("--memory", type=int, default=2048, help="MiB")
    run.add_argument("--limit", type=float, default=600.0, help="seconds of wall time")
    run.add_argument("words", nargs="*", metavar="COMMAND", help="command and arguments, after --")
    matrix = commands.add_parser(
        "matrix",
        help="run scenarios under a recording and compare what is found with what is known",
        description="Prints kernel x vendor x scenario x backend with what was expected and what "
        "was found; ends with 0 when all is as expected. A boot that was done before with the "
        "same code isn't repeated. Each option may be given several times.",
    )
    matrix.set_defaults(function=_matrix)
    matrix.add_argument("--kernel", action="append", default=[], help="default: kernels.toml's")
    matrix.add_argument("--vendor", action="append", choices=sorted(EMULATORS))
    matrix.add_argument("--scenario", action="append", default=[], help="default: all")
    matrix.add_argument(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="default: on AMD all that differ there, on Intel kvmprobe's choice",
    )
    matrix.add_argument("--code", type=Path, default=CHECKOUT, help="checkout to run")
    matrix.add_argument("--jobs", type=int, default=1, help="boots at a time (default 1)")
    matrix.add_argument("--results", type=Path, help="folder for captures, output and consoles")
    here = commands.add_parser(
        "here",
        help="run the scenarios on this machine's own KVM",
        description="Records the scenarios of nested guests on this machine's own KVM, as root and "
        "without an emulator, and prints the matrix's table for it. No other VM may run. On Intel "
        "load kvm_intel with nested=1 unrestricted_guest=0; on AMD there are internal slots only "
        "with the lab's module.",
    )
    here.set_defaults(function=_here)
    here.add_argument("--scenario", action="append", default=[], help="default: all")
    here.add_argument(
        "--expect", choices=(VULNERABLE, FIXED), help="what this kernel is; else nothing is judged"
    )
    here.add_argument("--results", type=Path, help="folder for the capture and what guests said")
    return parser


def _here(arguments: argparse.Namespace) -> int:
    results = arguments.results or Path(tempfile.mkdtemp(prefix="kvmprobe-lab-"))
    cells = run_here(
        select_scenarios(arguments.scenario), arguments.expect or UNCLASSIFIED, results
    )
    print(render(cells))
    say(f"results in {results}")
    return 0 if all(cell.right or cell.expected == UNCLASSIFIED for cell in cells) else 1


def _matrix(arguments: argparse.Namespace) -> int:
    scenarios = select_scenarios(arguments.scenario)
    results = arguments.results or Path(tempfile.mkdtemp(prefix="kvmprobe-lab-"))
    vendors = arguments.vendor or sorted(EMULATORS)
    try:
        for vendor in vendors:
            REQUIRED[vendor]()
        targets, remarks = choose_kernels(arguments.kernel)
        boots = plan_boots(targets, vendors, arguments.backend or (), scenarios)
        cells = list(run_boots(boots, results, arguments.code.resolve(), arguments.jobs))
    except MissingError as error:
        if os.environ.get("CI"):
            raise
        say(f"skipped: {error}")
        return 0
    if not cells:
        raise LabError("nothing was run: no scenario fits")
    print(render(cells))
    for remark in remarks:
        print(remark)
    say(f"results in {results}")
    prune_cache()
    return 0 if all(cell.right or cell.expected == UNCLASSIFIED for cell in cells) else 1


def _run(arguments: argparse.Namespace) -> int:
    command = arguments.command or shlex.join(arguments.words)
    if not command:
        raise LabError("no command; give --command 'SCRIPT' or -- COMMAND")
    extra = {}
    for item in arguments.add:
        name, equals, path = item.partition("=")
        if not equals:
            raise LabError(f"--add {item}: write NAME=PATH")
        extra[name] = Path(path)
    kernel = get_kernel(arguments.kernel)
    release = parse_spec(arguments.kernel)[0]
    if arguments.slot:
        extra["lab_slot.ko"] = get_helper(kernel, release)
    job = Job(
        kernel=kernel,
        root=get_root(arguments.root or release),
        vendor=arguments.vendor,
        command=command,
        code=arguments.code.resolve(),
        extra=extra,
        kernel_options=tuple(arguments.append.split()),
        processors=arguments.processors,
        memory=arguments.memory,
        limit=arguments.limit,
    )
    results = arguments.results or Path(tempfile.mkdtemp(prefix="kvmprobe-lab-"))
    say(f"booting {kernel.release} ({kernel.package_version}) on {arguments.vendor}")
    try:
        outcome = run_job(job, EMULATORS[arguments.vendor], results)
    except LabError:
        serial = results / "serial.log"
        if serial.exists():
            show_tail(serial)
        raise
    sys.stdout.write(outcome.output)
    sys.stdout.flush()
    say(f"status {outcome.status} after {outcome.seconds:.0f} s; results in {results}")
    return outcome.status
