# SPDX-License-Identifier: MIT
"""`python tests/lab matrix`: every scenario on every kernel, vendor and backend, as a table."""

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.lab.base import (
    LabError,
    MissingError,
    cache_dir,
    content_key,
    say,
)
from tests.lab.bochs import bochs_command, require_bochs
from tests.lab.helper import get_helper
from tests.lab.kernels import Kernel, get_kernel, parse_spec
from tests.lab.packages import GoneError
from tests.lab.qemu import qemu_command, require_qemu
from tests.lab.results import read_result
from tests.lab.rootfs import get_root
from tests.lab.scenarios import (
    SCENARIOS,
    UNCLASSIFIED,
    WATCHED,
    Listed,
    Scenario,
    listed_kernels,
)
from tests.lab.vm import Emulator, Job, run_job, show_tail, stop_runs
from tests.lab.wheel import get_installed, hash_files

EMULATORS: dict[str, Emulator] = {"amd": qemu_command, "intel": bochs_command}
#: Each raises MissingError when this machine lacks something for the vendor's emulator.
REQUIRED = {"amd": require_qemu, "intel": require_bochs}
#: "default" leaves the choice to kvmprobe; the others are forced by --backend.
BACKENDS = ("default", "kprobe", "fentry", "tracepoint")
#: Kernel options of a second boot, where a boot takes seconds.
NO_CACHING = "kvm.mmio_caching=0"
_MEMORY = {"amd": 2048, "intel": 1024}
# A quiet machine needs 5 min in QEMU and 9 in Bochs, a very busy one ten times that.
_LIMIT = {"amd": 3600.0, "intel": 5400.0}
_LAB = Path(__file__).parent
_INSIDE = ("nested", "watched_inside.py")
_WATCHED_INSIDE = "/opt/venv/bin/python /lab/watched_inside.py"


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

    @property
    def classified(self) -> str:
        return self.listed.internal_slot if self.listed else UNCLASSIFIED


@dataclass(frozen=True)
class Boot:
    """One boot: the scenarios that a kernel, vendor and backend runs, with the kernel's options."""

    target: Target
    kernel: Kernel
    vendor: str
    backend: str
    options: str
    scenarios: tuple[Scenario, ...]

    @property
    def folder(self) -> str:
        words = [self.kernel.package_version, self.vendor, self.backend, self.options]
        return "-".join(word for word in words if word)

    @property
    def recordings(self) -> dict[str, list[Scenario]]:
        """The scenarios of each recording."""
        found: dict[str, list[Scenario]] = {}
        for scenario in self.scenarios:
            found.setdefault(scenario.recording, []).append(scenario)
        return found

    def script(self) -> str:
        """Return what the VM runs."""
        forced = "" if self.backend == "default" else f" --backend {self.backend}"
        lines = ["export PYTHONPATH=/opt/kvmprobe"]
        for name, scenarios in self.recordings.items():
            tool = _WATCHED_INSIDE if name == WATCHED else "kvmprobe"
            record = f"{tool} record{forced}"
            told = f'|| echo "recording {name}: status $?"'
            vms = "".join(scenario.script(self.vendor) for scenario in scenarios)
            lines += [f"cat >/tmp/{name}.sh <<'END'\n{vms}END"]
            if any(scenario.seen_late for scenario in scenarios):
                watch = "touch /tmp/go; until [ -e /tmp/over ]; do sleep 0.2; done"
                lines += [
                    f"{{ sh /tmp/{name}.sh; touch /tmp/over; }} &",
                    "until [ -e /tmp/ready ]; do sleep 0.2; done",
                    f"{record} -o /out/{name}.kvmprobe -- sh -c '{watch}' {told}",
                    "wait",
                ]
            else:
                lines += [f"{record} -o /out/{name}.kvmprobe -- sh /tmp/{name}.sh {told}"]
            lines += [f"kvmprobe analyze --json /out/{name}.kvmprobe >/out/{name}.json"]
        return "\n".join(lines)


def choose_kernels(names: Sequence[str]) -> tuple[list[Target], list[str]]:
    """Return the kernels to run on and a line about each that is unclassified or gone.

    Of every name in kernels.toml it is the newest that the mirror still has; a name that is not
    in kernels.toml is taken as a kernel's specification.  MissingError when the mirror has none, or
    when it can't be asked.
    """
    listed = listed_kernels()
    targets, remarks = [], []
    for name in names or list(dict.fromkeys(kernel.name for kernel in listed)):
        candidates = [kernel for kernel in listed if kernel.name == name]
        for kernel in candidates:
            try:
                get_kernel(kernel.spec)
            except GoneError as error:
                remarks.append(f"{kernel.version}: unclassified, {error}")
                continue
            targets.append(Target(kernel.spec, kernel))
            break
        else:
            if candidates:
                remarks.append(f"{name}: no listed kernel is on the mirror any more")
            else:
                targets.append(Target(name, None))
    if not targets:
        raise MissingError(f"no kernel to run: {'; '.join(remarks)}")
    return targets, remarks


def plan_boots(
    targets: Sequence[Target],
    vendors: Sequence[str],
    backends: Sequence[str],
    scenarios: Sequence[Scenario],
) -> list[Boot]:
    """Return the boots in which all of it is run.

    Without `backends`: on AMD, where a boot is quick, all that differ there; on Intel the default.
    """
    boots = []
    for target in targets:
        kernel = get_kernel(target.spec)
        for vendor in vendors:
            wanted = tuple(each for each in scenarios if _is_possible(each, vendor, target.listed))
            if not wanted:
                continue
            chosen = backends or _differing_backends(vendor, target.listed)
            boots += [Boot(target, kernel, vendor, backend, "", wanted) for backend in chosen]
            if vendor == "amd" and "default" in chosen:
                boots.append(Boot(target, kernel, vendor, "default", NO_CACHING, wanted))
    return boots


def _differing_backends(vendor: str, listed: Listed | None) -> tuple[str, ...]:
    """Debian's kernels have kprobes, which the default then is."""
    if vendor == "intel":
        return ("default",)
    return (
        ("default", "fentry", "tracepoint")
        if listed and listed.fentry
        else ("default", "tracepoint")
    )


def _is_possible(scenario: Scenario, vendor: str, listed: Listed | None) -> bool:
    """Tell whether the vendor's KVM can be brought to do what the scenario is about."""
    if vendor == "amd" and scenario.internal and listed and not listed.slot_module:
        return False
    return vendor in scenario.vendors


def run_boots(boots: Sequence[Boot], results: Path, code: Path, jobs: int) -> Iterator[Cell]:
    """Run the boots, `jobs` at a time; yield the cells of each as it is done.

    A boot whose code, kernel and scenarios are those of an earlier one isn't repeated: so a matrix
    that was broken off goes on where it was.  MissingError when something isn't to be had here.
    """
    # The wheel is one for all; roots are made by the boots that need them, beside other boots.
    get_installed(code)
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(_run_boot, boot, code, results / boot.folder) for boot in boots]
        try:
            for boot, run in zip(boots, runs, strict=True):
                yield from _judge(boot, results / boot.folder, code, run.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_runs()
            raise


def _prepare(boot: Boot, code: Path) -> Job:
    release = parse_spec(boot.target.spec)[0]
    extra = {name: _LAB / name for name in _INSIDE}
    if boot.vendor == "amd" and any(scenario.internal for scenario in boot.scenarios):
        extra["lab_slot.ko"] = get_helper(boot.kernel, release)
    return Job(
        boot.kernel,
        get_root(release),
        boot.vendor,
        boot.script(),
        code=code,
        extra=extra,
        kernel_options=("kvm.force_emulation_prefix=1", *boot.options.split()),
        memory=_MEMORY[boot.vendor],
        limit=_LIMIT[boot.vendor],
    )


def _run_boot(boot: Boot, code: Path, folder: Path) -> str | None:
    """Run it, or take what an earlier run of the same left; return what went wrong, if anything.

    MissingError when the lab can't be made here.
    """
    job = _prepare(boot, code)
    what = [boot.kernel.folder.name, job.root.name, boot.vendor, job.kernel_options, job.command]
    inside = hash_files(*(_LAB / name for name in (*_INSIDE, "slot", "init.sh")))
    kept = cache_dir() / "results" / content_key(*what, get_installed(job.code).name, inside)
    name = f"{boot.kernel.package_version} {boot.vendor} {boot.backend} {boot.options}".rstrip()
    if kept.exists():
        os.utime(kept)
        if not folder.exists():
            shutil.copytree(kept, folder)
        return None
    shutil.rmtree(folder, ignore_errors=True)
    say(f"booting {name}: {len(boot.scenarios)} scenarios")
    try:
        outcome = run_job(job, EMULATORS[boot.vendor], folder)
    except MissingError:
        raise
    except LabError as error:
        if (folder / "serial.log").exists():
            show_tail(folder / "serial.log")
        return str(error)
    say(f"done after {outcome.seconds:.0f} s: {name}")
    kept.parent.mkdir(exist_ok=True)
    shutil.copytree(folder, kept)
    return None


def _judge(boot: Boot, folder: Path, code: Path, problem: str | None) -> Iterator[Cell]:
    """Compare the analysis made in the VM, and one made here, with what is known of the kernel."""

    def cell(scenario: str, expected: str, found: str, problem: str | None = None) -> Cell:
        if boot.target.classified == UNCLASSIFIED and problem is None:
            expected = UNCLASSIFIED
        name = f"{scenario} {boot.options}".rstrip()
        version = boot.kernel.package_version
        return Cell(version, boot.vendor, name, boot.backend, expected, found, problem)

    for recording, scenarios in boot.recordings.items():
        try:
            if problem:
                raise LabError(problem)
            result = read_result(folder, recording, [v for s in scenarios for v in s.vms], code)
        except LabError as error:
            for scenario in scenarios:
                yield cell(scenario.name, "", "", str(error))
            continue
        for vm, expected, found in result.compare(
            scenarios, boot.vendor, boot.target.classified, caching=boot.options != NO_CACHING
        ):
            yield cell(vm, expected, found)


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
