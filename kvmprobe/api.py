# SPDX-License-Identifier: MIT
"""The Python API: `kvmprobe.open` for captures, `kvmprobe.stream` for the live host."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.probes import schema
from kvmprobe.store.reader import CaptureReader, Damage

if TYPE_CHECKING:
    import pandas as pd

    from kvmprobe.analysis.run import Analysis
    from kvmprobe.frames import FindingsFrame

#: Most events that become one DataFrame without a limit: about 1.4 GB.
MAX_FRAME_EVENTS = 20_000_000

#: A time: ns since the recording began, or a moment (UTC where it names no zone).
When = int | str | datetime


class Filters(TypedDict, total=False):
    """Which events, or which findings, are wanted; all of them where nothing is said.

    `vm` is the VM's number in the capture, `vcpu` the vCPU's id.  `since` is included, `until` is
    not.
    """

    vm: int | None
    vcpu: int | None
    since: When | None
    until: When | None


def open(path: str | os.PathLike[str]) -> Capture:
    """Open the capture at `path`; raises CaptureError when it can't be read."""
    return Capture(path)


def stream(duration: float | None = None, pid: int | None = None) -> Iterator[pd.DataFrame]:
    """Record this host's KVM and yield each batch as a DataFrame, as `Capture.events` gives it.

    `duration` is in seconds (None: until the iteration is ended); `pid` records one process only.
    Needs root.  Raises HostError when the host can't be recorded.
    """
    from kvmprobe.capture.recorder import live_batches
    from kvmprobe.frames import events_frame

    for header, rows in live_batches(duration=duration, pid=pid):
        yield events_frame(schema.columns(rows), header)


class Capture:
    """A capture opened for reading: a context.

    After each method that reads events, `damaged`, `truncated` and `unknown_events` say what of
    the file could not be read; the methods that return a DataFrame warn of it too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`; raises CaptureError."""
        self._reader = CaptureReader(path)

    def __repr__(self) -> str:
        return f"<kvmprobe capture {str(self.path)!r}, started {self.header['started']}>"

    def _repr_html_(self) -> str:
        from kvmprobe.analysis.html import table

        host, source = self.header["host"], self.header["source"]
        facts = {
            "file": self.path,
            "started": self.header["started"] or "unknown",
            "kernel": host["kernel"] or "unknown",
            "vendor": host["vendor"] or "unknown",
            "source": source["kind"],
            "attached": f"{sum(bool(row['attached']) for row in self.header['plan'])} probes",
        }
        return table("kvmprobe capture", ("", ""), list(facts.items()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._reader.path

    @property
    def header(self) -> dict[str, Any]:
        """The capture's header: the keys of docs/design.md, all present."""
        return self._reader.header

    @property
    def damaged(self) -> list[Damage]:
        """The batches that were refused, by the last method that read events."""
        return self._reader.damaged

    @property
    def truncated(self) -> str | None:
        """How the file was cut, if it was, by the last method that read events."""
        return self._reader.truncated

    @property
    def unknown_events(self) -> dict[int, int]:
        """Events of types a newer kvmprobe wrote, left out: type -> number."""
        return self._reader.unknown_events

    def count(self) -> int:
        """How many events the capture says it holds; decodes none."""
        return self._reader.count()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, NDArray[Any]]]:
        """The events in constant memory: column name -> array, shape (n,), a batch at a time.

        Dtypes are those of `schema.EVENT`; only the columns asked for are decoded (None: all).
        """
        return self._reader.batches(columns)

    def events(
        self,
        *,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        **filters: Unpack[Filters],
    ) -> pd.DataFrame:
        """The events, one a row; `frames.events_frame` describes the columns.

        `columns` and `Filters` choose among them, `limit` takes the first so many.  Raises
        CaptureError for more than 20 million events without `limit`, and for a column or time that
        makes no sense.
        """
        from kvmprobe import frames

        wanted = frames.EVENT_COLUMNS if columns is None else tuple(columns)
        for name in wanted:
            if name not in frames.EVENT_COLUMNS:
                raise CaptureError(
                    f"no column {name!r}; there are {', '.join(frames.EVENT_COLUMNS)}"
                )
        size = sum(frames.COLUMN_BYTES[name] for name in wanted)
        chosen = _Choice(self, filters)
        if limit is None and not chosen.tests:
            self._check_size(self.count(), size)
        gathered = self._gather(frames.fields_of(wanted), chosen.tests, limit, size)
        return frames.events_frame(gathered, self.header, wanted)

    def fills(self, **filters: Unpack[Filters]) -> pd.DataFrame:
        """The MMIO cache as it was written (FILL) or found (CACHE), one event a row.

        gpa, gva, access and mmio_gen are the cache's fields; `slot` is the memslot at gpa (int16,
        -1: none, to be believed where `slot_known`).  `Filters` choose among them.
        """
        from kvmprobe import frames

        chosen = _Choice(self, filters, (schema.Type.FILL, schema.Type.CACHE))
        return frames.fills_frame(self._gather(_ALL, chosen.tests), self.header)

    def memslots(self, **filters: Unpack[Filters]) -> pd.DataFrame:
        """What happened to memslots: base_gpa, npages, id, change, generation, one change a row.

        `Filters` choose among them; most memslot changes belong to no vCPU.
        """
        from kvmprobe import frames

        chosen = _Choice(self, filters, (schema.Type.MEMSLOT,))
        return frames.memslots_frame(self._gather(_ALL, chosen.tests), self.header)

    def analysis(self) -> Analysis:
        """What the rules say of this capture: findings, and a verdict on each fault."""
        from kvmprobe.analysis.run import analyze

        return analyze([self._reader])

    def findings(self, **filters: Unpack[Filters]) -> FindingsFrame:
        """The findings of the whole capture, one a row; `analysis.frame` describes the columns.

        The filters choose among them: those of a VM or vCPU, and those that were seen at some time
        between `since` and `until`.  No finding does not mean no fault: see `analysis().verdicts`.
        """
        from kvmprobe import frames

        chosen = _Choice(self, filters)
        found = self.analysis().to_frame()
        self._warn(stacklevel=3)
        keep = np.ones(len(found), bool)
        for name in ("vm", "vcpu"):
            wanted = filters.get(name)
            if wanted is not None:
                keep &= found[name].to_numpy() == wanted
        start = self.header["clock"]["monotonic_ns"] or 0
        if chosen.begin is not None:
            keep &= found["last_ns"].to_numpy() >= int(chosen.begin) - start
        if chosen.end is not None:
            keep &= found["first_ns"].to_numpy() < int(chosen.end) - start
        return frames.FindingsFrame(found[keep].reset_index(drop=True))

    def _gather(
        self,
        fields: Iterable[str],
        tests: Sequence[_Test],
        limit: int | None = None,
        row_bytes: int = schema.EVENT.itemsize,
    ) -> dict[str, NDArray[Any]]:
        """The events that pass the tests, their `fields` as one array each."""
        fields = sorted(fields)
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in fields}
        rows = 0
        for batch in self.batches(sorted({*fields, *(name for name, _ in tests)})):
            if limit is not None and rows >= limit:
                break
            keep: Any = slice(None)
            if tests:
                keep = np.logical_and.reduce([test(batch[name]) for name, test in tests])
            kept = {name: batch[name][keep] for name in fields}
            size = min((len(values) for values in kept.values()), default=0)
            if limit is not None:
                size = min(size, limit - rows)
            for name, values in kept.items():
                parts[name].append(values[:size])
            rows += size
            if limit is None:
                self._check_size(rows, row_bytes, at_least=True)
        self._warn(stacklevel=4)
        # Taken out one by one, so that only one column is there twice.
        return {
            name: np.concatenate([np.empty(0, schema.EVENT[name]), *parts.pop(name)])
            for name in fields
        }

    def _ticks(self, when: When | None) -> np.uint64 | None:
        """A time as `ts` of events: CLOCK_MONOTONIC, ns, within 64 bits."""
        if when is None:
            return None
        clock = self.header["clock"]
        if isinstance(when, int | np.integer):
            ticks = int(when) + (clock["monotonic_ns"] or 0)
        elif clock["monotonic_ns"] is None or clock["wall_ns"] is None:
            raise CaptureError(f"{self.path} has no clock: give times in ns since its start")
        else:
            import pandas as pd

            try:
                moment = pd.Timestamp(when)
                if pd.isna(moment):
                    raise ValueError("not a time")
                moment = moment.tz_localize("UTC") if moment.tzinfo is None else moment
                wall = moment.as_unit("ns").value
            except (ValueError, TypeError) as e:
                raise CaptureError(f"{when!r} is no time: {e}") from None
            ticks = wall - clock["wall_ns"] + clock["monotonic_ns"]
        return np.uint64(min(max(ticks, 0), (1 << 64) - 1))

    def _check_size(self, rows: int, row_bytes: int, *, at_least: bool = False) -> None:
        if rows > MAX_FRAME_EVENTS:
            raise CaptureError(
                f"{self.path}: {'at least ' * at_least}{rows:,} events would take "
                f"{rows * row_bytes / 1e9:.1f} GB as a DataFrame; "
                "use batches(), a filter, fewer columns or limit="
            )

    def _warn(self, stacklevel: int) -> None:
        """Tell the caller of a DataFrame what it lacks."""
        problems = [f"batch {d.batch_index} is damaged: {d.reason}" for d in self.damaged[:1]]
        if len(self.damaged) > 1:
            problems.append(f"{len(self.damaged) - 1} more are")
        if self.truncated:
            problems.append(self.truncated)
        if self.unknown_events:
            total = sum(self.unknown_events.values())
            problems.append(f"{total} events are of types this kvmprobe doesn't know")
        if problems:
            warnings.warn(f"{self.path}: {'; '.join(problems)}", RuntimeWarning, stacklevel)


class _Choice:
    """What filters choose: tests of a batch's columns, and the times as events have them."""

    def __init__(
        self, capture: Capture, filters: Filters, types: Sequence[schema.Type] = ()
    ) -> None:
        """Take filters apart; raises TypeError for one that doesn't exist."""
        for name in filters:
            if name not in Filters.__annotations__:
                raise TypeError(
                    f"no filter {name!r}; there are {', '.join(Filters.__annotations__)}"
                )
        vm, vcpu = filters.get("vm"), filters.get("vcpu")
        self.begin = begin = capture._ticks(filters.get("since"))
        self.end = end = capture._ticks(filters.get("until"))
        self.tests: list[_Test] = []
        if vm is not None:
            self.tests.append(("vm", lambda values: values == vm))
        if vcpu is not None:
            self.tests.append(("vcpu", lambda values: values == vcpu))
        if begin is not None:
            self.tests.append(("ts", lambda values: values >= begin))
        if end is not None:
            self.tests.append(("ts", lambda values: values < end))
        if types:
            self.tests.append(("type", lambda values: np.isin(values, np.array(types, np.uint8))))


#: A column's name, and which of its values are chosen.
_Test = tuple[str, Callable[[NDArray[Any]], NDArray[np.bool_]]]
_ALL = tuple(f.name for f in schema.FIELDS)
