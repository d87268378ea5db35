# SPDX-License-Identifier: MIT
"""`python -m tests.bench.fleet FOLDER`: simulate a fleet, analyse it, compare with its truth.

Prints a line a step, for docs/fleet.md.  Steps: one, two (workers, and their memory), kill (a
worker dies in the middle), cluster (a scheduler and workers as processes), s3 (a store on loopback;
needs --moto, the path of moto's server in an environment of its own).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests import fleet_processes as processes
from tests.fleet_truth import differences

_BUCKET = "fleet"


class Bench:
    """A simulated fleet, and what is done with it."""

    def __init__(self, folder: Path, hosts: int, days: int, events: int) -> None:
        self.folder, self.events = folder, events
        self.fleet, self.hosts, self.days = folder / "fleet", hosts, days

    def simulate(self) -> None:
        """Make the fleet, unless it is there."""
        if self.fleet.exists():
            return
        began = time.monotonic()
        status, _, err = processes.run(
            "simulate", self.fleet, "--hosts", str(self.hosts), "--days", str(self.days),
            "--events", str(self.events),
        )  # fmt: skip
        if status:
            sys.exit(err)
        seconds = time.monotonic() - began
        size = sum(path.stat().st_size for path in self.fleet.rglob("*.parquet"))
        say(
            f"simulate: {self.hosts} hosts, {self.events:.0e} events in {seconds:.0f} s, "
            f"{size / 1e9:.2f} GB, {size / self.events:.1f} bytes an event"
        )

    def analyze(
        self, name: str, *options: str, place: str | None = None,
        env: dict[str, str] | None = None, kill_at: float | None = None,
    ) -> None:  # fmt: skip
        """Analyse the fleet; with `kill_at` a worker is killed when that share of hosts is done."""
        result = self.folder / f"result-{name}"
        shutil.rmtree(result, ignore_errors=True)
        began = time.monotonic()
        process = processes.start(
            "analyze", place or str(self.fleet), "-o", result, *options, env=env
        )
        memory: dict[int, list[float]] = {}
        killed = None
        cpu = 0.0
        while process.poll() is None:
            time.sleep(0.5)
            try:
                workers = processes.workers_of(psutil.Process(process.pid))
                sample = {
                    w.pid: (w.memory_info().rss / 1e6, sum(w.cpu_times()[:2])) for w in workers
                }
            except psutil.Error:
                continue
            for pid, (rss, _) in sample.items():
                memory.setdefault(pid, []).append(rss)
            cpu = max(cpu, sum(seconds for _, seconds in sample.values()))
            if kill_at is not None and killed is None and workers:
                done = len(list((result / "hosts").glob("*.json")))
                if done >= kill_at * self.hosts:
                    killed = max(sample, key=lambda pid: sample[pid][1])
                    psutil.Process(killed).kill()
                    say(f"  killed worker {killed} after {done} hosts")
        _, err = process.communicate()
        seconds = time.monotonic() - began
        wrong = differences(self.fleet, result) if process.returncode == 0 else [err]
        say(
            f"{name}: {seconds:.1f} s, {self.events / seconds / 1e6:.2f} M events/s, workers' "
            f"processor time {cpu:.0f} s, status {process.returncode}, "
            + ("found = truth" if not wrong else f"{len(wrong)} differences: {wrong[:3]}")
            + f" (load {os.getloadavg()[0]:.1f})"
        )
        for pid, taken in memory.items():
            if len(taken) >= 20:
                tenth = len(taken) // 10
                parts = [max(taken[n * tenth : (n + 1) * tenth]) for n in range(10)]
                say(f"  RSS of {pid}, MB, by tenth: " + " ".join(f"{mb:.0f}" for mb in parts))
            elif taken:
                say(f"  RSS of {pid}: at most {max(taken):.0f} MB")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main() -> None:
    """Run the steps that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hosts", type=int, default=100)
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--events", type=float, default=1e7)
    parser.add_argument("--steps", default="one,two,kill,cluster,s3")
    parser.add_argument("--moto")
    asked = parser.parse_args()
    bench = Bench(asked.folder, asked.hosts, asked.days, int(asked.events))
    bench.simulate()
    for step in asked.steps.split(","):
        if step == "one":
            bench.analyze("one", "--workers", "1")
        elif step == "two":
            bench.analyze("two", "--workers", "2")
        elif step == "kill":
            bench.analyze("kill", "--workers", "2", kill_at=0.4)
        elif step == "cluster":
            with processes.cluster(2) as (address, _):
                bench.analyze("cluster", "--scheduler", address)
        elif step == "s3" and asked.moto:
            with processes.store(asked.moto, _BUCKET) as env:
                processes.upload(bench.fleet, env, _BUCKET)
                bench.analyze("s3", "--workers", "2", place=f"s3://{_BUCKET}", env=env)


if __name__ == "__main__":
    main()
