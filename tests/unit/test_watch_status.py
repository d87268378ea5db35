# SPDX-License-Identifier: MIT
"""The status file: what is written is read; nothing else is."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.watch import status as statuses
from kvmprobe.watch.status import (
    FaultVerdict,
    Latched,
    Status,
    StatusError,
    WatchedVm,
    boot_id,
    now_ns,
    read,
    write,
)


def example(**changes: object) -> Status:
    status = Status(
        schema=statuses.SCHEMA,
        version="0.1.0",
        boot_id=boot_id(),
        pid=os.getpid(),
        written_ns=now_ns(),
        since="2026-01-01T00:00:00Z",
        seconds=1.5,
        state="watching",
        reason=None,
        verdict="vulnerable",
        verdicts={"internal-slot": FaultVerdict("vulnerable", ("proof",), ())},
        vms=(WatchedVm(1, "a", 12, "vulnerable", {"internal-slot": "vulnerable"}, {"MMIO": 3}),),
        vms_seen=2,
        vms_left_out=0,
        findings=(
            Latched(
                id="abc",
                fault="internal-slot",
                severity="critical",
                rules={"internal-slot-hit": 2},
                vm="a",
                pid=12,
                count=2,
                first="2026-01-01T00:00:00Z",
                last="2026-01-01T00:00:01Z",
                ignored=None,
                capture=None,
            ),
        ),
        findings_left_out=0,
        events={"MMIO": 7},
        lost={"MMIO": 3},
        attached=(("MMIO", "MMIO"),),
        metrics="127.0.0.1:9",
    )
    return dataclasses.replace(status, **changes)  # type: ignore[arg-type]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    status = example()
    write(example(pid=1), tmp_path)
    write(status, tmp_path)
    assert read(tmp_path) == status
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert (tmp_path / "status.json").stat().st_mode & 0o777 == 0o644


def test_age_goes_by_the_time_since_boot(tmp_path: Path) -> None:
    assert 90 <= example(written_ns=now_ns() - 90 * 10**9).age() < 100


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(StatusError, match="no kvmprobe watch runs"):
        read(tmp_path)


def test_of_another_boot(tmp_path: Path) -> None:
    write(example(boot_id="0"), tmp_path)
    with pytest.raises(StatusError, match="of another boot"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_no_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "status.json"
    if kind == "link":
        write(example(), tmp_path)
        path.rename(tmp_path / "other")
        path.symlink_to(tmp_path / "other")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(StatusError, match="can't read"):
        read(tmp_path)


def test_a_left_over_temporary_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".status.json.tmp").write_text("half")
    write(example(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"schema": "kvmprobe.status/2"}',
        "[" * 100_000,
        "\xff",
        "9" * 10_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_other_texts_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(StatusError, match="restart kvmprobe watch"):
        read(tmp_path)


@given(st.data())
def test_a_damaged_status_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    found = json.loads(json.dumps(dataclasses.asdict(example())))
    key = data.draw(st.sampled_from(sorted(found)))
    if data.draw(st.booleans()):
        del found[key]
    else:
        found[key] = {"no": [None]}
    (directory / "status.json").write_text(json.dumps(found))
    with pytest.raises(StatusError) as refused:
        read(directory)
    assert "\n" not in str(refused.value)


def test_it_is_as_its_schema_says(tmp_path: Path) -> None:
    folder = Path(statuses.__file__).parent / "schema"
    schema = json.loads((folder / "status-1.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    write(example(), tmp_path)
    told = json.loads((tmp_path / statuses.FILE_NAME).read_bytes())
    jsonschema.validate(told, schema)
    properties = schema["properties"]
    for made, described in (
        (Status, schema),
        (WatchedVm, properties["vms"]["items"]),
        (Latched, properties["findings"]["items"]),
        (FaultVerdict, properties["verdicts"]["additionalProperties"]),
    ):
        names = [field.name for field in dataclasses.fields(made)]
        assert names == list(described["properties"]) == described["required"]
