# SPDX-License-Identifier: MIT
"""`kvmprobe record` from beginning to end: how it ends, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvmprobe.capture.header import live_header
from kvmprobe.capture.recorder import Limits, Recorder
from kvmprobe.capture.session import Filters, Session
from kvmprobe.probes.schema import LifecycleChange, Type
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter
from tests.processes import KVMPROBE, LOAD, ROOT, running
from tests.watched import left_behind, programs_of

#: A command that ends neither by itself nor on SIGTERM or SIGINT.
STUBBORN = ("sh", "-c", 'trap "" TERM INT; while :; do sleep 1; done')


@pytest.fixture(scope="module", autouse=True)
def _guest() -> Iterator[None]:
    """A guest that runs all the time, so that every recording has events."""
    with running(*LOAD, "--seconds", "600", "--rate", "2000"):
        yield


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


class Run:
    """A recording in a process of its own that has begun to write."""

    def __init__(self, path: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [*KVMPROBE, "record", "-o", str(path), *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.programs: set[int] = set()

    def begun(self) -> Run:
        """Wait until there are events in the capture."""
        header = 0
        while self.process.poll() is None:
            size = self.path.stat().st_size if self.path.exists() else 0
            header = header or size
            if header and size > header + 4096:
                self.programs = programs_of(self.process.pid)
                assert self.programs
                return self
            time.sleep(0.02)
        raise AssertionError(f"the recording ended early: {self.process.communicate()}")

    def end(self) -> tuple[int, list[str]]:
        """The exit status, and what it said on stderr; nothing of it is left in the kernel."""
        out, err = self.process.communicate(timeout=30)
        assert out == ""
        assert "Traceback" not in err
        assert "\x1b" not in err
        assert left_behind(self.programs) == set()
        return self.process.returncode, err.splitlines()


def read(path: Path) -> tuple[int, str | None]:
    """How many events the capture holds, and how it was cut if it was."""
    with CaptureReader(path) as reader:
        events = sum(len(batch["ts"]) for batch in reader.batches(["ts"]))
        assert reader.damaged == []
        return events, reader.truncated


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_recording_well(tmp_path: Path, number: signal.Signals) -> None:
    run = Run(tmp_path / "capture", "--", "sleep", "600").begun()
    (child,) = children(run.process.pid)
    run.process.send_signal(number)
    status, said = run.end()
    assert status == 0
    assert f"(ended: {number.name})" in said[0]
    assert said[-1] == f"next: kvmprobe analyze {tmp_path}/capture"
    assert not Path(f"/proc/{child}").exists()
    events, truncated = read(run.path)
    assert events > 0
    assert truncated is None


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path / "capture", "--", *STUBBORN).begun()
    (child,) = children(run.process.pid)
    run.process.send_signal(signal.SIGINT)
    # Now it waits for the command, which ignores the wish to end.
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    status, said = run.end()
    assert (status, said) == (130, [])
    assert not Path(f"/proc/{child}").exists()
    assert read(run.path)[0] > 0


def test_killed_outright(tmp_path: Path) -> None:
    run = Run(tmp_path / "capture").begun()
    run.process.kill()
    status, _ = run.end()
    assert status == -signal.SIGKILL
    events, truncated = read(run.path)
    assert events > 0
    assert truncated
    info = subprocess.run(
        [*KVMPROBE, "info", str(run.path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "cut off" in info.stdout


def test_an_exception_in_the_middle(tmp_path: Path) -> None:
    before = programs_of(os.getpid())
    path = tmp_path / "capture"
    programs: set[int] = set()

    def record() -> None:
        with Session(Filters()) as session:
            session.prepare()
            session.attach()
            programs.update(programs_of(os.getpid()) - before)
            with CaptureWriter(path, live_header(session, [])) as writer:
                recorder = Recorder(session, writer, Limits(duration=10))

                def show() -> None:
                    if recorder.progress.events:
                        raise RuntimeError("in the middle")

                recorder.start()
                recorder.run(lambda: None, show)

    with pytest.raises(RuntimeError, match="in the middle"):
        record()
    assert programs
    assert left_behind(programs) == set()
    assert programs_of(os.getpid()) == before
    events, truncated = read(path)
    assert events > 0
    assert truncated is None


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -USR1 $$", 128 + signal.SIGUSR1)]
)
def test_the_commands_status_is_ours(tmp_path: Path, script: str, status: int) -> None:
    run = Run(tmp_path / "capture", "--", "sh", "-c", f"sleep 0.2; {script}")
    got, said = run.end()
    assert got == status
    assert "(ended: command ended)" in said[0]
    assert read(run.path)[1] is None


def test_duration_and_owner(tmp_path: Path) -> None:
    env = {"SUDO_UID": "12345", "SUDO_GID": "12346"}
    run = Run(tmp_path / "capture", "-d", "0.5", "--", *STUBBORN, env=env)
    status, said = run.end()
    assert status == 0
    assert "(ended: duration)" in said[0]
    found = run.path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (12345, 12346, 0o600)
    with CaptureReader(run.path) as reader:
        ts = np.concatenate([batch["ts"] for batch in reader.batches(["ts"])])
    assert 0.1 < int(ts.max() - ts.min()) / 1e9 < 5


def test_the_sizes_end(tmp_path: Path) -> None:
    run = Run(tmp_path / "capture", "--max-size", "20K")
    status, said = run.end()
    assert status == 0
    assert "(ended: --max-size reached (20480 bytes))" in said[0]
    assert 20480 <= run.path.stat().st_size < 200_000
    assert read(run.path)[1] is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_too_little_room_to_begin(small_disk: Path) -> None:
    status, said = Run(small_disk / "capture").end()
    assert status == 1
    assert len(said) == 1
    assert "--min-free reached" in said[0]
    assert not (small_disk / "capture").exists()


def test_too_little_room_after_a_while(small_disk: Path) -> None:
    run = Run(small_disk / "capture", "--min-free", "700K").begun()
    (small_disk / "filler").write_bytes(bytes(400 << 10))
    status, said = run.end()
    assert status == 0
    assert "(ended: --min-free reached" in said[0]
    assert read(run.path)[1] is None


def test_the_disk_is_full(small_disk: Path) -> None:
    run = Run(small_disk / "capture", "--min-free", "0").begun()
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            pass
    status, said = run.end()
    assert status == 1
    assert said == [
        f"kvmprobe: can't write {small_disk}/capture: the disk is full; "
        "free some space or choose another place"
    ]
    assert read(run.path)[0] > 0
    info = subprocess.run(
        [*KVMPROBE, "info", str(run.path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "events" in info.stdout


def test_one_process_of_two(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [*LOAD, "--seconds", "60", "--rate", "2000"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        run = Run(tmp_path / "capture", "-p", str(other.pid), "-d", "0.5")
        status, said = run.end()
        assert status == 0, said
    finally:
        other.kill()
        other.wait()
    with CaptureReader(run.path) as reader:
        assert reader.header["filters"] == {"pid": other.pid, "vm": None, "vcpu": None}
        (batches,) = ([*reader.batches()],)
    seen = [
        int(pid)
        for batch in batches
        for pid in batch["aux"][
            (batch["type"] == Type.LIFECYCLE) & (batch["kind"] == LifecycleChange.VM_SEEN)
        ]
    ]
    assert seen == [other.pid]
    assert sum(np.count_nonzero(batch["type"] == Type.MMIO) for batch in batches) > 0


OUTPUTS = [
    ("none/capture", "can't write {path}: No such file or directory"),
    ("exists", "{path} exists; pass --force to replace it"),
    (".", "{path} is a directory; name a file in it"),
    ("link", "{path} is a symbolic link, which is not followed; name the file"),
]


@pytest.mark.parametrize(("name", "says"), OUTPUTS)
def test_outputs_that_are_refused(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "exists").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "exists")
    path = tmp_path / name
    status, said = Run(path, "--", "touch", str(tmp_path / "ran")).end()
    assert (status, said) == (1, [f"kvmprobe: {says.format(path=path)}"])
    assert (tmp_path / "exists").read_text() == "mine"
    assert not (tmp_path / "ran").exists()


RECORDS = """
import json, sys
from kvmprobe.cli.main import main
sys.argv = ["kvmprobe", "record", "-f", "-d", "1", "-o", sys.argv[1]]
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]))
"""


def test_force_replaces_and_recording_imports_neither_pandas_nor_numba(tmp_path: Path) -> None:
    path = tmp_path / "capture"
    path.write_text("an old file")
    done = subprocess.run(
        [sys.executable, "-c", RECORDS, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    status, modules = json.loads(done.stdout)
    assert status in (0, None)
    assert {"pandas", "numba", "rich"} & set(modules) == set()
    assert {"bcc", "pyarrow"} <= set(modules)
    assert read(path)[0] > 0


def test_dry_run_says_what_and_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [*KVMPROBE, "record", "--dry-run", "--backend", "tracepoint"],
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    attached, _, left = done.stdout.partition("not attached:")
    assert "raw_tracepoint:kvm_emulate_insn" in attached
    assert "kprobe" not in attached
    assert "kvm_mmu_page_fault" in left
    assert "not asked for (--backend tracepoint)" in " ".join(left.split())
    assert max(map(len, left.splitlines())) <= 80


#: Another user, who may read everything, since the checkout or its interpreter may be root's.
AS_NOBODY = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
)


@pytest.mark.parametrize("command", [["record", "-d", "1"], ["record", "--dry-run"], ["doctor"]])
def test_not_root_is_one_line(tmp_path: Path, command: list[str]) -> None:
    done = subprocess.run(
        [*AS_NOBODY, *KVMPROBE, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "root" in line
