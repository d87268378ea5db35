# SPDX-License-Identifier: MIT
"""Runs in the lab's VM: doctor, check, verify and watch beside a guest that has the fault happen.

production_inside.py try FAULT STATE OUT PART…   one JSON line a step to OUT/seen.ndjson
production_inside.py guest FAULT                 the guest, until it is killed

FAULT is internal-slot or address-space, STATE vulnerable or fixed, PART alone or watched.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvmprobe.guests import smm
from kvmprobe.guests.nested import Guest
from kvmprobe.guests.vmm import TSS_ADDRESS, Machine
from kvmprobe.watch.status import Status, StatusError, read

#: The rule that convicts the guest here, by fault.
RULES = {"internal-slot": "internal-slot-hit", "address-space": "address-space-mixup"}
#: Seconds for what takes the emulator minutes when this machine is busy: to attach, above all.
PATIENCE = 900.0
_NESTED = ("load", "string-out", "l2-load", "string-out", "string-in")
_PAUSE = 0.2
_STATE = Path("/var/lib/kvmprobe")
_RUNTIME = Path("/run/kvmprobe")


def guest(fault: str) -> None:
    """Do what shows the fault, over and over."""
    if fault == "internal-slot":
        sys.path.insert(0, "/lab/nested")
        from nested import make_internal_slot  # type: ignore[import-not-found]

        with Machine() as machine:
            nested = Guest(machine, target=TSS_ADDRESS)
            make_internal_slot(machine, TSS_ADDRESS)
            nested.start()
            while True:
                for step in _NESTED:
                    nested.do(step)
                time.sleep(_PAUSE)
    while True:
        smm.run(smm.RECIPES["forward"])
        time.sleep(_PAUSE)


class Trial:
    """One try: what was expected and what was seen, step by step."""

    def __init__(self, fault: str, state: str, out: Path) -> None:
        self.fault, self.vulnerable, self.out = fault, state == "vulnerable", out
        self.rule = RULES[fault]
        self._seen = (out / "seen.ndjson").open("w")

    def note(self, what: str, expected: object, found: object) -> None:
        """Note what was seen, and whether it was to be."""
        line = {
            "what": what,
            "expected": str(expected),
            "found": str(found),
            "right": expected == found,
        }
        print(json.dumps(line), file=self._seen, flush=True)
        print(f"{what}: {found}", flush=True)

    def figure(self, what: str, found: str) -> None:
        """Note a measurement."""
        line = {"what": what, "expected": "", "found": found, "right": True}
        print(json.dumps(line), file=self._seen, flush=True)
        print(f"{what}: {found}", flush=True)

    def run(self, name: str, *words: str | Path) -> tuple[int, str, float]:
        """Run kvmprobe; its status, output and seconds.  The output is kept in `name`."""
        begun = time.monotonic()
        done = subprocess.run(
            ["kvmprobe", *map(str, words)], capture_output=True, text=True, check=False
        )
        (self.out / name).write_text(done.stdout + done.stderr)
        return done.returncode, done.stdout, time.monotonic() - begun

    @contextlib.contextmanager
    def guest(self) -> Iterator[int]:
        """A guest that shows the fault, and its process."""
        with (self.out / "guest.txt").open("a") as sink:
            process = subprocess.Popen(
                [sys.executable, __file__, "guest", self.fault], stdout=sink, stderr=sink
            )
            try:
                time.sleep(4)
                yield process.pid
                self.note("the guest still runs", None, process.poll())
            finally:
                process.kill()
                process.wait()

    # Without a watch

    def alone(self) -> None:
        """Try doctor, check and verify."""
        code, said, _ = self.run("check-quiet.txt", "check", "-d", "2")
        self.note("check without a guest", (0, "KVMPROBE OK"), (code, said.partition(" - ")[0]))
        with self.guest() as pid:
            self._doctor(pid)
            metrics = self.out / "kvmprobe.prom"
            code, said, seconds = self.run("check.txt", "check", "--textfile", metrics)
            wanted = (2, "KVMPROBE CRITICAL") if self.vulnerable else (0, "KVMPROBE OK")
            self.note("check beside the guest", wanted, (code, said.partition(" - ")[0]))
            criticals = dict(p.split("=") for p in said.rpartition("| ")[2].split())["criticals"]
            self.note("its performance data", self.vulnerable, not criticals.startswith("0;"))
            self.figure("check's line", said.strip())
            self.figure("check took", f"{seconds:.1f} s")
            line = f"kvmprobe_check_status {wanted[0]}"
            self.note("its textfile", True, line in metrics.read_text().splitlines())
        code, said, seconds = self.run("verify.txt", "verify", "--json")
        # The lab's module makes the slot of one VM: no other has it, as on every AMD host.
        shows = self.vulnerable and self.fault == "address-space"
        self.note("verify", 2 if shows else 0, code)
        for answer in json.loads(said)["answers"]:
            self.figure(f"verify, {answer['fault']}", answer["answer"])
        self.figure("verify took", f"{seconds:.1f} s")

    def _doctor(self, pid: int) -> None:
        code, said, _ = self.run("doctor.json", "doctor", "--json")
        self.note("doctor", 0, code)
        document = json.loads(said)
        (vm,) = [vm for vm in document["vms"] if vm["pid"] == pid] or [None]
        self.note("doctor shows the VM", True, vm is not None)
        if vm is not None and self.fault == "internal-slot":
            slots = [slot["gpa"] for slot in vm["slots"] or []]
            self.note("its internal slots", [f"{TSS_ADDRESS:#x}"], slots)
            self.note("its nesting", "in use", vm["nesting"])

    # With a watch

    def watched(self) -> None:
        """Try the service, from a first finding over a restart and a reload to its end."""
        with self._watch("1") as watch:
            self.check_answers("check from a quiet watch", 0)
            with self.guest() as pid:
                begun = time.monotonic()
                first = self.found(pid)
                self.figure("told within", f"{time.monotonic() - begun:.1f} s")
                if first is None:
                    self.check_answers("check from the watch", 0)
                    metrics = self.metrics()
                    name = f'kvmprobe_fault_verdict{{fault="{self.fault}",verdict="fixed"}}'
                    self.note("metrics: fixed", 1.0, metrics.get(name))
                else:
                    self._finding(first)
            self._end(watch)
        with self._watch("2") as watch:
            if first is not None:
                kept = [each.id for each in self._status().findings]
                self.note("a restart keeps the finding", True, first in kept)
                self.check_answers("check after the restart", 2)
            self._reload()
            with self.guest() as pid:
                again = self.found(pid)
            if first is not None:
                self.note("another VM, another finding", True, again not in (None, first))
                for each in [each.id for each in self._status().findings]:
                    code, said, _ = self.run("ack.txt", "ack", each, "--reason", "tried")
                    self.note("ack", (0, f"{each}: acknowledged\n"), (code, said))
                self.until(lambda status: not status.findings)
                self.check_answers("check after the ack", 1)
            self._end(watch)

    def _finding(self, key: str) -> None:
        (finding,) = [each for each in self._status().findings if each.id == key]
        self.note("finding", ("critical", self.fault), (finding.severity, finding.fault))
        log = [json.loads(line) for line in (_STATE / "findings.ndjson").read_text().splitlines()]
        told = [line["what"] for line in log if line["id"] == key]
        self.note("log", True, {"found", "evidence"} <= set(told))
        journal = (self.out / "watch-1.txt").read_text()
        self.note("journal (stderr)", True, f"critical finding {key}" in journal)
        name = f'kvmprobe_findings_total{{rule="{self.rule}",severity="critical"}}'
        self.note("metrics: occurrences", True, self.metrics().get(name, 0) > 0)
        name = 'kvmprobe_latched{ignored="no",severity="critical"}'
        self.note("metrics: latched", True, self.metrics().get(name, 0) > 0)
        self.check_answers("check from the watch", 2)
        capture = Path(finding.capture or "")
        self.figure("evidence", f"{capture.stat().st_size} bytes")
        code, said, _ = self.run("evidence.json", "analyze", "--json", capture)
        document = json.loads(said)
        self.note("evidence, analyzed", 0, code)
        self.note("its finding", True, self.rule in [f["rule"] for f in document["findings"]])
        code, said, _ = self.run("doctor-shown.json", "doctor", "--json", "--capture", capture)
        word = json.loads(said)["exposure"][self.fault]["word"] if not code else said
        self.note("doctor --capture", "shown", word)

    def check_answers(self, what: str, wanted: int) -> None:
        """Ask `check`, which has to answer from the watch's status."""
        code, said, seconds = self.run(f"{what.replace(' ', '-')}.json", "check", "--json")
        answer = json.loads(said)
        self.note(what, (wanted, "watch"), (code, answer["source"]))
        self.figure(f"{what} took", f"{seconds:.1f} s")

    def found(self, pid: int) -> str | None:
        """Wait for this process's critical finding with its evidence, or for the verdict fixed."""
        if not self.vulnerable:
            self.until(lambda status: status.verdicts[self.fault].verdict == "fixed")
            self.note("findings", 0, len(self._status().findings))
            return None

        def there(status: Status) -> bool:
            return any(
                f.pid == pid and f.severity == "critical" and f.capture for f in status.findings
            )

        status = self.until(there)
        return next(f.id for f in status.findings if f.pid == pid)

    def _reload(self) -> None:
        """Load kvm_amd anew under the watch."""
        for command in (["rmmod", "kvm_amd"], ["modprobe", "kvm_amd"]):
            subprocess.run(command, check=True)
        begun = time.monotonic()
        while self.metrics()["kvmprobe_attachments_total"] < 2:
            if time.monotonic() - begun > PATIENCE:
                raise AssertionError("the watch didn't attach again")
            time.sleep(0.5)
        self.until(lambda status: status.state == "watching")
        self.note("attached again after a reload of kvm_amd", True, True)
        self.figure("attaching again took", f"{time.monotonic() - begun:.1f} s")

    @contextlib.contextmanager
    def _watch(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.out / f"watch-{name}.txt").open("w") as sink:
            process = subprocess.Popen(["kvmprobe", "watch"], stdout=sink, stderr=sink)
            try:
                begun = time.monotonic()
                self.until(lambda status: status.state == "watching")
                self.figure("watch was attached within", f"{time.monotonic() - begun:.1f} s")
                yield process
            finally:
                process.kill()
                process.wait()

    def _end(self, watch: subprocess.Popen[bytes]) -> None:
        begun = time.monotonic()
        watch.send_signal(signal.SIGTERM)
        self.note("watch at SIGTERM", 0, watch.wait(PATIENCE))
        self.figure("it stopped within", f"{time.monotonic() - begun:.1f} s")
        self.note("its status is gone", False, (_RUNTIME / "status.json").exists())

    def _status(self) -> Status:
        return self.until(lambda _: True)

    def until(self, true: Callable[[Status], bool]) -> Status:
        """Wait until the watch's status is so, and return it."""
        end = time.monotonic() + PATIENCE
        status: Status | None = None
        while time.monotonic() < end:
            with contextlib.suppress(StatusError):
                status = read(_RUNTIME)
                if true(status):
                    return status
            time.sleep(0.2)
        raise AssertionError(f"the watch's status didn't become what was expected: {status}")

    def metrics(self) -> dict[str, float]:
        """The watch's metrics, by name with labels."""
        with urllib.request.urlopen(f"http://{self._status().metrics}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}


def _warnings() -> list[str]:
    log: list[Any] = subprocess.run(
        ["dmesg"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in log if "WARNING:" in line or "BUG:" in line]


def main() -> None:
    """Run the command line."""
    if sys.argv[1] == "guest":
        guest(sys.argv[2])
    fault, state, out, *parts = sys.argv[2:]
    trial = Trial(fault, state, Path(out))
    if "alone" in parts:
        trial.alone()
    if "watched" in parts:
        trial.watched()
    trial.note("warnings in the kernel's log", [], _warnings())


if __name__ == "__main__":
    main()
