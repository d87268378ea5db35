# SPDX-License-Identifier: MIT
"""The tables of a fleet's result, as Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvmprobe.store.files import create_output

if TYPE_CHECKING:
    import pyarrow

#: Rows in memory before they are written.
_ROWS = 10_000
_TEXT, _TEXTS, _COUNT, _NS, _TIME, _FLAG = "text", "texts", "count", "ns", "time", "flag"
#: Times are UTC, null where a capture does not know its clock; `id` is one host's in all tables.
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "hosts": {
        "id": _TEXT, "host": _TEXT, "machine": _TEXT, "done": _FLAG, "verdict": _TEXT,
        "findings": _COUNT, "began": _TIME, "first": _TIME, "last": _TIME, "kernels": _TEXTS,
        "configurations": _TEXTS, "schemas": _TEXTS, "files": _COUNT, "bytes": _COUNT,
        "recordings": _COUNT, "vms": _COUNT, "events": _COUNT, "lost": _COUNT, "notes": _TEXTS,
        "problems": _TEXTS,
    },
    "verdicts": {
        "id": _TEXT, "host": _TEXT, "fault": _TEXT, "verdict": _TEXT, "began": _TIME,
        "basis": _TEXTS, "missing": _TEXTS,
    },
    "findings": {
        "id": _TEXT, "host": _TEXT, "kernel": _TEXT, "configuration": _TEXT, "rule": _TEXT,
        "fault": _TEXT, "severity": _TEXT, "convicts": _FLAG, "vm": _COUNT, "vm_name": _TEXT,
        "pid": _COUNT, "vcpu": _COUNT, "level": _TEXT, "gpa": _COUNT, "slot": _COUNT,
        "slot_confidence": _TEXT, "first": _TIME, "last": _TIME, "count": _COUNT, "cause": _TEXT,
        "cause_age_ns": _NS, "evidence": _COUNT, "file": _TEXT,
    },
    "losses": {
        "id": _TEXT, "host": _TEXT, "recording": _TEXT, "observation": _TEXT, "cpu": _COUNT,
        "cause": _TEXT, "vm": _COUNT, "records": _COUNT,
    },
}  # fmt: skip


class Tables:
    """Writes the tables, host by host: a context.  They are there whole or as they were before."""

    def __init__(self, folder: Path) -> None:
        """Begin new tables in a folder."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {
            _TEXT: pa.string(),
            _TEXTS: pa.list_(pa.string()),
            # Not signed: a gpa has 64 bits.
            _COUNT: pa.uint64(),
            _NS: pa.int64(),
            _TIME: pa.timestamp("ns", "UTC"),
            _FLAG: pa.bool_(),
        }
        self._opened = ExitStack()
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name in COLUMNS}
        self._schemas: dict[str, pyarrow.Schema] = {}
        self._writers: dict[str, Any] = {}
        for name, columns in COLUMNS.items():
            path = folder / f"{name}.parquet"
            file = self._opened.enter_context(create_output(path, force=True))
            self._schemas[name] = pa.schema([(c, types[kind]) for c, kind in columns.items()])
            self._writers[name] = self._opened.enter_context(
                pq.ParquetWriter(file, self._schemas[name], compression="zstd")
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:  # noqa: ANN401 - three of them
        if raised[0] is not None:
            self._opened.__exit__(*raised)
            return
        with self._opened:
            for name in COLUMNS:
                self._flush(name)

    def add(self, result: Mapping[str, Any]) -> None:
        """Add one host's rows."""
        who = {"id": result["id"], "host": result["name"]}
        convicting = [f for f in result["findings"] if f["convicts"]]
        files = [each["file"] for each in result["inputs"]]
        same = {name: result[name] for name in COLUMNS["hosts"] if name in result}
        self._put(
            "hosts",
            same | who | {
                "findings": len(result["findings"]), "began": earliest(convicting),
                "first": result["first_ns"], "last": result["last_ns"], "files": len(files),
                "bytes": sum(file["size"] for file in files),
            },
        )  # fmt: skip
        for verdict in result["verdicts"]:
            own = [f for f in convicting if f["fault"] == verdict["fault"]]
            self._put("verdicts", verdict | who | {"began": earliest(own)})
        for finding in result["findings"]:
            times = {"first": finding["first_ns"], "last": finding["last_ns"]}
            self._put("findings", finding | who | times)
        for loss in result["losses"]:
            self._put("losses", loss | who)

    def _put(self, name: str, row: Mapping[str, Any]) -> None:
        rows = self._rows[name]
        rows.append({column: _valid(row[column]) for column in COLUMNS[name]})
        if len(rows) >= _ROWS:
            self._flush(name)

    def _flush(self, name: str) -> None:
        import pyarrow as pa

        if self._rows[name]:
            table = pa.Table.from_pylist(self._rows[name], self._schemas[name])
            self._writers[name].write_table(table)
            self._rows[name] = []


def earliest(findings: list[dict[str, Any]]) -> int | None:
    """Return when the first of some findings was, ns since 1970; None: not known, or none."""
    return min((f["first_ns"] for f in findings if f["first_ns"] is not None), default=None)


def _valid(value: Any) -> Any:  # noqa: ANN401 - whatever a row has
    """Make a value fit: a file's name may be any bytes, damaged losses may add up to anything."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int):
        return min(value, (1 << 64) - 1)
    return [_valid(each) for each in value] if isinstance(value, list) else value
