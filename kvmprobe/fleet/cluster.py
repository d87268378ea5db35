# SPDX-License-Identifier: MIT
"""Workers of dask.distributed: a cluster of this machine, or somebody's own."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from kvmprobe import __version__
from kvmprobe.errors import KvmprobeError
from kvmprobe.fleet.places import NEEDS

#: Seconds until a scheduler has to answer.
_ANSWER = 5
#: Tasks that wait at the scheduler for each worker thread: enough to keep all busy.
_AHEAD = 3

_Work = TypeVar("_Work")
_Result = TypeVar("_Result")


@contextlib.contextmanager
def connect(scheduler: str | None, workers: int | None = None) -> Iterator[Any]:
    """Give a client of dask.distributed: a context.

    Args:
        scheduler: the address of a running scheduler; None: a cluster on this machine, that nobody
            else can use and that ends with the context.
        workers: processes of that cluster; None: one for each core.

    Raises:
        KvmprobeError: distributed is not installed, there is no scheduler or no worker, or a worker
            has another kvmprobe.

    """
    try:
        import dask
        from distributed import Client, LocalCluster
        from distributed.comm.core import CommClosedError
        from distributed.security import Security
    except ImportError as error:
        raise KvmprobeError(NEEDS.format(error.name)) from None
    # What goes wrong is told by the results; its own log is for people who debug it.
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as opened:
        if scheduler is None:
            # What it keeps for its dashboard, which nobody sees here, grows for an hour.
            opened.enter_context(dask.config.set({"distributed.worker.profile.enabled": False}))
            with _ignoring_interrupts():
                local = LocalCluster(  # type: ignore[no-untyped-call]
                    n_workers=workers or os.cpu_count() or 1,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    silence_logs=logging.CRITICAL,
                    # Whoever reaches a scheduler runs programs as its user.
                    security=Security.temporary(),  # type: ignore[no-untyped-call]
                )
            cluster = opened.enter_context(local)
            yield opened.enter_context(Client(cluster))  # type: ignore[no-untyped-call]
            return
        try:
            connecting = Client(scheduler, timeout=_ANSWER)  # type: ignore[no-untyped-call]
            client = opened.enter_context(connecting)
        except (OSError, ValueError, CommClosedError):
            raise KvmprobeError(
                f"no scheduler answers at {scheduler}; start one with `dask scheduler`, or leave "
                "--scheduler out to use this machine"
            ) from None
        _check_workers(client, scheduler)
        yield client


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Start processes that a terminal's Ctrl-C doesn't reach: this one ends them, in order."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _check_workers(client: Any, scheduler: str) -> None:  # noqa: ANN401 - as in connect()
    try:
        client.wait_for_workers(1, timeout=_ANSWER)
    except TimeoutError:
        raise KvmprobeError(
            f"the scheduler at {scheduler} has no worker; start some with `dask worker {scheduler}`"
        ) from None
    answers = client.run(worker_version, on_error="return")
    for address, version in answers.items():
        if version != __version__:
            has = f"kvmprobe {version}" if isinstance(version, str) else "no kvmprobe that works"
            raise KvmprobeError(
                f"the worker at {address} has {has}; install kvmprobe {__version__} there"
            )


def worker_version() -> str:
    """Return the version of kvmprobe; runs on a worker."""
    return __version__


def each(
    client: Any,  # noqa: ANN401
    function: Callable[[_Work], _Result],
    works: Iterable[_Work],
) -> Iterator[tuple[_Work, _Result | Exception]]:
    """Run a function on workers, and give each result as it comes, with what it is of.

    A worker that dies loses nothing: what it had is run again elsewhere.  What a task raises, and
    the error of one that kills worker after worker, stands for its result.

    Args:
        client: as `connect` gives it.
        function: of a module that workers can import.
        works: what to call it with; not all are sent at once.

    Raises:
        KvmprobeError: the scheduler is gone.

    """
    from distributed import CancelledError, as_completed
    from distributed.comm.core import CommClosedError

    waiting = iter(works)
    sent: dict[Any, _Work] = {}
    results: Any = as_completed()  # type: ignore[no-untyped-call]

    def send() -> None:
        for work in waiting:
            future = client.submit(function, work, pure=False)
            sent[future] = work
            results.add(future)
            return

    for _ in range(max(_AHEAD * sum(client.nthreads().values()), _AHEAD)):
        send()
    try:
        for future in results:
            work = sent.pop(future)
            if future.cancelled():
                raise CancelledError
            error = future.exception()
            yield work, error if error is not None else future.result()
            future.release()
            send()
    except (CancelledError, CommClosedError):
        raise KvmprobeError(
            "the scheduler is gone; the same command goes on where this one ended"
        ) from None
