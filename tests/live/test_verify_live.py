# SPDX-License-Identifier: MIT
"""`kvmprobe verify` on this machine's KVM, and what it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from kvmprobe.guests import nested, smm
from kvmprobe.guests.vmm import PAGE, Machine
from kvmprobe.host.facts import host_facts
from kvmprobe.verify import probes, run
from kvmprobe.verify.answers import Answer
from tests.processes import KVMPROBE, ROOT


def descriptors() -> set[str]:
    """What this process has open, but for what lists it."""
    return {str(fd) for fd in Path("/proc/self/fd").iterdir() if fd.exists()}


def test_every_fault_has_an_answer_and_nothing_stays() -> None:
    before = descriptors()
    alarm = signal.getsignal(signal.SIGALRM)
    answers = {a.fault: a for a in run.verify(host_facts(), unsafe=False)}
    assert sorted(answers) == ["address-space", "internal-slot", "spte-overwrite"]
    assert descriptors() == before
    assert signal.getsignal(signal.SIGALRM) == alarm
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    internal = answers["internal-slot"]
    if nested.nests() is None:
        assert internal.answer == "unreachable"
        assert "no L2" in internal.reason
    else:
        assert internal.answer in ("unreachable", "fixed", "vulnerable")
    assert (answers["address-space"].answer == "unreachable") == (not smm.supported())
    assert answers["spte-overwrite"].answer in ("untested", "unreachable")


def test_the_command_ends_with_its_answer() -> None:
    done = subprocess.run([*KVMPROBE, "verify", "--json"], cwd=ROOT, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (answer["exit_status"], "")


def test_a_guest_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang() -> Answer:
        with Machine() as machine:
            machine.set_tss_addr()
            machine.set_identity_map_addr()
            code = machine.add_slot(0, 0x1000, PAGE)
            code.memory[:2] = b"\xeb\xfe"  # jmp to itself
            vcpu = machine.add_vcpu()
            vcpu.start_at(0x1000)
            while True:
                vcpu.step()

    before = descriptors()
    monkeypatch.setattr(probes, "address_space", hang)
    answers = {a.fault: a for a in run.verify(host_facts(), unsafe=False, seconds=0.3)}
    assert answers["address-space"].answer == "unknown"
    assert "did not come to its end" in answers["address-space"].reason
    assert descriptors() == before
