# SPDX-License-Identifier: MIT
"""`python -m tests.lab.stat --perf DIR`: kvmprobe stat, perf kvm stat and KVM, of one run.

DIR holds `perf` and, in `lib`, the libraries that the lab's root does not have.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.lab.base import LabError, say
from tests.lab.kernels import get_kernel, parse_spec
from tests.lab.matrix import EMULATORS
from tests.lab.rootfs import get_root
from tests.lab.vm import Job, run_job

#: Means may differ so much.
_NEAR = 0.05
_PERF_ROW = re.compile(
    r"^\s*(\S.*?)\s+(\d+)\s+[\d.]+%\s+[\d.]+%\s+[\d.]+us\s+[\d.]+us\s+([\d.]+)us", re.M
)


def perf_rows(text: str) -> dict[str, tuple[int, float]]:
    """Count and mean time (us) by name, of a report of `perf kvm stat`."""
    return {name: (int(n), float(mean)) for name, n, mean in _PERF_ROW.findall(text)}


def compare(out: Path) -> Iterator[tuple[str, str, str, bool]]:
    """What was compared: its name, kvmprobe's word, the other's, and whether they agree.

    Raises OSError, ValueError or KeyError when the run did not get so far.
    """
    told = json.loads((out / "stat.json").read_text())
    tables = {table["name"]: table for table in told["tables"]}
    perf = perf_rows((out / "perf-vmexit.txt").read_text())
    for row in tables["exits"]["rows"]:
        count, mean = perf.get(row["reason"], (0, 0.0))
        own = row["time_ns"]["mean"] / 1000
        right = count == row["count"] and abs(own - mean) <= _NEAR * mean
        ours, theirs = f"{row['count']}, {own:.2f} us", f"{count}, {mean:.2f} us"
        yield f"exit {row['reason']}", ours, f"perf: {theirs}", right
    accesses = perf_rows((out / "perf-mmio.txt").read_text())
    mmio = tables["mmio"]["total"]
    perf_mmio = sum(count for count, _ in accesses.values())
    yield "MMIO", str(mmio), f"perf: {perf_mmio}", mmio == perf_mmio
    kvm = json.loads((out / "guest.json").read_text())["kvm"]
    # kvmprobe counts an exit at the entry after it, and none comes after a vCPU's last one.
    exits = tables["exits"]["total"]
    yield "exits", f"{exits} and 1 open", f"KVM: {kvm['exits']}", exits + 1 == kvm["exits"]
    pairs = {
        "insn_emulation": tables["instructions"]["total"],
        "pf_mmio_spte_created": sum(
            row["count"] for row in tables["sptes"]["rows"] if row["what"] == "made"
        ),
    }
    for name, own in pairs.items():
        yield name, str(own), f"KVM: {kvm[name]}", own == kvm[name]


def main() -> int:
    """Run the command line; the exit status: 0 when all agree."""
    parser = argparse.ArgumentParser(prog="tests.lab.stat", description=__doc__)
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--perf", type=Path, required=True, help="folder with perf and its lib")
    parser.add_argument("--results", type=Path, help="folder for tables, reports and console")
    arguments = parser.parse_args()
    results = arguments.results or Path(tempfile.mkdtemp(prefix="kvmprobe-lab-"))
    here = Path(__file__).parent
    command = (
        "modprobe kvm_amd; export PYTHONPATH=/opt/kvmprobe\n"
        "/opt/venv/bin/python /lab/stat_inside.py compare /lab/perf /out\n"
    )
    extra = {"perf": arguments.perf, "stat_inside.py": here / "stat_inside.py"}
    job = Job(
        get_kernel(arguments.kernel),
        get_root(parse_spec(arguments.kernel)[0]),
        "amd",
        command,
        extra=extra,
    )
    try:
        outcome = run_job(job, EMULATORS["amd"], results)
        lines = list(compare(outcome.out))
    except (LabError, OSError, ValueError, KeyError) as error:
        say(f"error: {error}; results in {results}")
        return 1
    for name, ours, theirs, right in lines:
        print(f"{'as expected' if right else 'DIFFERS':12} {name:24} {ours:24} {theirs}")
    return 0 if all(line[3] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
