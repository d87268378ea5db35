# SPDX-License-Identifier: MIT
"""Runs `kvmprobe fleet` as users do; a scheduler, workers and a store on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
#: What a client of the store on loopback is: the store takes anybody.
KEYS = {"AWS_ACCESS_KEY_ID": "fleet", "AWS_SECRET_ACCESS_KEY": "fleet", "AWS_REGION": "us-east-1"}
_PATIENCE = 120


def start(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `kvmprobe fleet` with these arguments."""
    # Whoever runs the tests in the background ignores SIGINT, and would hand that down.
    listening = ("env", "--default-signal=INT")
    command = (*listening, sys.executable, "-m", "kvmprobe", "fleet", *map(str, arguments))
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run `kvmprobe fleet` to its end: status, stdout, stderr."""
    process = start(*arguments, env=env)
    out, err = process.communicate()
    return process.returncode, out, err


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes of a cluster's workers below a process, as far as they run."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            # Each is started by multiprocessing, as is a process that tracks its resources.
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def wait_for(what: Callable[[], object], why: str) -> None:
    """Wait until something is so; raises TimeoutError with `why`."""
    end = time.monotonic() + _PATIENCE
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(why)
        time.sleep(0.01)


def free_port() -> int:
    """A port on loopback that nobody has now."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def _service(*command: str, port: int, env: dict[str, str] | None = None) -> Iterator[int]:
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | (env or {}), stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: _answers(port) or process.poll() is not None, f"no answer: {command}")
        if process.poll() is not None:
            raise RuntimeError(f"it ended: {command}")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def cluster(workers: int, env: dict[str, str] | None = None) -> Iterator[tuple[str, list[int]]]:
    """A scheduler and workers of dask: the address, and all processes, the scheduler last."""
    port = free_port()
    dask = (sys.executable, "-m", "dask")
    address = f"tcp://127.0.0.1:{port}"
    with contextlib.ExitStack() as opened:
        scheduler = opened.enter_context(
            _service(*dask, "scheduler", "--host", "127.0.0.1", "--port", str(port),
                     "--no-dashboard", port=port)
        )  # fmt: skip
        pids = []
        for _ in range(workers):
            own = free_port()
            pids.append(opened.enter_context(
                _service(*dask, "worker", address, "--host", "127.0.0.1", "--nthreads", "1",
                         "--no-nanny", "--no-dashboard", "--worker-port", str(own), port=own,
                         env=env)
            ))  # fmt: skip
        yield address, [*pids, scheduler]


@contextlib.contextmanager
def store(server: str, bucket: str) -> Iterator[dict[str, str]]:
    """An S3 server on loopback with an empty bucket: what its clients need in their environment.

    Args:
        server: moto's `moto_server`; it has an environment of its own.
        bucket: the bucket's name.

    """
    from pyarrow import fs

    port = free_port()
    env = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    with _service(server, "-H", "127.0.0.1", "-p", str(port), port=port):
        system = fs.S3FileSystem(
            access_key=KEYS["AWS_ACCESS_KEY_ID"], secret_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            endpoint_override=env["AWS_ENDPOINT_URL"], region=KEYS["AWS_REGION"],
            allow_bucket_creation=True,
        )  # fmt: skip
        system.create_dir(bucket)
        yield env


def upload(folder: Path, env: dict[str, str], bucket: str) -> None:
    """Copy a fleet's captures into a bucket."""
    from pyarrow import fs

    system = fs.S3FileSystem(
        access_key=env["AWS_ACCESS_KEY_ID"], secret_key=env["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=env["AWS_ENDPOINT_URL"], region=env["AWS_REGION"],
    )  # fmt: skip
    for path in sorted(folder.rglob("*.parquet")):
        with system.open_output_stream(f"{bucket}/{path.relative_to(folder)}") as target:
            target.write(path.read_bytes())
