# SPDX-License-Identifier: MIT
"""Many random runs, each checked in every way; a campaign of any size from the command line.

    python -m tests.model.campaign --runs 1000000 --seed 1 --jobs 2

Ctrl-C ends it and tells of what was done.  Run number n of seed s is Random(f"{s}:{n}"), so that
each run can be made again by itself.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pool
from random import Random
from typing import Any

import numpy as np

from kvmprobe.analysis.detector import Detector
from kvmprobe.analysis.jit import available
from kvmprobe.probes.schema import columns
from tests.model.batch import Batch
from tests.model.check import Said, lose, problems, reorder, say, with_losses
from tests.model.runs import Run, random_run
from tests.streams import tell, told

_CHUNK = 250
#: Runs in one stream.
_TOGETHER = 125


@dataclass
class Tally:
    """What a campaign saw: runs, events, occurrences, and what was wrong, by seed and run."""

    runs: int = 0
    events: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Take in another part of the campaign."""
        self.runs += other.runs
        self.events += other.events
        self.happened += other.happened
        self.found += other.found
        self.verdicts += other.verdicts
        self.wrong += other.wrong

    def add_run(self, run: Run, said: Said) -> None:
        """Count a run and what was said of it."""
        self.runs += 1
        self.events += len(run.rows)
        self.happened.update(h.what.name for h in run.truth.happenings)
        self.found.update(f.rule.id for f in said.findings)
        self.verdicts.update(f"{v.fault}: {v.verdict}" for v in said.verdicts.values())


def _told(said: Said) -> list[tuple[Any, ...]]:
    return tell(said.findings, said.acquittals)


def examine(run: Run, random: Random, tally: Tally) -> list[str]:
    """Check one run: whole, cut into batches, interleaved anew, with losses told and untold."""
    whole = not run.probes.skip_exits
    rows = run.rows if whole else with_losses(run)
    said = say(run, rows)
    wrong = problems(run, said, whole=whole)
    answer = _told(said)
    cuts = [random.randrange(len(rows) + 1) for _ in range(random.choice((1, 5, 40)))]
    if _told(say(run, rows, cuts)) != answer:
        wrong.append(f"another answer when cut at {sorted(cuts)}")
    if _told(say(run, reorder(rows, random))) != answer:
        wrong.append("another answer when vCPUs are interleaved in another way")
    candidates = rows[(rows["flags"] & CANDIDATE) != 0]
    if whole and _told(say(run, candidates)) != answer:
        wrong.append("another answer from candidates alone")
    for counted in (True, False):
        lossy = say(run, lose(run, random, counted=counted))
        kind = "counted" if counted else "uncounted"
        wrong += [f"{kind} loss: {p}" for p in problems(run, lossy, whole=False)]
    tally.add_run(run, said)
    return wrong


CANDIDATE = np.uint32(1 << 23)


def make(seed: int, number: int, actions: int) -> tuple[Run, Random]:
    """Make run `number` of a campaign, and the random source for what is done to it."""
    random = Random(f"{seed}:{number}")
    return random_run(random, random.randint(5, 2 * actions)), random


def campaign(seed: int, numbers: range, actions: int = 40) -> Tally:
    """Make and check runs, many in one stream; what was wrong names the run."""
    tally = Tally()
    for start in range(numbers.start, numbers.stop, _TOGETHER):
        own = range(start, min(start + _TOGETHER, numbers.stop))
        made = [make(seed, number, actions) for number in own]
        for number, (run, _), wrong in zip(own, made, examine_all(made, tally), strict=True):
            kind = run.kind
            tally.wrong += [f"run {seed}:{number} ({kind}): {p}" for p in wrong]
    return tally


def examine_all(made: list[tuple[Run, Random]], tally: Tally) -> list[list[str]]:
    """Check runs as `examine` does, side by side in one stream."""
    runs, random = [run for run, _ in made], made[0][1]
    batch = Batch.of(runs)
    whole = [not run.probes.skip_exits for run in runs]
    parts = [run.rows if w else with_losses(run) for run, w in zip(runs, whole, strict=True)]
    rows = batch.stream(parts)
    said = batch.say(rows, jit=available())
    wrong = [problems(run, said.of(n), whole=whole[n]) for n, run in enumerate(runs)]
    cuts = [random.randrange(len(rows) + 1) for _ in range(random.choice((1, 5, 40)))]
    others = {
        f"when cut at {sorted(cuts)}": batch.say(rows, cuts),
        "when vCPUs are interleaved in another way": batch.say(
            batch.stream(
                [reorder(part, own) for part, (_, own) in zip(parts, made, strict=True)], random
            )
        ),
        "from candidates alone": batch.say(rows[(rows["flags"] & CANDIDATE) != 0]),
    }
    for how, other in others.items():
        if other.told != said.told:
            wrong[0].append(f"another answer of it or the next {len(runs) - 1} runs {how}")
    for counted in (True, False):
        kind = "counted" if counted else "uncounted"
        lossy = batch.say(
            batch.stream([lose(run, random, counted=counted) for run in runs], random)
        )
        for n, run in enumerate(runs):
            wrong[n] += [f"{kind} loss: {p}" for p in problems(run, lossy.of(n), whole=False)]
    for n, run in enumerate(runs):
        tally.add_run(run, said.of(n))
    return wrong


def equal_when_compiled(seed: int, numbers: range, actions: int = 40) -> bool:
    """Whether the compiled step loop says the same of many runs in one stream."""
    parts, vms = [], 0
    for number in numbers:
        rows = make(seed, number, actions)[0].rows.copy()
        rows["vm"] += vms
        vms = int(rows["vm"].max(initial=vms))
        parts.append(rows)
    whole = np.concatenate(parts)
    answers = []
    for jit in (False, True):
        detector = Detector(jit=jit)
        for batch in np.array_split(whole, 7):
            detector.feed(columns(batch))
        answers.append(told(detector))
    return answers[0] == answers[1]


def _begin() -> None:
    """Begin a worker: Ctrl-C is the parent's, and garbage is collected once a part."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    gc.disable()


def _part(job: tuple[int, range, int]) -> Tally:
    gc.collect()
    return campaign(*job)


def _jobs(seed: int, runs: int, actions: int, first: int) -> Iterator[tuple[int, range, int]]:
    for start in range(first, first + runs, _CHUNK):
        yield seed, range(start, min(start + _CHUNK, first + runs)), actions


def main() -> int:
    """Run a campaign and tell what it saw; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--actions", type=int, default=40, help="mean length of a run")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    tally, begin = Tally(), time.monotonic()
    with Pool(args.jobs, _begin) as pool:
        jobs = _jobs(args.seed, args.runs, args.actions, args.first)
        try:
            for part in pool.imap(_part, jobs):
                tally.add(part)
                for line in part.wrong:
                    print(line, flush=True)
        except KeyboardInterrupt:
            pool.terminate()
            print("interrupted")
    seconds = time.monotonic() - begin
    print(f"seed {args.seed}, runs {args.first} to {args.first + tally.runs - 1}")
    print(f"{tally.events:,} events, {len(tally.wrong)} wrong, {seconds:.0f} s")
    for name in ("happened", "found", "verdicts"):
        print(f"{name}: {dict(sorted(getattr(tally, name).items()))}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
