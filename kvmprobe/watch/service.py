# SPDX-License-Identifier: MIT
"""The service: attach, drain, judge and tell until something says stop."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvmprobe import __version__
from kvmprobe.analysis.verdict import worst
from kvmprobe.analysis.words import INCONCLUSIVE
from kvmprobe.capture.header import live_header
from kvmprobe.capture.plan import Row
from kvmprobe.capture.session import MAX_TICK, Filters, Session
from kvmprobe.errors import HostError, KvmprobeError
from kvmprobe.probes.schema import EVENT, rows
from kvmprobe.store.lock import DirectoryLock
from kvmprobe.watch import status as statuses
from kvmprobe.watch.config import FIXED, Config, ConfigError, parse_listen, today
from kvmprobe.watch.desk import Desk
from kvmprobe.watch.host import kvm_modules
from kvmprobe.watch.metrics import MetricsServer, Numbers
from kvmprobe.watch.output import ERROR, INFO, NOTICE, WARNING, Journal, Notify, wall
from kvmprobe.watch.signals import Wishes
from kvmprobe.watch.snapshot import fault_verdicts, watched_vms
from kvmprobe.watch.status import Status

#: Seconds between two looks at what is new.
LOOK_SECONDS = 1.0
#: Seconds between two drains while little happens: the ring holds this much of a million a second.
IDLE_TICK = 0.2
#: Seconds that attaching again may take on a busy host: the unit's TimeoutStartSec.
ATTACH_SECONDS = 120.0
#: Seconds between two attempts to attach again.
RETRY_SECONDS = 10.0
#: VMs in the status at most.
MAX_VMS = 1000
_KEEPER_SECONDS = 1.0
_NO_EVENTS = np.zeros(0, EVENT)


class Picture(Protocol):
    """What shows a watch to somebody who sits before it."""

    def begin(self) -> None:
        """Probes were attached; VMs are numbered from 1."""

    def feed(self, rows: NDArray[Any], /) -> None:
        """Take a drain's events, dtype EVENT."""

    def show(self, status: Status, flight: Callable[[], NDArray[Any]], /) -> None:
        """Show the status; `flight` gives the flight recorder's events, dtype EVENT."""


class Service:
    """One watch, from start to stop."""

    def __init__(
        self, config: Config, reload: Callable[[], Config], picture: Picture | None = None
    ) -> None:
        """Prepare a watch; `reload` reads the configuration again, or raises ConfigError."""
        self._config = config
        self._reload_config = reload
        self._picture = picture
        self._journal = Journal()
        self._notify = Notify()
        self._boot = statuses.boot_id()
        self._since = wall()
        self._session: Session | None = None
        self._flying = False
        self._reason: str | None = "not attached yet"
        self._retry_at = 0.0
        self._retry = True
        self._modules: dict[str, int] = {}
        self._plan: tuple[Row, ...] = ()
        self._attachments = 0
        self._watched = 0.0
        self._drained = 0.0
        self._drained_wall = 0.0
        self._config_good = True
        self._config_loaded = time.time()
        self._doubted: str | None = None
        self._server: MetricsServer | None = None
        self._numbers: Numbers

    def run(self) -> None:
        """Watch until SIGTERM or SIGINT.

        Raises:
            HostError: this host can't be watched, the metrics' port is taken, or another watch has
                the directories.

        """
        config = self._config
        with ExitStack() as stack:
            stack.enter_context(_own(config.state_directory, 0o700, "--state-directory"))
            stack.enter_context(_own(config.runtime_directory, 0o755, "--runtime-directory"))
            self._desk = Desk(config, self._boot, self._journal)
            stack.callback(self._desk.keeper.close, _KEEPER_SECONDS)
            self._wishes = stack.enter_context(Wishes())
            stack.callback(self._remove_status)
            self._publish()
            self._serve(config)
            self._attach()
            stack.callback(self._detach, "stopped")
            self._publish()
            self._notify.send("READY=1", f"STATUS={self._summary()}")
            self._journal.say(NOTICE, f"watching: {self._summary()}")
            self._loop()
            self._notify.send("STOPPING=1")
            self._journal.say(NOTICE, f"stopping ({self._wishes.stop})")

    def _loop(self) -> None:
        looked = 0.0
        while self._wishes.stop is None:
            self._drain()
            now = time.monotonic()
            if now - looked >= LOOK_SECONDS:
                looked = now
                self._look(now)
            self._notify.alive()

    def _drain(self) -> None:
        session = self._session
        if session is None:
            time.sleep(IDLE_TICK)
            return
        time.sleep(session.tick if session.tick < MAX_TICK else IDLE_TICK)
        self._take(session.drain())

    def _take(self, events: NDArray[Any]) -> None:
        self._desk.feed(events)
        if self._picture is not None:
            self._picture.feed(events)
        now = time.monotonic()
        self._watched += now - self._drained
        self._drained, self._drained_wall = now, time.time()

    def _look(self, now: float) -> None:
        if self._wishes.reload:
            self._wishes.reload = False
            self._reload()
        if self._wishes.detach:
            self._wishes.detach = False
            self._retry = False
            self._detach("SIGUSR1: KVM's modules can be unloaded now; SIGHUP attaches again")
        self._mind_modules(now)
        self._desk.look(now, self._flight)
        self._publish()

    def _flight(self) -> NDArray[Any]:
        """The last events of all vCPUs, shipped or not."""
        if self._session is None or not self._flying:
            return _NO_EVENTS
        return rows(self._session.flight())

    # Attaching

    def _attach(self) -> None:
        """Attach everything and begin.  Raises HostError; then nothing is attached."""
        modules = kvm_modules()
        config = self._config
        flight = config.evidence.files > 0
        session = Session(Filters(), backend=config.backend, watch=True, flight=flight)
        try:
            session.prepare()
            session.attach()
            self._plan = tuple(session.plan.rows())
            self._desk.begin(live_header(session, sys.argv))
            session.release_compiler()
            session.start()
        except BaseException:
            session.close()
            raise
        self._session, self._modules, self._reason = session, modules, None
        if self._picture is not None:
            self._picture.begin()
        self._flying = flight
        self._attachments += 1
        self._drained = time.monotonic()

    def _detach(self, reason: str) -> None:
        """Detach everything; what was observed so far is judged."""
        session, self._session = self._session, None
        self._reason = reason
        if session is None:
            return
        try:
            self._take(session.stop())
            self._desk.look(time.monotonic(), lambda: _NO_EVENTS)
        finally:
            session.close()
        if self._wishes.stop is None:
            self._journal.say(WARNING, f"detached: {reason}")

    def _mind_modules(self, now: float) -> None:
        """Attach anew when a module of KVM was reloaded, or when there is hope after a failure."""
        modules = kvm_modules()
        vendors = {name for name in modules if name != "kvm"}
        if self._session is not None and vendors and modules != self._modules:
            self._retry_at = now
            self._detach(f"{', '.join(sorted(vendors))} was loaded anew")
        if self._session is not None or not self._retry or now < self._retry_at:
            return
        try:
            with self._notify.busy(ATTACH_SECONDS):
                self._attach()
        except HostError as error:
            self._retry_at = now + RETRY_SECONDS
            if self._reason != str(error):
                self._journal.say(ERROR, f"can't attach: {error}; trying again")
            self._reason = str(error)
        else:
            self._journal.say(NOTICE, f"attached again: {self._summary()}")

    # Configuration

    def _reload(self) -> None:
        self._notify.reloading()
        try:
            config = self._reload_config()
            for name in FIXED:
                if getattr(config, name) != getattr(self._config, name):
                    raise ConfigError(f"{name} can't change in a running watch: restart it")
            if config.metrics != self._config.metrics:
                self._serve(config)
        except KvmprobeError as error:
            self._config_good = False
            self._journal.say(ERROR, f"the old configuration stays: {error}")
        else:
            self._config = config
            self._desk.configure(config)
            self._config_good = True
            self._config_loaded = time.time()
            self._retry, self._retry_at = True, 0.0
            self._journal.say(INFO, "the configuration was read again")
        self._notify.send("READY=1", f"STATUS={self._summary()}")

    def _serve(self, config: Config) -> None:
        """Serve metrics where the configuration says; raises HostError, and then the old stays."""
        listen = parse_listen(config.metrics.listen)
        server = MetricsServer(*listen, lambda: self._numbers) if listen else None
        if self._server is not None:
            self._server.close()
        self._server = server

    # Telling

    def _publish(self) -> None:
        """Make the numbers of the moment, and write the status file."""
        status = self._status()
        self._numbers = Numbers(
            status=status,
            plan=self._plan,
            findings=dict(self._desk.found),
            errors=dict(self._desk.keeper.errors),
            evidence=self._desk.evidence_written,
            attachments=self._attachments,
            config_good=self._config_good,
            config_loaded=self._config_loaded,
            expired_ignores=len(self._config.expired(today())),
            drained=self._drained_wall,
            runs=self._session.run_times() if self._session is not None else {},
        )
        directory = self._config.runtime_directory
        self._desk.keeper.now("status", lambda: statuses.write(status, directory))
        if self._picture is not None:
            self._picture.show(status, self._flight)
        doubted = status.verdict if status.verdict == INCONCLUSIVE else None
        if doubted != self._doubted:
            self._doubted = doubted
            if doubted and self._session is not None:
                missing = {m for v in status.verdicts.values() for m in v.missing}
                self._journal.say(WARNING, f"inconclusive: {'; '.join(sorted(missing))}")
            self._notify.send(f"STATUS={self._summary()}")

    def _status(self) -> Status:
        desk = self._desk
        report = desk.judge.report() if desk.judge is not None else None
        attached = self._session is not None
        verdicts = fault_verdicts(report, None if attached else self._reason)
        vms = watched_vms(report, desk.vms, desk.names) if report and attached else ()
        latched = tuple(desk.latched())
        return Status(
            schema=statuses.SCHEMA,
            version=__version__,
            boot_id=self._boot,
            pid=os.getpid(),
            written_ns=statuses.now_ns(),
            since=self._since,
            seconds=round(self._watched, 3),
            state="watching" if attached else "detached",
            reason=self._reason,
            verdict=worst(v.verdict for v in verdicts.values()),
            verdicts=verdicts,
            vms=vms[:MAX_VMS],
            vms_seen=desk.vms_seen,
            vms_left_out=len(vms[MAX_VMS:]),
            findings=latched,
            findings_left_out=desk.latches.left_out,
            events=dict(desk.events),
            lost=dict(desk.lost),
            attached=tuple(
                (row["observation"], row["site"])
                for row in self._plan
                if row["attached"] and attached
            ),
            metrics=self._server.place if self._server is not None else None,
        )

    def _summary(self) -> str:
        """One line on how it is."""
        status = self._numbers.status
        where = f"metrics on http://{status.metrics}/metrics" if status.metrics else "no metrics"
        if self._session is None:
            return f"detached: {self._reason}; {where}"
        return (
            f"{len(status.attached)} observations attached, {len(status.vms)} VM(s), "
            f"{len(status.findings)} finding(s) not acknowledged, "
            f"verdict: {status.verdict}; {where}"
        )

    def _remove_status(self) -> None:
        directory = self._config.runtime_directory
        (directory / statuses.FILE_NAME).unlink(missing_ok=True)


def _own(path: Path, mode: int, option: str) -> DirectoryLock:
    """Make a directory if it doesn't exist, and lock it; raises HostError."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        return DirectoryLock(path)
    except BlockingIOError:
        raise HostError(
            f"another kvmprobe watch uses {path}; stop it, or give this one another {option}"
        ) from None
    except OSError as error:
        raise HostError(f"can't use the directory {path}: {error.strerror}") from None
