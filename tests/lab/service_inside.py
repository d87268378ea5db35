# SPDX-License-Identifier: MIT
"""Runs in the lab's VM, where systemd is PID 1: the shipped unit from its start to its end.

service_inside.py OUT   one JSON line a step to OUT/seen.ndjson
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, "/lab")
from inside import PATIENCE, Trial  # type: ignore[import-not-found]

_UNIT = "kvmprobe-watch"
_CONFIG = Path("/etc/kvmprobe/watch.toml")
#: CAP_PERFMON and CAP_BPF of linux/capability.h
_CAPABILITIES = f"{1 << 38 | 1 << 39:016x}"
_RULE = "internal-slot-hit"


def said(*command: str) -> str:
    """Run a command and return what it said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.strip()


def shown(name: str) -> str:
    """A property of the unit."""
    return said("systemctl", "show", "--value", "-p", name, _UNIT)


def until(name: str, *values: str) -> str:
    """Wait until a property of the unit has one of these values; what it has then."""
    end = time.monotonic() + PATIENCE
    while (now := shown(name)) not in values and time.monotonic() < end:
        time.sleep(1)
    return now


def journal(*matches: str) -> list[dict[str, str]]:
    """The journal's entries of the unit."""
    lines = said("journalctl", "-u", _UNIT, "-o", "json", "--no-pager", *matches).splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def start(trial: Trial) -> str:
    """Start the unit: systemctl comes back when it has said READY."""
    trial.note("PID 1", "systemd", Path("/proc/1/comm").read_text().strip())
    _CONFIG.write_text("log.files = 2\n")
    begun = time.monotonic()
    trial.note("systemctl start (until READY)", "", said("systemctl", "start", _UNIT))
    trial.figure("READY after", f"{time.monotonic() - begun:.0f} s")
    trial.note("its state", ("notify", "active"), (shown("Type"), shown("ActiveState")))
    pid = shown("MainPID")
    status = Path(f"/proc/{pid}/status").read_text()
    for each in ("Eff", "Prm", "Bnd"):
        found = re.findall(rf"^Cap{each}:\s+(\w+)$", status, re.MULTILINE)
        trial.note(f"capabilities, {each}", [_CAPABILITIES], found)
    limits = Path(f"/proc/{pid}/limits").read_text()
    found = re.findall(r"^Max open files\s+(\d+)\s+(\d+)", limits, re.MULTILINE)
    trial.note("descriptors", [("1024", "1024")], found)
    rating = said("systemd-analyze", "security", "--no-pager", _UNIT).splitlines()[-1]
    trial.figure("systemd-analyze security", rating)
    return pid


def reload(trial: Trial, pid: str) -> None:
    """SIGHUP with a good configuration, and with a bad one."""
    trial.note("systemctl reload", "", said("systemctl", "reload", _UNIT))
    trial.until(lambda _: any("was read again" in e["MESSAGE"] for e in journal()))
    trial.note("configuration good", 1.0, trial.metrics()["kvmprobe_config_good"])
    _CONFIG.write_text("colour = 1\n")
    said("systemctl", "reload", _UNIT)
    trial.until(lambda _: trial.metrics()["kvmprobe_config_good"] == 0)
    told = [e["MESSAGE"] for e in journal() if "old configuration stays" in e["MESSAGE"]]
    trial.note("a bad one, in the journal", True, "colour: unknown key" in "".join(told))
    trial.note("the same process", pid, shown("MainPID"))
    _CONFIG.write_text("log.files = 2\n")


def finding(trial: Trial) -> str:
    """A guest has the fault happen: the journal has its finding."""
    with trial.guest() as guest:
        key = trial.found(guest)
        entries = journal(f"KVMPROBE_ID={key}")
        trial.note("the finding in the journal", True, bool(entries))
        fields = ("RULE", "SEVERITY", "FAULT", "VM_PID")
        first = {name: entries[0].get(f"KVMPROBE_{name}") for name in fields}
        first["PRIORITY"] = entries[0]["PRIORITY"]
        wanted = dict(zip(fields, (_RULE, "critical", "internal-slot", str(guest)), strict=True))
        trial.note("its fields", wanted | {"PRIORITY": "2"}, first)
        trial.figure("its message", entries[0]["MESSAGE"])
        trial.check_answers("check", 2)
    return str(key)


def watchdog(trial: Trial, pid: str, key: str) -> None:
    """A watch that stands still is killed and started again, and knows its findings."""
    trial.note("standing still", "", said("kill", "-STOP", pid))
    begun = time.monotonic()
    trial.note("Result", "watchdog", until("Result", "watchdog"))
    trial.figure("killed after", f"{time.monotonic() - begun:.0f} s")
    trial.note("restarts", "1", until("NRestarts", "1"))
    trial.note("again", "active", until("ActiveState", "active"))
    trial.note("another process", True, shown("MainPID") != pid)
    kept = [each.id for each in trial.until(lambda s: s.state == "watching").findings]
    trial.note("the finding is kept", [key], kept)


def stop(trial: Trial) -> None:
    """The unit stops."""
    begun = time.monotonic()
    trial.note("systemctl stop", "", said("systemctl", "stop", _UNIT))
    trial.figure("it took", f"{time.monotonic() - begun:.1f} s")
    trial.note("how it ended", ("inactive", "success"), (shown("ActiveState"), shown("Result")))
    trial.note("its runtime directory", False, Path("/run/kvmprobe").exists())


def main() -> None:
    """Run the command line."""
    trial = Trial("internal-slot", "vulnerable", Path(sys.argv[1]))
    try:
        pid = start(trial)
        reload(trial, pid)
        key = finding(trial)
        watchdog(trial, pid, key)
        stop(trial)
    finally:
        (trial.out / "journal.txt").write_text(said("journalctl", "-u", _UNIT, "--no-pager"))


if __name__ == "__main__":
    main()
