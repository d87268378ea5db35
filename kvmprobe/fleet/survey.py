# SPDX-License-Identifier: MIT
"""What a file at rest says of itself: whose it is, which recording it is a part of, and when."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvmprobe.errors import CaptureError
from kvmprobe.fleet.places import File, local_copy
from kvmprobe.report.summary import TELLING
from kvmprobe.store.parquet import ParquetReader
from kvmprobe.store.reader import CaptureReader


@dataclass(frozen=True)
class Facts:
    """What a file's header says; `problem` says why it can't be read, and all else is empty then.

    `recording` is the same in all parts of one recording.  `clock` is what turns an event's time
    into ns since 1970, None if that is not known.  `span` has the times of the first and the last
    event and how many there are; None where that is known only by reading them.
    """

    problem: str | None = None
    recording: str = ""
    machine: str | None = None
    kernel: str | None = None
    configuration: str = ""
    schema: str = ""
    started: str | None = None
    clock: int | None = None
    span: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Surveyed:
    """A file with its facts."""

    file: File
    facts: Facts

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        facts = asdict(self.facts)
        facts["span"] = None if self.facts.span is None else list(self.facts.span)
        return {"file": asdict(self.file), "facts": facts}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Surveyed:
        """From `to_json`'s result; raises KeyError or TypeError when it is none."""
        facts = dict(said["facts"])
        span = facts.pop("span")
        return cls(File(**said["file"]), Facts(**facts, span=None if span is None else tuple(span)))


def survey(files: list[File]) -> list[Surveyed]:
    """Look at files, in order; one that can't be read has a problem.  Runs on a worker."""
    return [Surveyed(file, _facts(file)) for file in files]


def recording_of(header: Mapping[str, Any]) -> str:
    """Name the recording that a header belongs to: the parts of one have the same header."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def span_of(file: File) -> tuple[int, int, int] | None:
    """Read the times of a recording's first and last event, ns, and how many there are.

    None when there is none.  Raises CaptureError when it can't be read.
    """
    first, last, events = 1 << 64, -1, 0
    with local_copy(file) as path, CaptureReader(path) as reader:
        for columns in reader.batches(("ts",)):
            if len(times := columns["ts"]):
                first, last = min(first, int(times.min())), max(last, int(times.max()))
                events += len(times)
    return (first, last, events) if events else None


def _facts(file: File) -> Facts:
    try:
        with local_copy(file, outline=True) as path, CaptureReader(path) as reader:
            header = reader.header
            span = _parquet_span(path) if isinstance(reader, ParquetReader) else None
    except CaptureError as error:
        return Facts(problem=str(error))
    host, clock, version = header["host"], header["clock"], header["schema"]
    known = clock["monotonic_ns"] is not None and clock["wall_ns"] is not None
    parameters = host["parameters"]
    return Facts(
        recording=recording_of(header),
        machine=host["machine"],
        kernel=host["kernel"],
        configuration=" ".join(f"{n}={parameters[n]}" for n in TELLING if n in parameters),
        schema=f"{version['major']}.{version['minor']}",
        started=header["started"],
        clock=clock["wall_ns"] - clock["monotonic_ns"] if known else None,
        span=span,
    )


def _parquet_span(path: Path) -> tuple[int, int, int] | None:
    """The same as `span_of`, from the index at a Parquet file's end."""
    import pyarrow.parquet as pq

    index = pq.read_metadata(path)
    column = index.schema.names.index("ts")
    groups = [index.row_group(n).column(column) for n in range(index.num_row_groups)]
    if not groups or not all(g.is_stats_set and g.statistics.has_min_max for g in groups):
        return None
    first = min(int(g.statistics.min) for g in groups)
    last = max(int(g.statistics.max) for g in groups)
    return first, last, index.num_rows
