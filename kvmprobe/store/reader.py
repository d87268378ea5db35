# SPDX-License-Identifier: MIT
"""Reads a capture, whoever wrote it and whatever became of it."""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.probes import schema
from kvmprobe.store import flatbuf
from kvmprobe.store import format as fmt
from kvmprobe.store.flatbuf import MalformedError

if TYPE_CHECKING:
    import pyarrow

_KNOWN_TYPES = np.zeros(256, bool)
_KNOWN_TYPES[list(schema.Type)] = True
#: Read at once at a message's begin: its framing and, nearly always, all of its metadata.
_HEAD = 4096
#: Threads that decode, and batches that are decoded ahead.
_DECODERS = min(2, os.cpu_count() or 1)
#: Searching for the next whole batch after damage.
_WINDOW = 1 << 22
#: So much is looked at in one iteration; beyond that, somebody made the file so.
_MAX_TRIES = 1000
_MAX_DAMAGES = 1000
#: Asked of the columns that were read first: is the rest of the batch needed?
Whole = Callable[[schema.Columns], bool]
#: Columns of a batch, and the names of those to give.
_Decoded = tuple[dict[str, NDArray[Any]], tuple[str, ...]]
_NO_END = "it has no end mark: still being written, or the recording was killed"


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
    _crcs: tuple[int, ...]
    _buffers: tuple[tuple[int, int], ...]
    _body: int


@dataclass(frozen=True)
class Damage:
    """A part of the file that was refused.

    `events` is how many were in it, None where the file no longer tells; `offset` is in bytes.
    """

    batch_index: int
    events: int | None
    offset: int
    reason: str


class _CutError(Exception):
    """A message goes on beyond the end of the file."""


class CaptureReader:
    """A capture opened for reading: a context.  Memory is bounded by a few batches.

    A recording and what `compact` or `export` made of one as Parquet are read alike: of a Parquet
    file the constructor makes a `parquet.ParquetReader`.

    After an iteration over `batches` or `infos` came to its end, `damaged` lists what was refused,
    `truncated` says whether the file was cut (None: it was not), and `unknown_events` counts the
    events of types this kvmprobe doesn't know, by type.  Each iteration begins them anew.  All
    three must weaken a verdict.
    """

    def __new__(cls, path: str | os.PathLike[str]) -> Self:
        """Choose the reader by what the file begins with."""
        if cls is CaptureReader and _begins_with(Path(path), fmt.PARQUET):
            from kvmprobe.store.parquet import ParquetReader

            return cast("Self", object.__new__(ParquetReader))
        return object.__new__(cls)

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
        return self._decode(self.infos(), names, None)

    def _decode(
        self, batches: Iterator[Batch], names: tuple[str, ...], whole: Whole | None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        # Checksums and lz4 run outside the interpreter's lock: a few batches are decoded ahead.
        ahead: deque[tuple[Batch, Future[_Decoded]]] = deque()
        with ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode") as pool:
            for batch in batches:
                ahead.append((batch, pool.submit(self._wanted, batch, names, whole)))
                if len(ahead) > _DECODERS:
                    yield from self._finish(*ahead.popleft())
            while ahead:
                yield from self._finish(*ahead.popleft())

    def _wanted(self, batch: Batch, names: tuple[str, ...], whole: Whole | None) -> _Decoded:
        """Decode what is wanted of a batch, and its types; raises MalformedError."""
        columns = self._columns(batch, ("type", *(name for name in names if name != "type")))
        if whole is None or not whole(columns):
            return columns, names
        columns |= self._columns(batch, tuple(name for name in fmt.CODES if name not in columns))
        return columns, tuple(fmt.CODES)

    def _columns(self, batch: Batch, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Decode columns of a batch; raises MalformedError."""
        import pyarrow as pa

        codec = pa.Codec("lz4")
        return {name: self._column(codec, batch, name) for name in names}

    def _finish(self, batch: Batch, decoded: Future[_Decoded]) -> Iterator[dict[str, NDArray[Any]]]:
        """Give a decoded batch, without events of unknown types, unless it is damaged."""
        try:
            columns, names = decoded.result()
        except MalformedError as e:
            if len(self.damaged) < _MAX_DAMAGES:
                self.damaged.append(Damage(batch.index, batch.events, batch.offset, str(e)))
                self.damaged.sort(key=lambda damage: damage.offset)
            return
        types = columns["type"]
        known = _KNOWN_TYPES[types]
        if not known.all():
            for value, count in zip(*np.unique(types[~known], return_counts=True), strict=True):
                before = self.unknown_events.get(int(value), 0)
                self.unknown_events[int(value)] = before + int(count)
            columns = {name: column[known] for name, column in columns.items()}
        yield {name: columns[name] for name in names}

    def _column(self, codec: pyarrow.Codec, batch: Batch, name: str) -> NDArray[Any]:
        """Decode one column and check it; raises MalformedError."""
        dtype = np.dtype("<" + fmt.CODES[name])
        if name not in self._places:
            return np.zeros(batch.events, dtype)
        place = self._places[name]
        offset, length = batch._buffers[place]
        size = batch.events * dtype.itemsize
        # lz4 adds at most one byte in 255 and a frame's ends: more is a lie.
        if not 8 <= length <= size + size // 255 + 256:
            raise MalformedError(f"column {name} has an impossible size")
        data = self._read(batch._body + offset, length)
        if int.from_bytes(data[:8], "little") != size:
            raise MalformedError(f"column {name} has an impossible size")
        try:
            values = codec.decompress(memoryview(data)[8:], decompressed_size=size)
        except OSError:
            raise MalformedError(f"column {name} can't be decompressed") from None
        if zlib.crc32(values) != batch._crcs[place]:
            raise MalformedError(f"column {name} fails its checksum")
        return np.frombuffer(values, dtype)

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) < length:
            raise MalformedError("the file became shorter while it was read")
        return data

    def _metadata(self, offset: int) -> tuple[bytes, int]:
        """Metadata of the message at `offset` and where its body begins; b"" at the end mark.

        Raises MalformedError, or _CutError when the file ends first.
        """
        head = os.pread(self._fd, _HEAD, offset)
        if not fmt.MESSAGE.startswith(head[:4]):
            raise MalformedError("no batch begins here")
        if len(head) < 8:
            raise _CutError
        length = int.from_bytes(head[4:8], "little")
        if length == 0:
            return b"", offset + 8
        if length > fmt.MAX_METADATA or length % 8:
            raise MalformedError("a message has an impossible size")
        if offset + 8 + length > self._size:
            raise _CutError
        data = head[8 : 8 + length]
        if len(data) < length:
            data += self._read(offset + 8 + len(data), length - len(data))
        return data, offset + 8 + length

    def _read_header(self) -> dict[str, Any]:
        if self._size == 0:
            raise CaptureError(f"{self.path} is empty: not a kvmprobe capture")
        try:
            data, self._start = self._metadata(0)
            message = flatbuf.read_schema(data)
            text, crc = message.metadata[fmt.KEY], message.metadata[fmt.KEY_CRC]
        except _CutError:
            raise CaptureError(
                f"{self.path} is cut inside its header, if it is a kvmprobe capture: "
                "nothing can be read"
            ) from None
        except (MalformedError, KeyError):
            raise CaptureError(f"{self.path} is not a kvmprobe capture") from None
        self._seed = fmt.header_crc(text, message.columns)
        if crc != fmt.encode_crc(self._seed):
            raise CaptureError(f"{self.path}: the header fails its checksum; the file is damaged")
        try:
            header = fmt.parse_header(text)
            self._places = fmt.places(message.columns, header["schema"]["minor"])
        except CaptureError as e:
            raise CaptureError(f"{self.path}: {fmt.printable(str(e), 200)}") from None
        self._stored = len(message.columns)
        return header

    def _walk(self) -> Iterator[Batch]:
        """Go from message to message; put what is wrong into `damaged` and `truncated`."""
        offset, index, first = self._start, 0, 0
        self._tries = _MAX_TRIES
        problem: tuple[int, str] | None = None
        while True:
            if len(self.damaged) >= _MAX_DAMAGES:
                self.truncated = "too much of it is damaged: the rest was not read"
                return
            try:
                batch = self._batch(offset)
            except (MalformedError, _CutError) as e:
                cut = isinstance(e, _CutError)
                found = self._search(offset + 8)
                if found is None:
                    if not cut:
                        self.damaged.append(Damage(index, None, offset, f"{e}, nor later"))
                    self.truncated = _NO_END
                    return
                problem = offset, "a batch goes on beyond the file's end" if cut else str(e)
                offset = found
                continue
            missing = None if batch is None else batch.first - first
            if problem or missing or (batch and batch.index != index):
                if batch and (batch.index < index or batch.first < first):
                    reason = "a batch out of its order"
                    self.damaged.append(Damage(batch.index, batch.events, offset, reason))
                    offset, problem = batch.offset + batch.size, None
                    continue
                at, reason = problem or (offset, "batches are missing before this place")
                self.damaged.append(Damage(index, missing, at, reason))
                problem = None
            if batch is None:
                return
            yield batch
            offset, index, first = (
                batch.offset + batch.size,
                batch.index + 1,
                batch.first + batch.events,
            )

    def _batch(self, offset: int) -> Batch | None:
        """The batch at `offset`, checked but for its columns; None at the end mark.

        Raises MalformedError, or _CutError when the file ends first.
        """
        data, body = self._metadata(offset)
        if not data:
            if body != self._size:
                raise MalformedError("an end mark before the end")
            return None
        message = flatbuf.read_batch(data)
        try:
            text, crc = message.metadata[fmt.KEY], message.metadata[fmt.KEY_CRC]
        except KeyError:
            raise MalformedError("a batch without checksum") from None
        if crc != fmt.encode_crc(zlib.crc32(text, self._seed)):
            raise MalformedError("the batch's own description fails its checksum")
        if body + message.body_length > self._size:
            raise _CutError
        try:
            said = json.loads(text)
            batch = Batch(
                index=fmt.number(said["index"]),
                first=fmt.number(said["first"]),
                events=fmt.number(said["events"]),
                losses=tuple(_loss(loss) for loss in said["losses"]),
                offset=offset,
                size=body + message.body_length - offset,
                _crcs=tuple(fmt.number(crc) for crc in said["crc32"]),
                _buffers=message.buffers,
                _body=body,
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            raise MalformedError("the batch's own description is not understood") from None
        if not 0 < batch.events <= fmt.MAX_ROWS or batch.events != message.rows:
            raise MalformedError("the batch has an impossible number of events")
        if not len(batch._crcs) == len(batch._buffers) == self._stored:
            raise MalformedError("the batch has another number of columns")
        return batch

    def _search(self, start: int) -> int | None:
        """The next offset at which a whole batch or the end mark stands; messages are aligned."""
        for window in range(start - start % 8, self._size, _WINDOW):
            data = os.pread(self._fd, _WINDOW, window)
            words = np.frombuffer(data[: len(data) // 8 * 8], "<u4")
            plausible = (words[::2] == 0xFFFFFFFF) & (words[1::2] <= fmt.MAX_METADATA)
            for at in np.flatnonzero(plausible):
                offset = window + int(at) * 8
                if self._tries == 0:
                    return None
                self._tries -= 1
                try:
                    self._batch(offset)
                except (MalformedError, _CutError):
                    continue
                return offset
        return None


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


def _loss(said: dict[str, object]) -> Loss:
    observation, cause = said["observation"], said["cause"]
    if type(observation) is not str or type(cause) is not str:
        raise ValueError("no name")
    return Loss(
        fmt.printable(observation),
        fmt.number(said["cpu"]),
        fmt.printable(cause),
        fmt.number(said["records"]),
    )
