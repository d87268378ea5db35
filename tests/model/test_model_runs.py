# SPDX-License-Identifier: MIT
"""Random runs of the model: the detector says what happened, whole or with losses.

KVMPROBE_MODEL_RUNS: how many plain runs (default: what CI has time for).  KVMPROBE_MODEL_SEED:
their seed.  A nightly size is `python -m tests.model.campaign --runs 1000000`.
"""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmprobe.analysis import jit
from tests.model.campaign import Tally, campaign, equal_when_compiled, examine, make
from tests.model.check import say, with_losses
from tests.model.kernel import Vcpu
from tests.model.memslots import Vm
from tests.model.probes import Probes
from tests.model.runs import random_kind, random_run
from tests.model.truth import Truth, What

RUNS = int(os.environ.get("KVMPROBE_MODEL_RUNS", "2000"))
SEED = int(os.environ.get("KVMPROBE_MODEL_SEED", "1"))
PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_detector_says_what_happened(part: int) -> None:
    numbers = range(part * RUNS // PARTS, (part + 1) * RUNS // PARTS)
    print(f"seed {SEED}, runs {numbers.start} to {numbers.stop - 1}")
    tally = campaign(SEED, numbers)
    assert tally.wrong == []
    assert tally.runs == len(numbers)


def test_long_runs() -> None:
    numbers = range(max(RUNS // 400, 1))
    print(f"seed {SEED + 1}, runs 0 to {numbers.stop - 1}, 1500 actions on average")
    assert campaign(SEED + 1, numbers, actions=1500).wrong == []


@given(st.randoms(use_true_random=False))
@settings(
    max_examples=max(RUNS // 40, 1),
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_what_hypothesis_finds(random: Random) -> None:
    run = random_run(random, random.randint(1, 25))
    assert examine(run, Random(7), Tally()) == []


def test_runs_exercise_what_they_are_for() -> None:
    """Everything that can happen happens, and every verdict is reached."""
    missing = {what.name for what in What}
    missing |= {"vulnerable", "inconclusive", "not exercised", "fixed"}
    for number in range(3000):
        run, _ = make(SEED, number, 40)
        said = say(run, with_losses(run))
        missing -= {h.what.name for h in run.truth.happenings}
        missing.discard(said.verdicts["internal-slot"].verdict)
        if not missing:
            break
    assert missing == set()


@pytest.mark.skipif(not jit.available(), reason="numba isn't there, or KVMPROBE_NO_JIT is set")
def test_compiled_and_not_say_the_same() -> None:
    assert equal_when_compiled(SEED, range(min(RUNS // 4, 1000)))


def test_generations_as_kvm_counts_them() -> None:
    kind = random_kind(Random(0))
    vm = Vm(1, kind, Probes(), Truth())
    assert vm.gens == list(range(kind.address_spaces))
    assert Vcpu(vm, 0).cache.gfn == 0
