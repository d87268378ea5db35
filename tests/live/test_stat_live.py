# SPDX-License-Identifier: MIT
"""What the kernel counts of guests whose every access is known, and what a recording says."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from kvmprobe.capture.session import Filters, Session
from kvmprobe.guests import kvm, load
from kvmprobe.guests.vmm import Machine
from kvmprobe.stat.capture import count_captures
from kvmprobe.stat.live import LiveStat
from kvmprobe.stat.model import SLOT_HOLE, Counted, Key, Table
from tests.batches import Batches
from tests.processes import ROOT

STAT = (sys.executable, "-m", "kvmprobe", "stat")
#: Rows of pages that the kernel keeps: PAGES of probes/stat.h.
PAGES = 8192


def count(work: Callable[[], None]) -> Counted:
    """Count the VMs of this process while it works."""
    with LiveStat(os.getpid()) as live:
        live.start()
        work()
        live.stop()
        return live.counted()


def by_key(counted: Counted, tables: set[Table]) -> dict[Key, int]:
    return {key: cell.count for key, cell in counted.cells.items() if key.table in tables}


def test_a_recording_says_the_same() -> None:
    """Two vCPUs do MMIO while a memslot comes and goes at their page; both watch the same run."""
    mix = load.Mix(mmio=2, pio=1, ram=1, outs_mmio=3, outs_ram=4)
    did = load.Counts()

    def work() -> None:
        nonlocal did
        did = load.run_load(1.0, 3000, mix, vcpus=2, flips=20)

    rows = []
    with Session(Filters(pid=os.getpid())) as session, LiveStat(os.getpid()) as live:
        session.prepare()
        session.attach()
        live.start()
        session.start()
        work()
        live.stop()
        rows.append(session.drain())
        rows.append(session.stop())
        counted = live.counted()
    recorded = count_captures([Batches(np.concatenate(rows))])
    assert recorded.lost == counted.lost == 0
    assert counted.total(Table.MMIO) == did.mmio_reads + did.mmio_writes > 0
    same = set(Table) - {Table.EXIT, Table.GENERATION, Table.MMIO}
    assert by_key(counted, same) == by_key(recorded, same)
    assert len(by_key(counted, {Table.EMULATE})) == 2

    # The two look the slot up one after the other, and it may have come or gone in between.
    def without_slot(what: Counted) -> dict[Key, int]:
        added = Counted()
        for key, cell in what.cells.items():
            if key.table == Table.MMIO:
                added.add(Key(*list(vars(key).values())[:6]), cell.count)
        return by_key(added, {Table.MMIO})

    assert without_slot(counted) == without_slot(recorded)
    assert len(without_slot(counted)) == 4  # two vCPUs, two directions
    # Each looks when it is run, so they may miss different ones.  A deletion makes two generations,
    # for the memslot is first marked invalid (kvm_set_memslot()).
    for seen in counted, recorded:
        assert 0 < seen.total(Table.GENERATION) <= 2 * did.memslot_changes
    (vm,) = counted.vms.values()
    assert vm.pid == os.getpid()


#: mov %eax,(%ebx); add $0x1000,%ebx; loop back; hlt: a store to ECX pages from EBX on.
TOUCH = bytes.fromhex("8903 81c300100000 e2f6 f4")


def touch(pages: int) -> None:
    """A guest in flat 32-bit mode stores to so many pages of a hole."""
    with Machine() as machine:
        machine.set_tss_addr()
        machine.set_identity_map_addr()
        memory = machine.add_slot(0, 0x1000, 0x1000)
        memory.memory[: len(TOUCH)] = TOUCH
        vcpu = machine.add_vcpu()
        vcpu.start_at(0x1000)
        sregs = kvm.SpecialRegisters()
        kvm.call(vcpu.fd, kvm.GET_SREGS, sregs, "read special registers")
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
            segment.limit, segment.g, segment.db, segment.s, segment.present = (
                0xFFFFFFFF,
                1,
                1,
                1,
                1,
            )
            segment.type = 0xB if segment is sregs.cs else 3
        sregs.cr0 |= 1
        kvm.call(vcpu.fd, kvm.SET_SREGS, sregs, "set special registers")
        registers = kvm.Registers(rip=0x1000, rflags=2, rbx=0x10000000, rcx=pages)
        kvm.call(vcpu.fd, kvm.SET_REGS, registers, "set registers")
        for _ in range(pages):
            assert vcpu.run() == kvm.ExitReason.MMIO
        assert vcpu.run() == kvm.ExitReason.HLT


def test_a_guest_that_touches_many_pages() -> None:
    pages = 3 * PAGES
    counted = count(lambda: touch(pages))
    kept = by_key(counted, {Table.MMIO})
    assert 0 < len(kept) <= PAGES
    assert {key.slot for key in kept} == {SLOT_HOLE}
    # Every row was an access: what is gone is counted.
    assert counted.total(Table.MMIO) == pages
    assert counted.evicted_rows == counted.evicted[Table.MMIO] == pages - len(kept)
    # Instructions are rows of their own, which a flood of pages doesn't touch.
    (instructions,) = by_key(counted, {Table.EMULATE}).values()
    assert instructions == 3 * pages + 1


def test_other_processes_are_not_counted() -> None:
    def work() -> None:
        command = [sys.executable, "-m", "kvmprobe.guests.load", "--seconds", "1", "--rate", "500"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    counted = count(work)
    assert counted.cells == {}
    assert counted.vms == {}


@pytest.fixture(scope="module")
def guest() -> Iterator[subprocess.Popen[bytes]]:
    """A load that runs while the tests count it."""
    command = [sys.executable, "-m", "kvmprobe.guests.load", "--seconds", "600", "--rate", "500"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


def test_the_command(guest: subprocess.Popen[bytes]) -> None:
    command = [*STAT, "-d", "0.5", "-p", str(guest.pid), "--by", "vm,vcpu,level"]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert [vm["pid"] for vm in told["vms"]] == [guest.pid]
    tables = {table["name"]: table for table in told["tables"]}
    assert {row["page"] for row in tables["mmio"]["rows"]} == {"0xf000"}
    assert {row["memory"] for row in tables["mmio"]["rows"]} == {"hole"}
    done = subprocess.run([*command, "--csv"], cwd=ROOT, capture_output=True, text=True)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert {row["table"] for row in rows} == set(tables)
    assert {row["vcpu"] for row in rows} == {"0"}


def test_ctrl_c_prints_the_table(guest: subprocess.Popen[bytes]) -> None:
    command = [*STAT, "-p", str(guest.pid), "--interval", "0.2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    head = process.stdout.readline().split()
    line = process.stdout.readline().split()
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 0
    assert dict(zip(head, line, strict=True)).keys() >= {"seconds", "mmio", "insns"}
    process = subprocess.Popen(command[:-2], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not attached(process.pid):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out.splitlines()[0].endswith(" s")


def attached(pid: int) -> bool:
    """Whether the process has programs on tracepoints."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if "raw-tracepoint" in str(fd.readlink()) or "bpf_link" in str(fd.readlink()):
                return True
    return False


def test_a_full_disk(guest: subprocess.Popen[bytes]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [*STAT, "-p", str(guest.pid), "-d", "0.1"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "can't write the output" in done.stderr
