# SPDX-License-Identifier: MIT
"""What a watch knows, as Prometheus metrics over HTTP.

No label takes a value that a guest or a VMM chooses: labels are observations, sites, rules, faults,
the names of BPF programs and other words of this program.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import make_wsgi_app

from kvmprobe.analysis.rules import RULES
from kvmprobe.analysis.words import VERDICTS
from kvmprobe.capture.plan import Row
from kvmprobe.errors import HostError
from kvmprobe.watch.status import Status

#: Requests that are answered at the same time; more are turned away.
_REQUESTS = 8
#: Seconds for which a client may say nothing.
_PATIENCE = 5.0

Labels = TypeVar("Labels", bound=tuple[str, ...])


@dataclass(frozen=True)
class Numbers:
    """All that is told.  `findings` are occurrences by rule, since the start of the process.

    `errors` are writes that failed, by output.  `runs` are by BPF program how long it ran, ns, and
    how often: all 0 where the kernel doesn't count (kernel.bpf_stats_enabled).  `drained` is the
    wall clock of the last drain, s since 1970.
    """

    status: Status
    plan: tuple[Row, ...]
    findings: Mapping[str, int]
    errors: Mapping[str, int]
    evidence: int
    attachments: int
    config_good: bool
    config_loaded: float
    expired_ignores: int
    drained: float
    runs: Mapping[str, tuple[int, int]]


class _Collector:
    """Makes the metrics of the numbers of the moment."""

    def __init__(self, numbers: Callable[[], Numbers]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Metric]:
        numbers = self._numbers()
        yield from _about_the_watch(numbers)
        yield from _about_the_host(numbers)


def _about_the_watch(n: Numbers) -> Iterator[Metric]:
    status = n.status
    yield _gauge("build_info", "The program.", {(status.version,): 1}, ["version"])
    attached = status.state == "watching"
    yield _gauge("attached", "1: probes are attached and awake.", {(): int(attached)})
    probes = {(row["observation"], row["site"]): 0 for row in n.plan}
    for row in n.plan:
        probes[row["observation"], row["site"]] |= int(row["attached"] and attached)
    yield _gauge("probe_attached", "1: it is observed there.", probes, ["observation", "site"])
    yield _counter("watched_seconds", "Seconds with probes awake.", {(): status.seconds})
    yield _counter("attachments", "Times that the probes were attached.", {(): n.attachments})
    yield _gauge("last_drain_timestamp_seconds", "When events were last taken.", {(): n.drained})
    yield _gauge("config_good", "0: the last reload was refused.", {(): int(n.config_good)})
    yield _gauge(
        "config_loaded_timestamp_seconds",
        "When the configuration in use was read.",
        {(): n.config_loaded},
    )
    yield _gauge(
        "ignores_expired", "[[ignore]] entries that are out of date.", {(): n.expired_ignores}
    )
    errors = {(output,): count for output, count in n.errors.items()}
    yield _counter("output_errors", "Writes that failed.", errors, ["output"])
    yield _counter("evidence_captures", "Captures written for findings.", {(): n.evidence})
    if any(count for _, count in n.runs.values()):
        runs = {(program,): count for program, (_, count) in n.runs.items()}
        yield _counter("probe_runs", "Runs of a BPF program.", runs, ["program"])
        seconds = {(program,): ns / 1e9 for program, (ns, _) in n.runs.items()}
        yield _counter("probe_run_seconds", "Time in a BPF program.", seconds, ["program"])


def _about_the_host(n: Numbers) -> Iterator[Metric]:
    status = n.status
    events = {(name,): count for name, count in status.events.items()}
    yield _counter("events", "Events taken.", events, ["observation"])
    lost = {(row["observation"],): 0 for row in n.plan}
    lost |= {(name,): count for name, count in status.lost.items()}
    yield _counter("lost_records", "Records lost.", lost, ["observation"])
    found = {(rule.id, rule.severity): n.findings.get(rule.id, 0) for rule in RULES}
    yield _counter("findings", "Occurrences of a rule.", found, ["rule", "severity"])
    latched = {(sev, ignored): 0 for sev in ("warning", "critical") for ignored in ("no", "yes")}
    for each in status.findings:
        latched[each.severity, "yes" if each.ignored is not None else "no"] += 1
    yield _gauge(
        "latched",
        "Findings not acknowledged, one a fault and VM.",
        latched,
        ["severity", "ignored"],
    )
    yield _counter(
        "latched_left_out", "Occurrences that found no place.", {(): status.findings_left_out}
    )
    overall = {(word,): int(word == status.verdict) for word in VERDICTS}
    yield _gauge("verdict", "1: this is the worst verdict.", overall, ["verdict"])
    by_fault = {
        (fault, word): int(word == said.verdict)
        for fault, said in status.verdicts.items()
        for word in VERDICTS
    }
    yield _gauge("fault_verdict", "1: this is the verdict.", by_fault, ["fault", "verdict"])
    vms = {(word,): sum(vm.verdict == word for vm in status.vms) for word in VERDICTS}
    yield _gauge("vms", "VMs that run, by their verdict.", vms, ["verdict"])
    yield _counter("vms_seen", "VMs ever seen.", {(): status.vms_seen})


def _gauge(
    name: str, text: str, values: Mapping[Labels, float], labels: list[str] | None = None
) -> Metric:
    family = GaugeMetricFamily(f"kvmprobe_{name}", text, labels=labels or [])
    for label, value in values.items():
        family.add_metric(list(label), value)
    return family


def _counter(
    name: str, text: str, values: Mapping[Labels, float], labels: list[str] | None = None
) -> Metric:
    family = CounterMetricFamily(f"kvmprobe_{name}", text, labels=labels or [])
    for label, value in values.items():
        family.add_metric(list(label), value)
    return family


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: what a client asks for is not ours to print."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    _places = threading.BoundedSemaphore(_REQUESTS)

    def server_bind(self) -> None:
        # WSGIServer asks the resolver for a name, which may take a minute.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """A client that goes away is no error of ours."""


class MetricsServer:
    """Serves the metrics at /metrics until `close`."""

    def __init__(self, address: str, port: int, numbers: Callable[[], Numbers]) -> None:
        """Listen.  Port 0 takes any free one.

        Raises:
            HostError: the port is taken, or the address is not this host's.

        """
        registry = CollectorRegistry()
        registry.register(_Collector(numbers))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        six = ipaddress.ip_address(address).version == 6

        class Server(_Server):
            address_family = socket.AF_INET6 if six else socket.AF_INET

        try:
            self._server = make_server(
                address, port, make_wsgi_app(registry), Server, handler_class=_Handler
            )
        except OSError as error:
            raise HostError(
                f"can't serve metrics on {_place(address, port)}: {error.strerror}; "
                'choose another metrics.listen, or "" for none'
            ) from None
        self.place = _place(address, self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _place(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
