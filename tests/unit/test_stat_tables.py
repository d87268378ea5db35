# SPDX-License-Identifier: MIT
"""Tables: grouping, shares, sorting, and their three forms."""

from __future__ import annotations

import csv
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from kvmprobe.stat.histogram import BUCKETS, Times
from kvmprobe.stat.model import REASON_UNKNOWN, Counted, Key, Result, Table, VmInfo
from kvmprobe.stat.reasons import ReasonNames
from kvmprobe.stat.render import csv_text, document, interval_head, interval_line, short_time, text
from kvmprobe.stat.tables import shapes, tables
from tests.commands import Call

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/golden/lab-6.1-amd-all.kvmprobe"
SCHEMA: dict[str, Any] = json.loads((ROOT / "kvmprobe/stat/schema/stat-1.json").read_bytes())

#: As the print fmt of kvm_exit reads, shortened.
FORMAT = (
    'print fmt: "…", (REC->isa == 1) ? __print_symbolic(REC->exit_reason & 0xffff, '
    '{ 12, "HLT" }, { 49, "EPT_MISCONFIG" }) : __print_symbolic(REC->exit_reason, '
    '{ 0x040 + 14, "PF excp" }, { 0x078, "hlt" }, { -1, "invalid_guest_state" }), '
    '(REC->isa == 1) ? __print_flags(REC->exit_reason & ~0xffff, " ", { 0x80000000, "FAILED" })'
)
NAMES = ReasonNames(FORMAT)
BY = ("vm", "level")


def times(count: int, each: int) -> Times:
    histogram = np.zeros(BUCKETS, np.int64)
    histogram[100] = count
    return Times(count, count * each, each, each, histogram)


@pytest.fixture
def counted() -> Counted:
    made = Counted(seconds=2.0, vms={1: VmInfo(1, "web", 7), 2: VmInfo(2, None, None)})
    for vcpu in (0, 1):
        made.add(Key(Table.EXIT, 1, vcpu, 1, 0x78, 2), 30, times(30, 2_000_000))
        made.add(Key(Table.EXIT, 1, vcpu, 2, 0x4E, 2), 5, times(5, 9_000_000))
        made.add(Key(Table.MMIO, 1, vcpu, 1, 0xFEE00000, 1, 32765), 3, times(3, 4000))
    made.add(Key(Table.MMIO, 2, 0, 1, 0xF000, 0), 4)
    made.add(Key(Table.FAULT, 2, 0, 0, a=Result.NO_SLOT), 1)
    return made


def test_rows_are_added_up_and_shared(counted: Counted) -> None:
    exits, _, mmio = tables(counted, BY, "count", NAMES)
    assert [(r.vm, r.vcpu, r.level, r.cells, r.count) for r in exits.rows] == [
        (1, None, 1, ("hlt",), 60),
        (1, None, 2, ("PF excp",), 10),
    ]
    assert [r.share for r in exits.rows] == [60 / 70, 10 / 70]
    assert [r.rate for r in exits.rows] == [30, 5]
    assert exits.rows[0].times is not None
    assert exits.rows[0].times.count == 60
    assert [r.cells for r in mmio.rows] == [
        ("0xfee00000", "write", "APIC access page"),
        ("0xf000", "read", "hole"),
    ]


@pytest.mark.parametrize(
    ("by", "rows"), [((), 2), (("vcpu",), 4), (("level",), 2), (("vm", "vcpu", "level"), 4)]
)
def test_by(counted: Counted, by: tuple[str, ...], rows: int) -> None:
    exits = tables(counted, by, "count", NAMES)[0]
    assert len(exits.rows) == rows
    assert sum(r.count for r in exits.rows) == exits.total == 70


def test_sort(counted: Counted) -> None:
    def order(sort: str) -> list[str]:
        return [r.cells[0] for r in tables(counted, (), sort, NAMES)[0].rows]

    assert order("count") == order("total") == ["hlt", "PF excp"]
    assert order("max") == order("mean") == order("p99") == order("name") == ["PF excp", "hlt"]
    pages = [r.cells[0] for r in tables(counted, (), "name", NAMES)[2].rows]
    assert pages == ["0xf000", "0xfee00000"]  # by number


def test_text(counted: Counted) -> None:
    made = tables(counted, BY, "count", NAMES)
    wide = text(counted, made, BY, 0, 0)
    assert "VM 1: web, pid 7\nVM 2: unknown\n" in wide
    assert "write   APIC access page      6  60.0%    3.00  4us   4us  4us  4us  4us\n" in wide
    assert "hole                  4  40.0%    2.00  n/a   n/a  n/a  n/a  n/a\n" in wide
    narrow = text(counted, made, BY, 80, 0)
    assert max(map(len, narrow.splitlines())) <= 80
    assert " p99" in narrow
    assert "... and 1 more rows" in text(counted, made, BY, 80, 1)
    assert text(Counted(), [], BY, 80, 0).endswith("\nNothing happened.\n")


def test_evicted_rows_are_told_and_stay_in_the_total(counted: Counted) -> None:
    counted.evicted, counted.evicted_rows = {Table.MMIO: 90}, 80
    mmio = tables(counted, BY, "count", NAMES)[2]
    assert (mmio.total, mmio.evicted) == (100, 90)
    assert sum(r.share for r in mmio.rows) == pytest.approx(0.1)
    said = text(counted, [mmio], BY, 0, 0)
    assert "MMIO: 100\n" in said
    assert "note: 80 rows gave way to others; they had counted 90 times\n" in said


def test_json_and_csv_say_the_same(counted: Counted) -> None:
    made = tables(counted, ("vm", "vcpu", "level"), "name", NAMES)
    told = json.loads(json.dumps(document(counted, made, ("vm", "vcpu", "level"))))
    rows = list(csv.DictReader(io.StringIO(csv_text(counted, made))))
    objects = [(t["name"], row) for t in told["tables"] for row in t["rows"]]
    jsonschema.validate(told, SCHEMA)
    assert len(rows) == len(objects) == 8
    for row, (table, found) in zip(rows, objects, strict=True):
        assert row["table"] == table
        assert (int(row["vm"]), int(row["vcpu"])) == (found["vm"], found["vcpu"])
        assert int(row["count"]) == found["count"]
        assert row["level"] == found["level"]
        if found["time_ns"] is None:
            assert row["mean_ns"] == ""
        else:
            assert float(row["p99_ns"]) == pytest.approx(found["time_ns"]["p99"], abs=1)
    hlt = next(row for table, row in objects if row.get("reason") == "hlt")
    assert hlt["time_ns"]["mean"] == 2_000_000
    assert next(r for r in rows if r["table"] == "mmio" and r["vm"] == "1")["vm_name"] == "web"


def test_the_schema_has_every_column_and_takes_no_less(counted: Counted) -> None:
    tables_of = SCHEMA["properties"]["tables"]["items"]["properties"]
    rows = tables_of["rows"]["items"]["properties"]
    for shape in shapes(NAMES).values():
        assert shape.name in tables_of["name"]["enum"]
        assert {title.replace(" ", "_") for title, _ in shape.columns} <= set(rows)
    told = document(counted, tables(counted, BY, "name", NAMES), BY)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for key in told:
        assert not validator.is_valid({k: v for k, v in told.items() if k != key})


def test_interval_lines_are_differences(counted: Counted) -> None:
    later = Counted(dict(counted.cells), seconds=3.0)
    later.cells[Key(Table.MMIO, 1, 0, 1, 0x5000)] = counted.cells[Key(Table.MMIO, 2, 0, 1, 0xF000)]
    line = dict(zip(interval_head().split(), interval_line(counted, later).split(), strict=True))
    assert line == {
        "seconds": "3.0", "exits": "0", "faults": "0", "mmio": "4", "fills": "0",
        "hits": "0", "sptes": "0", "gens": "0", "nested": "0", "insns": "0",
    }  # fmt: skip
    assert len(interval_head()) == 80


def test_reasons() -> None:
    assert NAMES.name(1, 0x80000000 + 12) == "HLT"
    assert NAMES.name(2, 0xFFFFFFFF) == "invalid_guest_state"
    assert NAMES.name(2, 0x999) == ReasonNames().name(2, 0x999) == "0x999"
    assert NAMES.name(0, REASON_UNKNOWN) == "unknown"


@pytest.mark.parametrize(
    ("ns", "said"),
    [(0, "0ns"), (999, "999ns"), (1000, "1us"), (12_345, "12.3us"), (999_999, "1ms"),
     (1_234_000_000, "1.23s"), (99_999_000_000, "100s"), (5_000_000_000_000, "5000s")],
)  # fmt: skip
def test_short_times(ns: float, said: str) -> None:
    assert short_time(ns) == said


@pytest.fixture
def run(call: Call) -> Call:
    """Run `kvmprobe stat`."""
    return partial(call, "stat")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--by", "host"], "--by is a list of vm, vcpu, level, or none"),
        (["--sort", "size"], "--sort is one of count, total"),
        (["--json", "--csv"], "exclude each other"),
        (["-d", "1", str(GOLDEN)], "are for counting live"),
        (["--interval", "1", "--json"], "leave out --json"),
        (["--interval", "0"], "--interval"),
        (["-p", "99999999"], "no process has the id 99999999"),
        (["--vm", "a", "-p", "1"], "exclude each other"),
    ],
)
def test_wrong_arguments(run: Call, arguments: list[str], says: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_an_empty_file_is_no_capture(run: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    status, out, err = run(str(tmp_path / "empty"))
    assert (status, out, err.count("\n")) == (1, "", 1)


def test_a_capture_on_the_command_line(run: Call) -> None:
    status, out, err = run(str(GOLDEN), "--by", "level", "--top", "1")
    assert (status, err) == (0, "")
    assert "hit by  filled by  memory  count" in out
    assert "L1      L2         TSS" in out
