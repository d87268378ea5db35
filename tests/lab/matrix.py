# SPDX-License-Identifier: MIT
"""`python tests/lab matrix`: every scenario on every kernel, vendor and backend, as a table."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.base import (
    CHECKOUT,
    LabError,
    MissingError,
    cache_dir,
    content_key,
    run_program,
    say,
)
from tests.lab.bochs import bochs_command
from tests.lab.helper import get_helper
from tests.lab.kernels import Kernel, get_kernel, parse_spec
from tests.lab.qemu import qemu_command
from tests.lab.rootfs import get_root
from tests.lab.scenarios import SCENARIOS, UNCLASSIFIED, Listed, Scenario, listed_kernels
from tests.lab.vm import ROOMS, Emulator, Job, run_job

EMULATORS: dict[str, Emulator] = {"amd": qemu_command, "intel": bochs_command}
#: "default" leaves the choice to kvmprobe; the others are forced by --backend.
BACKENDS = ("default", "kprobe", "fentry", "tracepoint")
_MEMORY = {"amd": 2048, "intel": 1024}
# A scenario's recording starts in 20 to 100 s of a quiet machine's time, most of it BCC's compiler.
_LIMIT_PER_BOOT, _LIMIT_PER_SCENARIO = 600.0, 600.0


@dataclass(frozen=True)
class Cell:
    """One line of the table; `problem` is why there is no result."""

    kernel: str
    vendor: str
    scenario: str
    backend: str
    expected: str
    found: str
    problem: str | None = None

    @property
    def right(self) -> bool:
        return self.problem is None and self.expected == self.found


@dataclass(frozen=True)
class Target:
    """A kernel to run on and what is known of it; `listed` is None for an unlisted one."""

    spec: str
    listed: Listed | None


def choose_kernels(names: Sequence[str]) -> tuple[list[Target], list[str]]:
    """Return the kernels to run on and a line about each that is unclassified or gone.

    Of every name in kernels.toml it is the newest that the mirror still has; a name that is not
    in kernels.toml is taken as a kernel's specification.
    """
    listed = listed_kernels()
    targets, remarks = [], []
    for name in names or list(dict.fromkeys(kernel.name for kernel in listed)):
        candidates = [kernel for kernel in listed if kernel.name == name]
        for kernel in candidates:
            try:
                get_kernel(kernel.spec)
            except MissingError as error:
                remarks.append(f"{kernel.version}: unclassified, {error}")
                continue
            targets.append(Target(kernel.spec, kernel))
            break
        else:
            if candidates:
                remarks.append(f"{name}: no listed kernel is on the mirror any more")
            else:
                targets.append(Target(name, None))
    return targets, remarks


def run_matrix(
    targets: Iterable[Target],
    vendors: Sequence[str],
    backends: Sequence[str],
    scenarios: Sequence[Scenario],
    results: Path,
) -> Iterable[Cell]:
    """Run it, one boot per kernel, vendor and backend; yield the cells as they come.

    A boot whose code, kernel and scenarios are those of an earlier one isn't repeated: so a matrix
    that was broken off goes on where it was.
    """
    for target in targets:
        kernel = get_kernel(target.spec)
        for vendor in vendors:
            wanted = [each for each in scenarios if _is_possible(each, vendor, target.listed)]
            for backend in backends:
                if not wanted:
                    continue
                folder = results / f"{kernel.package_version}-{vendor}-{backend}"
                problem = None
                try:
                    _run_boot(target, kernel, vendor, backend, wanted, folder)
                except LabError as error:
                    problem = str(error)
                for scenario in wanted:
                    yield _judge(target, kernel, vendor, backend, scenario, folder, problem)


def _is_possible(scenario: Scenario, vendor: str, listed: Listed | None) -> bool:
    """Tell whether the vendor's KVM can be brought to do what the scenario is about."""
    if vendor == "amd" and scenario.internal and listed and not listed.slot_module:
        return False
    return vendor in scenario.vendors


def _run_boot(
    target: Target,
    kernel: Kernel,
    vendor: str,
    backend: str,
    scenarios: Sequence[Scenario],
    folder: Path,
) -> None:
    release = parse_spec(target.spec)[0]
    extra = {"nested": Path(__file__).with_name("nested")}
    if vendor == "amd" and any(scenario.internal for scenario in scenarios):
        extra["lab_slot.ko"] = get_helper(kernel, release)
    root = get_root(release)
    command = "export PYTHONPATH=/opt/kvmprobe\n"
    command += "\n".join(_record(scenario, vendor, backend) for scenario in scenarios)
    key = content_key(kernel.folder.name, root.name, vendor, command, _code_hash())
    kept = cache_dir() / "results" / key
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)
        limit = _LIMIT_PER_BOOT + _LIMIT_PER_SCENARIO * len(scenarios)
        memory = _MEMORY[vendor]
        job = Job(kernel, root, vendor, command, extra=extra, memory=memory, limit=limit)
        say(f"booting {kernel.release} on {vendor} for {len(scenarios)} scenarios, {backend}")
        outcome = run_job(job, EMULATORS[vendor], folder)
        say(f"done after {outcome.seconds:.0f} s")
        kept.parent.mkdir(exist_ok=True)
        shutil.copytree(folder, kept)
    elif not folder.exists():
        shutil.copytree(kept, folder)


def _record(scenario: Scenario, vendor: str, backend: str) -> str:
    capture = f"/out/{scenario.name}.kvmprobe"
    force = "" if backend == "default" else f"--backend {backend} "
    return (
        f"echo '# {scenario.name}'\n"
        f"kvmprobe record {force}-o {capture} -- {scenario.command(vendor)}\n"
        f"kvmprobe analyze --json {capture} >/out/{scenario.name}.json\n"
    )


def _code_hash() -> str:
    """Return a hash of all that goes into a VM from the checkout."""
    digest = hashlib.sha256()
    for room in (*ROOMS, "tests/lab"):
        for path in sorted((CHECKOUT / room).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(str(path.relative_to(CHECKOUT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _judge(
    target: Target,
    kernel: Kernel,
    vendor: str,
    backend: str,
    scenario: Scenario,
    folder: Path,
    problem: str | None,
) -> Cell:
    """Compare the analysis made in the VM, and one made here, with what is known of the kernel."""
    name = kernel.package_version
    document = folder / "out" / f"{scenario.name}.json"
    expected = found = ""
    if problem is None:
        try:
            inside = json.loads(document.read_text())
            outside = _analyze(document.with_suffix(".kvmprobe"))
        except (OSError, ValueError, LabError) as error:
            problem = f"no analysis: {error}"
        else:
            classified = target.listed.internal_slot if target.listed else UNCLASSIFIED
            expected, found = scenario.check(inside, classified)
            if scenario.check(outside, classified)[1] != found:
                problem = "the analysis inside the VM and that outside differ"
            elif classified == UNCLASSIFIED:
                expected = UNCLASSIFIED
    return Cell(name, vendor, scenario.name, backend, expected, found, problem)


def _analyze(capture: Path) -> dict[str, Any]:
    """Analyze a capture with the checkout's kvmprobe; LabError when that fails."""
    program = "import sys; from kvmprobe.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "analyze", "--json", str(capture.resolve())]
    document: dict[str, Any] = json.loads(run_program(command, cwd=CHECKOUT))
    return document


def render(cells: Sequence[Cell]) -> str:
    """Return the table as text, one line a cell."""
    head = ("kernel", "vendor", "scenario", "backend", "expected", "found", "")
    rows = [head]
    for cell in cells:
        if cell.problem:
            mark = "NO RESULT"
        elif cell.expected == UNCLASSIFIED:
            mark = UNCLASSIFIED
        else:
            mark = "as expected" if cell.right else "DIFFERS"
        rows.append(
            (
                cell.kernel,
                cell.vendor,
                cell.scenario,
                cell.backend,
                cell.expected,
                cell.problem or cell.found,
                mark,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def select_scenarios(names: Sequence[str]) -> list[Scenario]:
    """Return the named scenarios, or all; LabError for an unknown name."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in known:
            raise LabError(f"unknown scenario {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names] or list(SCENARIOS)
