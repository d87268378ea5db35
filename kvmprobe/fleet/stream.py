# SPDX-License-Identifier: MIT
"""One recording of one host, whatever number of files it lies in, read as one stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Self

from kvmprobe.analysis.run import Screening
from kvmprobe.errors import CaptureError
from kvmprobe.fleet.places import File, local_copy
from kvmprobe.fleet.survey import recording_of
from kvmprobe.probes.schema import Columns
from kvmprobe.store.reader import CaptureReader


class Stream:
    """The files of one recording, in order, as `kvmprobe.analysis.run.Reader`: a context.

    One file after the other is opened, and copied to this machine if it isn't there.  A file that
    can't be read is among `damaged` and `problems`, and the rest goes on.
    """

    def __init__(self, files: Sequence[File], recording: str) -> None:
        """Open the first file that can be read; raises CaptureError when there is none.

        Args:
            files: in the order of their events.
            recording: what all of them belong to, as `survey.recording_of` names it.

        """
        self.recording = recording
        self.damaged: list[object] = []
        self.truncated: str | None = None
        self.unknown_events: Counter[int] = Counter()
        #: What is wrong with the files, a line each.
        self.problems: list[str] = []
        self._left = list(files)
        self._opened = ExitStack()
        opened = self._next()
        if opened is None:
            raise CaptureError("; ".join(self.problems))
        self._first: CaptureReader | None = opened[1]
        self.path, self.header = opened[0].url, opened[1].header

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Columns]:
        """The events; may be asked for once."""
        return self._walk(lambda reader: reader.batches(columns))

    def screened(
        self, columns: Sequence[str], further: Callable[[Columns], Any]
    ) -> Iterator[Columns]:
        """The events, as the files' own readers screen them; may be asked for once."""
        return self._walk(
            lambda reader: (
                reader.screened(columns, further)
                if isinstance(reader, Screening)
                else reader.batches()
            )
        )

    def _walk(self, read: Callable[[CaptureReader], Iterator[Columns]]) -> Iterator[Columns]:
        current, self._first = self._first, None
        name = self.path
        while current is not None:
            try:
                yield from read(current)
            except CaptureError as error:
                self._refuse(name, str(error))
            self._add_up(name, current)
            self._opened.close()
            opened = self._next()
            name, current = (opened[0].url, opened[1]) if opened else ("", None)

    def _next(self) -> tuple[File, CaptureReader] | None:
        """Open the next file that can be read; None: there is none."""
        while self._left:
            file = self._left.pop(0)
            try:
                path = self._opened.enter_context(local_copy(file))
                reader = self._opened.enter_context(CaptureReader(path))
            except CaptureError as error:
                self._refuse(file.url, str(error))
                self._opened.close()
                continue
            if recording_of(reader.header) == self.recording:
                return file, reader
            self._refuse(file.url, "it changed while it was read")
            self._opened.close()
        return None

    def _refuse(self, name: str, why: str) -> None:
        self.damaged.append(name)
        self.problems.append(f"{name}: {why}")

    def _add_up(self, name: str, reader: CaptureReader) -> None:
        """Take over what a reader says at its end."""
        self.unknown_events.update(reader.unknown_events)
        self.damaged += reader.damaged
        if reader.damaged:
            self.problems.append(
                f"{name}: {len(reader.damaged)} damaged part(s), the first: "
                f"{reader.damaged[0].reason}"
            )
        if reader.truncated:
            self.truncated = f"{name}: {reader.truncated}"
            self.problems.append(self.truncated)
