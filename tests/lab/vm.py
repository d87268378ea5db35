# SPDX-License-Identifier: MIT
"""One run: a disk with the code and the command goes in, status, output and results come out."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.base import (
    CHECKOUT,
    LabError,
    cache_dir,
    find_program,
    need_space,
    run_program,
    say,
)
from tests.lab.initrd import get_initrd
from tests.lab.kernels import Kernel
from tests.lab.rootfs import make_disk
from tests.lab.wheel import get_installed

_INIT = Path(__file__).with_name("init.sh")
# Room for results on the run's disk (sparse): kvmprobe wants 1 GiB to be left free.
_RESULT_MEBIBYTES = 3072
_POLL_SECONDS = 0.2
_OFF_SECONDS = 20  # between the last line on the serial console and the power going off
# Words on the serial console after which waiting is useless.
_DEAD = ("Kernel panic - not syncing", "LAB-BROKEN")


@dataclass(frozen=True)
class Job:
    """What to run: `command` is a bash script; `extra` maps names below /lab to files or folders.

    `kernel_options` are added to the kernel's command line, which modprobe reads too, so
    "kvm.mmio_caching=0" works.  `limit` is in seconds of this machine's time.
    """

    kernel: Kernel
    root: Path
    vendor: str
    command: str
    code: Path = CHECKOUT
    extra: dict[str, Path] = field(default_factory=dict)
    kernel_options: tuple[str, ...] = ()
    processors: int = 2
    memory: int = 2048
    limit: float = 600.0


@dataclass(frozen=True)
class Boot:
    """The files an emulator needs; all in `folder`, which is removed after the run."""

    folder: Path
    kernel: Path
    initrd: Path
    root: Path
    run_disk: Path
    serial: Path
    options: tuple[str, ...]
    processors: int
    memory: int


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the command's status, its output, the folder /out, the wall time."""

    status: int
    output: str
    out: Path
    seconds: float


Emulator = Callable[[Boot], list[str]]

_stopping = threading.Event()


def stop_runs() -> None:
    """End the runs of other threads, and let none begin; they fail."""
    _stopping.set()


def run_job(job: Job, emulator: Emulator, results: Path) -> Outcome:
    """Boot a VM, run the job's command in it and bring back the results.

    `emulator` makes the command line that boots the VM.  Into the folder `results` (made if need
    be) go: out/ (the VM's /out), output (the command's stdout and stderr) and serial.log.
    Raises LabError when the VM didn't reach the command's end; serial.log then tells why.
    """
    results.mkdir(parents=True, exist_ok=True)
    need_space(2048)
    initrd = get_initrd(job.kernel)
    with _run_folder() as folder:
        # Emulators put locks and redo logs beside a disk: beside a link that is ours alone.
        root = folder / "root.ext4"
        root.symlink_to(job.root)
        run_disk = folder / "run.ext4"
        _fill_disk(job, folder / "tree", run_disk)
        serial = results / "serial.log"
        serial.write_bytes(b"")
        boot = Boot(
            folder,
            job.kernel.image,
            initrd,
            root,
            run_disk,
            serial,
            job.kernel_options,
            job.processors,
            job.memory,
        )
        started = time.monotonic()
        try:
            _watch(emulator(boot), serial, folder / "emulator.log", job.limit)
        finally:
            with_output = _take_results(run_disk, folder, results)
        seconds = time.monotonic() - started
    if with_output is None:
        raise LabError(f"the VM ended before its command did; its console: {serial}")
    status, output = with_output
    return Outcome(status, output, results / "out", seconds)


@contextlib.contextmanager
def _run_folder() -> Iterator[Path]:
    """Yield a scratch folder; those of runs that were killed before they could clean up go."""
    runs = cache_dir() / "runs"
    runs.mkdir(exist_ok=True)
    for old in runs.iterdir():
        if _is_unused(old):
            shutil.rmtree(old, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(dir=runs, prefix="run-") as name,
        Path(name, "lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


def _is_unused(folder: Path) -> bool:
    # A folder without its lock yet is one that another process is just making.
    with contextlib.suppress(OSError), (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _fill_disk(job: Job, tree: Path, disk: Path) -> None:
    (tree / "out").mkdir(parents=True)
    shutil.copy(_INIT, tree / "init")
    (tree / "init").chmod(0o755)
    (tree / "vendor").write_text(job.vendor + "\n")
    (tree / "command").write_text(job.command + "\n")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(get_installed(job.code), tree / "code")
    shutil.copytree(job.kernel.modules.parent, tree / "modules")
    for name, source in job.extra.items():
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignore)
        elif source.is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tree / name)
        else:
            raise LabError(f"{source} is neither a file nor a folder; it can't go into the VM")
    size = sum(path.lstat().st_size for path in tree.rglob("*")) >> 20
    make_disk(tree, disk, size + _RESULT_MEBIBYTES)
    shutil.rmtree(tree)


def _watch(command: list[str], serial: Path, log: Path, limit: float) -> None:
    """Run the emulator until the VM is off; end it when the VM is dead or the time is over."""
    deadline = time.monotonic() + limit
    with log.open("wb") as sink:
        emulator = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    problem = None
    seen = 0
    text = ""
    try:
        while emulator.poll() is None:
            time.sleep(_POLL_SECONDS)
            with serial.open("rb") as file:
                file.seek(seen)
                new = file.read()
            seen += len(new)
            text = (text + new.decode(errors="replace"))[-65536:]
            if "LAB-END" in text:
                deadline = min(deadline, time.monotonic() + _OFF_SECONDS)
            dead = next((words for words in _DEAD if words in text), None)
            if dead and problem is None:
                problem = f"the VM's kernel stopped ({dead})"
                deadline = min(deadline, time.monotonic() + 2)
            if _stopping.is_set():
                problem = "stopped"
                break
            if time.monotonic() > deadline:
                if "LAB-END" not in text:
                    problem = problem or f"the VM was not done after {limit:.0f} s"
                break
    finally:
        if emulator.poll() is None:
            os.killpg(emulator.pid, signal.SIGKILL)
            emulator.wait()
    if problem is None and not text:
        words = log.read_text(errors="replace").split("\n")
        problem = f"the emulator didn't boot: {' '.join(line.strip() for line in words[:3])}"
    if problem:
        raise LabError(f"{problem}; its console: {serial}")


def _take_results(disk: Path, folder: Path, results: Path) -> tuple[int, str] | None:
    """Copy /out, output and status off the run's disk; return (status, output) if it has them."""
    debugfs = find_program("debugfs", "e2fsprogs")
    taken = folder / "taken"
    taken.mkdir()
    for name in ("out", "output", "status"):
        request = "rdump" if name == "out" else "dump"
        target = taken if name == "out" else taken / name
        run_program([debugfs, "-R", f"{request} /{name} {target}", str(disk)])
    shutil.rmtree(results / "out", ignore_errors=True)
    if (taken / "out").is_dir():
        shutil.move(taken / "out", results / "out")
    output = taken / "output"
    if output.exists():
        shutil.copy(output, results / "output")
    status = taken / "status"
    if not status.exists() or not status.read_text().strip():
        return None
    return int(status.read_text()), output.read_text(errors="replace")


def show_tail(serial: Path, lines: int = 30) -> None:
    """Report the last lines of the VM's console."""
    for line in serial.read_text(errors="replace").splitlines()[-lines:]:
        say(f"console: {line.rstrip()}")
