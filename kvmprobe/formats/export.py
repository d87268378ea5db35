# SPDX-License-Identifier: MIT
"""Captures in other tools' formats, and captures made of a part of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from kvmprobe.errors import CaptureError, UsageError
from kvmprobe.formats.export_window import Window
from kvmprobe.probes import schema
from kvmprobe.store.files import create_output
from kvmprobe.store.reader import CaptureReader

#: Every format, with the endings of file names that choose it.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "perfetto": (".pftrace", ".perfetto-trace", ".perfetto"),
    "parquet": (".parquet",),
    "csv": (".csv",),
    "ndjson": (".ndjson", ".jsonl"),
    "capture": (".kvmprobe",),
}
#: The formats that are lines of text, and may go to a pipe.
TEXT = ("csv", "ndjson")


class Writer(Protocol):
    """What writes a format."""

    def write(self, columns: schema.Columns) -> int:
        """Take in one batch; returns how many of its events are in the output."""

    def close(self) -> None:
        """Write what stands at the end."""


@dataclass(frozen=True)
class Summary:
    """What an export did: events written, and what of the capture could not be.

    `problems` is one line each; `complete` says that all that is in the file was read: a capture
    that only ends early is complete.
    """

    events: int
    problems: tuple[str, ...]
    complete: bool


def format_of(path: Path) -> str:
    """The format that a file's name asks for; raises UsageError for none."""
    for name, endings in FORMATS.items():
        if path.name.lower().endswith(endings):
            return name
    endings = tuple(ending for each in FORMATS.values() for ending in each)
    raise UsageError(
        f"{path} doesn't say the format: add --to {'|'.join(FORMATS)}, or use one of the endings "
        f"{', '.join(endings)}"
    )


def export_file(
    reader: CaptureReader,
    path: Path,
    form: str,
    *,
    force: bool = False,
    anonymize: bool = False,
    window: Window | None = None,
) -> Summary:
    """Export a capture to the new file `path`, which is there whole or not at all.

    Args:
        reader: the capture.
        path: the file; `force` replaces an old one when the new one is complete.
        form: one of `FORMATS`.
        force: replace an existing file.
        anonymize: replace what names somebody, as `anonymize` says.
        window: export only what lies in it.

    Raises:
        CaptureError: the file exists, is the capture itself, or can't be written.

    """
    if path.exists() and path.samefile(reader.path):
        raise CaptureError(f"{path} is the capture itself; choose another -o")
    if form == "capture":
        return _export_capture(reader, path, force, anonymize, window or Window())
    with create_output(path, force=force) as file:
        return export_stream(reader, file, form, anonymize=anonymize, window=window)


def export_stream(
    reader: CaptureReader,
    file: BinaryIO,
    form: str,
    *,
    anonymize: bool = False,
    window: Window | None = None,
) -> Summary:
    """Export a capture to an open file, in any format but "capture"; as `export_file`."""
    source = _Source(reader, anonymize, window or Window())
    if form == "perfetto":
        from kvmprobe.formats.export_perfetto import PerfettoWriter

        return source.copy_to(PerfettoWriter(file, source.header, source.window), cut=False)
    if form == "parquet":
        from kvmprobe.formats.export_parquet import ParquetWriter

        parquet = ParquetWriter(file, source.header)
        try:
            return source.copy_to(parquet)
        except BaseException:
            parquet.abandon()
            raise
    from kvmprobe.formats.export_text import CsvWriter, NdjsonWriter

    return source.copy_to({"csv": CsvWriter, "ndjson": NdjsonWriter}[form](file, source.header))


def _export_capture(
    reader: CaptureReader, path: Path, force: bool, anonymize: bool, window: Window
) -> Summary:
    from kvmprobe.store.writer import CaptureWriter

    source = _Source(reader, anonymize, window)
    with CaptureWriter(path, source.header, force=force, whole=True) as writer:
        return source.copy_to(_CaptureWriter(writer))


class _CaptureWriter:
    """A capture as a format like the others."""

    def __init__(self, writer: Any) -> None:  # noqa: ANN401
        self._writer = writer

    def write(self, columns: schema.Columns) -> int:
        self._writer.write(schema.rows(columns))
        return len(columns["ts"])

    def close(self) -> None:
        self._writer.close()


class _Source:
    """A capture as an export wants it: anonymized, and its damage told by LOSS events."""

    def __init__(self, reader: CaptureReader, anonymize: bool, window: Window) -> None:
        self._reader = reader
        self._anonymizer = None
        self.header: dict[str, Any] = copy.deepcopy(reader.header)
        self.window = window
        if anonymize:
            from kvmprobe.formats.anonymize import Anonymizer

            self._anonymizer = Anonymizer()
            self.header = self._anonymizer.header(reader.header)
            self.window = _moved(window, reader.header, self.header)
        for _ in reader.infos():
            pass
        # Known by now, and the header is written first.
        self._note("the capture it was made of ends early" if reader.truncated else None)
        self._note("cut by time" if window != Window() else None)

    def _note(self, text: str | None) -> None:
        source = self.header["source"]
        if text is not None:
            source["note"] = f"{source['note']}; {text}" if source["note"] else text

    def copy_to(self, writer: Writer, *, cut: bool = True) -> Summary:
        """Write all events; `cut` applies the window here."""
        events = 0
        for columns in self._batches():
            events += writer.write(self.window.cut(columns) if cut else columns)
        writer.close()
        return Summary(events, self._problems(), not self._lost())

    def _batches(self) -> Iterator[schema.Columns]:
        last = 0
        for columns in self._reader.batches():
            if not len(columns["ts"]):
                continue
            batch = self._anonymizer.batch(columns) if self._anonymizer else columns
            last = max(last, int(batch["ts"].max()))
            yield batch
        lost = self._lost()
        if lost:
            # A refused batch may be the last of its vCPUs: then no gap in a sequence tells of it.
            row = np.zeros(1, schema.EVENT)
            row["type"], row["site"] = schema.Type.LOSS, schema.Site.DRAIN
            row["ts"], row["addr"], row["slot"] = last, lost, -1
            row["vcpu"], row["len"] = schema.NO_VCPU, schema.LossCause.READ
            row["flags"] = schema.Flag.CANDIDATE
            yield schema.columns(row)

    def _lost(self) -> int:
        """Events that were in the file and could not be read; a batch of unknown size is one."""
        damaged = sum(damage.events or 1 for damage in self._reader.damaged)
        return min(damaged + sum(self._reader.unknown_events.values()), (1 << 64) - 1)

    def _problems(self) -> tuple[str, ...]:
        reader = self._reader
        problems = []
        if reader.damaged:
            first, more = reader.damaged[0], len(reader.damaged) - 1
            problems.append(
                f"batch {first.batch_index} is damaged: {first.reason}"
                + (f", and {more} more are" if more else "")
            )
        if reader.unknown_events:
            total = sum(reader.unknown_events.values())
            problems.append(f"{total} events are of types this kvmprobe doesn't know")
        if reader.truncated:
            problems.append(reader.truncated)
        return tuple(problems)


def _moved(window: Window, old: Mapping[str, Any], new: Mapping[str, Any]) -> Window:
    """The same window on the clock of the anonymized capture."""
    shift = (new["clock"]["monotonic_ns"] or 0) - (old["clock"]["monotonic_ns"] or 0)
    begin, end = (None if at is None else max(at + shift, 0) for at in (window.begin, window.end))
    return Window(begin, end)
