# SPDX-License-Identifier: MIT
"""`python -m tests.lab.probes`: the function probes where they can go wrong.

backends      every way to probe records the same nested guest, and finds the same, or says what it
              can't see and that the result is inconclusive
missed        kretprobes with one instance, which a waiting vCPU holds: missed exits are counted
second-tool   another BPF tool on the same functions: skipped programs are counted (by the kernel)
again         attached and detached 100 times: nothing is left, nothing grows
"""

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.base import CHECKOUT, LabError, say
from tests.lab.helper import get_helper
from tests.lab.kernels import get_kernel, parse_spec
from tests.lab.matrix import EMULATORS
from tests.lab.rootfs import get_root
from tests.lab.vm import Job, run_job

BACKENDS = ("kprobe", "fentry", "tracepoint")
CHECKS = ("backends", "missed", "second-tool", "again")
TIMES = 100
#: With kvmprobe's own dependencies, which the system's Python doesn't have.
_INSIDE = "/opt/venv/bin/python /lab/probes_inside.py"
_FAULT = "internal-slot"
_STEPS = "load string-out l2-load l2-store load string-out string-in"
_LIMIT_OF_BOOT, _LIMIT_OF_CHECK = 300.0, 600.0
#: What may be left growing: memory of the process, once the first turns have filled its caches.
_GROWTH_KIB = 1024


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    check: str
    found: str
    right: bool


def script(check: str, vendor: str) -> str:
    """Return the bash script of a check; its results are files in /out."""
    if check == "backends":
        words = ["python3", "/lab/nested/nested.py", *(["--slot"] if vendor == "amd" else [])]
        nested = shlex.join([*words, *_STEPS.split()])
        return "".join(_record(backend, f"--backend {backend}", nested) for backend in BACKENDS)
    if check == "missed":
        return f"{_INSIDE} missed /out/missed.kvmprobe\n" + _analyze("missed")
    if check == "second-tool":
        # The tool's map reads must be preempted by vCPUs for programs to be skipped: preempt=full.
        load = "python3 -m kvmprobe.guests.load --vcpus 2 --seconds 20 --flips 100"
        return (
            f"{_INSIDE} second-tool & tool=$!\n"
            "while [ ! -e /tmp/second-tool ] && kill -0 $tool; do sleep 1; done\n"
            + _record(
                "second-tool",
                "--backend kprobe",
                f"sh -c 'touch /tmp/go; {load}; touch /tmp/over'",
            )
            + "wait $tool\n"
        )
    return "".join(f"{_INSIDE} again {TIMES} {backend}\n" for backend in BACKENDS)


def _record(name: str, options: str, command: str) -> str:
    record = f"kvmprobe record {options} -o /out/{name}.kvmprobe -- {command}"
    return f"{record} 2>&1 | tee /out/{name}.txt\n" + _analyze(name)


def _analyze(name: str) -> str:
    capture = f"/out/{name}.kvmprobe"
    return (
        f"kvmprobe analyze --json {capture} >/out/{name}.json\n"
        f"kvmprobe info --json {capture} >/out/{name}.info\n"
    )


def judge(check: str, out: Path) -> Iterator[Line]:
    """Compare what a check left in its folder with what must be so.

    Raises OSError, ValueError or KeyError when the check did not get so far.
    """
    if check == "backends":
        yield from _judge_backends(out)
    elif check == "missed":
        yield from _judge_missed(out)
    elif check == "second-tool":
        yield from _judge_second_tool(out)
    else:
        yield from _judge_again(out)


def _judge_backends(out: Path) -> Iterator[Line]:
    found = {}
    for backend in BACKENDS:
        document = json.loads((out / f"{backend}.json").read_text())
        verdict = document["verdicts"][_FAULT]
        rules = sorted({finding["rule"] for finding in document["findings"]})
        found[backend] = verdict["verdict"], rules
        plan = json.loads((out / f"{backend}.info").read_text())["header"]["plan"]
        methods = sorted({row["attachment"].split(":")[0] for row in plan if row["attached"]})
        same = found[backend] == found.get("kprobe", found[backend])
        inconclusive = verdict["verdict"] == "inconclusive" and bool(verdict["missing"])
        text = f"{verdict['verdict']}: {' '.join(rules) or 'nothing'} ({' '.join(methods)})"
        if verdict["missing"]:
            text += f"; missing: {'; '.join(map(str, verdict['missing']))}"
        yield Line(f"backend {backend}", text, same or inconclusive)


def _lost(document: dict[str, Any], cause: str) -> dict[str, int]:
    """Return the records lost for a cause, by observation."""
    lost: dict[str, int] = {}
    for capture in document["captures"]:
        for loss in capture["losses"]:
            if loss["cause"] == cause:
                name = loss["observation"]
                lost[name] = lost.get(name, 0) + loss["records"]
    return lost


def _judge_missed(out: Path) -> Iterator[Line]:
    document = json.loads((out / "missed.json").read_text())
    load = json.loads((out / "blocked.json").read_text())
    lost = _lost(document, "EXIT")
    seen = document["observations"].get("FAULT", 0)
    # A call whose exit was missed is counted at the thread's next: each thread's last is not.
    open_at_end = load["calls"] - seen - lost.get("FAULT", 0)
    yield Line(
        "missed: seen + lost = calls",
        f"{seen} + {lost.get('FAULT', 0)} of {load['calls']} calls, {open_at_end} open at the end",
        lost.get("FAULT", 0) > load["writes"] // 2 and 0 <= open_at_end <= 2,
    )
    yield _inconclusive("missed", document)


def _judge_second_tool(out: Path) -> Iterator[Line]:
    document = json.loads((out / "second-tool.json").read_text())
    lost = _lost(document, "RECURSION")
    yield Line("second tool: skipped programs", f"counted: {lost}", bool(lost))
    yield _inconclusive("second tool", document)


def _inconclusive(name: str, document: dict[str, Any]) -> Line:
    """The fault that needs function probes must be open; those that don't may be anything else."""
    verdicts = {fault: said["verdict"] for fault, said in document["verdicts"].items()}
    text = ", ".join(f"{fault} {verdict}" for fault, verdict in verdicts.items())
    rules = {finding["rule"] for finding in document["findings"]}
    right = document["verdict"] == verdicts[_FAULT] == "inconclusive" and not rules
    return Line(f"{name}: verdict", f"{text}; found: {' '.join(sorted(rules)) or 'nothing'}", right)


def _judge_again(out: Path) -> Iterator[Line]:
    for backend in BACKENDS:
        states = json.loads((out / f"again-{backend}.json").read_text())
        first, last = states["detached 10"], states[f"detached {TIMES}"]
        left = [
            name
            for name in ("kprobe_events", "kprobes")
            if not states["start"][name] == last[name] == states["closed"][name]
        ]
        # Linked programs go only with the descriptors of the session itself.
        left += [name for name in ("programs",) if states["closed"][name] != states["start"][name]]
        grown = [n for n in ("descriptors", "programs", "threads") if last[n] != first[n]]
        if last["rss_kib"] - first["rss_kib"] > _GROWTH_KIB:
            grown.append("memory")
        attached = states["attached"]["kprobes"] - states["start"]["kprobes"]
        text = (
            f"{TIMES} times {' '.join(states['methods'])}, {attached} kprobes each; "
            f"left: {' '.join(left) or 'nothing'}; "
            f"grown: {' '.join(grown) or 'nothing'} ({last['rss_kib'] - first['rss_kib']} KiB)"
        )
        yield Line(f"again {backend}", text, not left and not grown)


def run_checks(spec: str, vendor: str, checks: list[str], code: Path, results: Path) -> bool:
    """Run the checks, one boot for all, and print the table; True when all is right.

    Raises LabError when the VM didn't get to its end.
    """
    kernel, release = get_kernel(spec), parse_spec(spec)[0]
    here = Path(__file__).parent
    extra = {"nested": here / "nested", "probes_inside.py": here / "probes_inside.py"}
    if vendor == "amd" and "backends" in checks:
        try:
            extra["lab_slot.ko"] = get_helper(kernel, release)
        except LabError as error:
            say(f"without the internal slot: {error}")
    command = "export PYTHONPATH=/opt/kvmprobe\n"
    command += "".join(f"echo '# {check}'\n{script(check, vendor)}" for check in checks)
    job = Job(
        kernel,
        get_root(release),
        vendor,
        command,
        extra=extra,
        kernel_options=("preempt=full",) if "second-tool" in checks else (),
        limit=_LIMIT_OF_BOOT + _LIMIT_OF_CHECK * len(checks),
        code=code,
    )
    say(f"booting {kernel.release} ({kernel.package_version}) on {vendor}")
    outcome = run_job(job, EMULATORS[vendor], results)
    say(f"done after {outcome.seconds:.0f} s; results in {results}")
    right = True
    for check in checks:
        try:
            lines = list(judge(check, outcome.out))
        except (OSError, ValueError, KeyError) as error:
            lines = [Line(check, f"no result: {error}", False)]
        for line in lines:
            right &= line.right
            print(f"{'as expected' if line.right else 'DIFFERS':12} {line.check:32} {line.found}")
    return right


def main() -> int:
    """Run the command line; the exit status: 0 when all is as expected."""
    parser = argparse.ArgumentParser(
        prog="tests.lab.probes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--vendor", default="amd", choices=sorted(EMULATORS))
    parser.add_argument("--check", action="append", choices=CHECKS, help="default: all")
    parser.add_argument("--code", type=Path, help="checkout to run (default: this)")
    parser.add_argument("--results", type=Path, help="folder for captures, output and console")
    arguments = parser.parse_args()
    results = arguments.results or Path(tempfile.mkdtemp(prefix="kvmprobe-lab-"))
    checks = arguments.check or list(CHECKS)
    code = (arguments.code or CHECKOUT).resolve()
    # As at Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        right = run_checks(arguments.kernel, arguments.vendor, checks, code, results)
    except LabError as error:
        say(f"error: {error}")
        return 1
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
