# SPDX-License-Identifier: MIT
"""Reads a capture, whoever wrote it and whatever became of it."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.probes import schema
from kvmprobe.store import format as fmt
from kvmprobe.store.flatbuf import MalformedError

_KNOWN_TYPES = np.zeros(256, bool)
_KNOWN_TYPES[list(schema.Type)] = True
#: Threads that decode, and batches that are decoded ahead.
_DECODERS = min(2, os.cpu_count() or 1)
#: Damaged parts are listed up to so many.
MAX_DAMAGES = 1000
#: Asked of a batch's first columns, by threads that decode: which others will be needed?
Further = Callable[[schema.Columns], Sequence[str]]
#: Columns of a batch, and which of its events have a type that is known; None: all.
_Decoded = tuple[dict[str, NDArray[Any]], NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Loss:
    """Records lost in the period of a batch."""

    observation: str
    cpu: int
    cause: str
    records: int


@dataclass(frozen=True)
class Batch:
    """What a batch's metadata says, its events not decoded.

    `first` is the number of events before it, `size` its bytes in the file from `offset` on.
    """

    index: int
    first: int
    events: int
    losses: tuple[Loss, ...]
    offset: int
    size: int
    _crcs: tuple[int, ...] = ()
    _buffers: tuple[tuple[int, int], ...] = ()
    _body: int = 0


@dataclass(frozen=True)
class Damage:
    """A part of the file that was refused.

    `events` is how many were in it, None where the file no longer tells; `offset` is in bytes.
    """

    batch_index: int
    events: int | None
    offset: int
    reason: str


class _Later(dict[str, NDArray[Any]]):
    """A batch's columns, of which those not read yet are read when somebody asks for them."""

    def __init__(self, columns: schema.Columns, read: Callable[[str], NDArray[Any]]) -> None:
        super().__init__(columns)
        self._read = read

    def __missing__(self, name: str) -> NDArray[Any]:
        column = self[name] = self._read(name)
        return column


class CaptureReader:
    """A capture opened for reading: a context.  Memory is bounded by a few batches.

    A recording and what `compact` or `export` made of one as Parquet are read alike: the
    constructor makes a `recording.RecordingReader` or a `parquet.ParquetReader`.

    After an iteration over `batches` or `infos` came to its end, `damaged` lists what was refused,
    `truncated` says whether the file was cut (None: it was not), and `unknown_events` counts the
    events of types this kvmprobe doesn't know, by type.  Each iteration begins them anew.  All
    three must weaken a verdict.
    """

    def __new__(cls, path: str | os.PathLike[str]) -> Self:
        """Choose the reader by what the file begins with."""
        if cls is not CaptureReader:
            return object.__new__(cls)
        if _begins_with(Path(path), fmt.PARQUET):
            from kvmprobe.store.parquet import ParquetReader

            return cast("Self", object.__new__(ParquetReader))
        from kvmprobe.store.recording import RecordingReader

        return cast("Self", object.__new__(RecordingReader))

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path` and read its header.

        Raises CaptureError when it can't be read, is no capture, is cut or damaged inside its
        header, or was written in a newer major version of the schema.
        """
        self.path = Path(path)
        self.damaged: list[Damage] = []
        self.truncated: str | None = None
        self.unknown_events: dict[int, int] = {}
        self._fd = _open(self.path)
        try:
            self._size = os.fstat(self._fd).st_size
            #: The capture's header: every key of docs/design.md is present and has its type.
            self.header: dict[str, Any] = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def infos(self) -> Iterator[Batch]:
        """What each batch says of itself, events not decoded: for counts and losses."""
        self.damaged, self.truncated, self.unknown_events = [], None, {}
        return self._walk()

    def count(self) -> int:
        """How many events the batches that can be found say they hold; decodes none."""
        return sum(batch.events for batch in self.infos())

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, NDArray[Any]]]:
        """The events, batch by batch: column name -> array, shape (n,), dtypes of `schema.EVENT`.

        Only the columns asked for are read and decoded (None: all).  A batch one of whose columns
        fails its checksum is left out and put into `damaged`.  Raises CaptureError for a column
        that doesn't exist.
        """
        names = tuple(fmt.CODES) if columns is None else tuple(columns)
        for name in names:
            if name not in fmt.CODES:
                raise CaptureError(f"no column {name!r}; there are {', '.join(fmt.CODES)}")
        return self._decode(self.infos(), names)

    def _read_header(self) -> dict[str, Any]:
        """Read and check what stands before the events; raises CaptureError."""
        raise NotImplementedError

    def _walk(self) -> Iterator[Batch]:
        """Go from batch to batch; put what is wrong into `damaged` and `truncated`."""
        raise NotImplementedError

    def _columns(self, batch: Batch, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Decode columns of a batch; raises MalformedError.  Called from several threads."""
        raise NotImplementedError

    def _decode(
        self, batches: Iterator[Batch], names: tuple[str, ...], further: Further | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        # Checksums and decompression run outside the interpreter's lock: a few batches are decoded
        # ahead.
        ahead: deque[tuple[Batch, Future[_Decoded]]] = deque()
        with ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode") as pool:
            for batch in batches:
                ahead.append((batch, pool.submit(self._wanted, batch, names, further)))
                if len(ahead) > _DECODERS:
                    yield from self._finish(*ahead.popleft(), names, further)
            while ahead:
                yield from self._finish(*ahead.popleft(), names, further)

    def _wanted(self, batch: Batch, names: tuple[str, ...], further: Further | None) -> _Decoded:
        """Decode what is wanted of a batch, and its types; raises MalformedError."""
        columns = self._columns(batch, ("type", *(name for name in names if name != "type")))
        if further is not None:
            more = tuple(name for name in further(columns) if name not in columns)
            columns |= self._columns(batch, more) if more else {}
        known: NDArray[np.bool_] = _KNOWN_TYPES.take(columns["type"])
        return columns, None if known.all() else known

    def _finish(
        self,
        batch: Batch,
        decoded: Future[_Decoded],
        names: tuple[str, ...],
        further: Further | None,
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Give a decoded batch, without events of unknown types, unless it is damaged."""
        try:
            columns, mask = decoded.result()
        except MalformedError as e:
            self._refuse(batch, str(e))
            return
        known: NDArray[np.bool_] | slice = slice(None)
        if mask is not None:
            known = mask
            unknown = columns["type"][~mask]
            for value, count in zip(*np.unique(unknown, return_counts=True), strict=True):
                before = self.unknown_events.get(int(value), 0)
                self.unknown_events[int(value)] = before + int(count)
        if further is None:
            yield {name: columns[name][known] for name in names}
        else:
            columns = {name: column[known] for name, column in columns.items()}
            yield _Later(columns, lambda name: self._late(batch, name)[known])

    def _late(self, batch: Batch, name: str) -> NDArray[Any]:
        """Decode a column of a batch that is in use; one that can't be read is 0."""
        try:
            return self._columns(batch, (name,))[name]
        except MalformedError as e:
            self._refuse(batch, str(e))
            return np.zeros(batch.events, "<" + fmt.CODES[name])

    def _refuse(self, batch: Batch, reason: str) -> None:
        if len(self.damaged) < MAX_DAMAGES:
            self.damaged.append(Damage(batch.index, batch.events, batch.offset, reason))
            self.damaged.sort(key=lambda damage: damage.offset)

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) < length:
            raise MalformedError("the file became shorter while it was read")
        return data


def _begins_with(path: Path, magic: bytes) -> bool:
    fd = _open(path)
    try:
        return os.pread(fd, len(magic), 0) == magic
    except OSError as e:
        raise CaptureError(f"can't read {path}: {e.strerror}") from None
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    try:
        # Without O_NONBLOCK the open of a pipe nobody writes to would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CaptureError(f"{path} does not exist") from None
    except PermissionError:
        raise CaptureError(
            f"{path} can't be read by you; a capture is readable by its owner alone: "
            "use sudo, or let the owner change that"
        ) from None
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise CaptureError(f"can't open {path}: {reason}") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise CaptureError(f"{path} is a directory; name a capture in it")
    raise CaptureError(f"{path} is not a regular file; save the capture to a file first")
