# SPDX-License-Identifier: MIT
"""Writes a capture while it is being recorded."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.probes import schema
from kvmprobe.store import format as fmt
from kvmprobe.store.files import create_beside, create_file, write_error

if TYPE_CHECKING:
    import pyarrow

_TYPE = tuple(fmt.CODES).index("type")
#: Most LOSS events in a batch: they are repeated in its metadata, which is bounded.
_MAX_LOSSES = 1 << 14
_SYNC_SECONDS = 1.0


class CaptureWriter:
    """A capture being written: a context that ends the file properly.

    Everything slow is done by the constructor (imports, first conversion, first touch of the
    column memory), so that the first `write` costs no more than the next.  A thread asks the
    kernel about once a second to bring the file to the disk; `write` never waits for it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: Mapping[str, Any],
        *,
        force: bool = False,
        whole: bool = False,
    ) -> None:
        """Create the capture at `path` and write its header.

        `header` is the JSON object of docs/design.md.  With `whole` the capture is there whole or
        not at all: an old file stays until `close`, and a context left by an error leaves nothing.
        Raises CaptureError when `header` is none, when the file exists and not `force`, or when it
        can't be created.
        """
        fmt.check_header(header)
        text = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
        if len(text) > fmt.MAX_METADATA // 2:
            raise CaptureError("the capture's header is too large; shorten the command line")
        self._seed = fmt.header_crc(text, fmt.CODES.items())
        self._columns = [np.zeros(fmt.MAX_ROWS, f.dtype) for f in schema.FIELDS]
        for column in self._columns:
            column.fill(0)
        arrow = schema.arrow_schema().with_metadata(
            {fmt.KEY: text, fmt.KEY_CRC: fmt.encode_crc(self._seed)}
        )
        self.path = Path(path)
        self.events = 0
        self.bytes_written = 0
        self._batches = 0
        self._failure: CaptureError | None = None
        self._synced = 0
        self._encoder = _Encoder(arrow)
        self._whole = whole
        #: Where the file stands until it is closed.
        self._made = self.path
        if whole:
            self._fd, self._made = create_beside(self.path, force=force)
        else:
            self._fd = create_file(path, force=force)
        self._closing = threading.Event()
        self._syncer = threading.Thread(target=self._sync_often, daemon=True)
        try:
            self._append(self._encoder.begin(self._columns))
        except BaseException:
            os.close(self._fd)
            self._made.unlink(missing_ok=True)
            raise
        self._syncer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif self._whole:
            self._abandon()
        else:
            with contextlib.suppress(CaptureError):
                self.close()

    def write(self, rows: NDArray[Any]) -> None:
        """Append events, dtype `schema.EVENT`, shape (n,), as one record batch.

        More than `format.MAX_ROWS` events become several batches; none, no batch.  Raises
        CaptureError when they can't be written; what was written before stays readable.
        """
        for start in range(0, len(rows), fmt.MAX_ROWS):
            self._write_batch(rows[start : start + fmt.MAX_ROWS])

    def _write_batch(self, rows: NDArray[Any]) -> None:
        if self._failure is not None:
            raise self._failure
        count = len(rows)
        columns = [column[:count] for column in self._columns]
        for name, column in zip(fmt.CODES, columns, strict=True):
            column[:] = rows[name]
        lost = rows[columns[_TYPE] == schema.Type.LOSS]
        if len(lost) > _MAX_LOSSES:
            self._write_batch(rows[: count // 2])
            self._write_batch(rows[count // 2 :])
            return
        text = json.dumps(
            {
                "index": self._batches,
                "first": self.events,
                "events": count,
                "crc32": [zlib.crc32(column.data) for column in columns],
                "losses": [_loss(row) for row in lost],
            },
            separators=(",", ":"),
        ).encode()
        crc = fmt.encode_crc(zlib.crc32(text, self._seed))
        self._encoder.batch(columns, {fmt.KEY: text, fmt.KEY_CRC: crc})
        self._append(self._encoder.take())
        self._batches += 1
        self.events += count

    def sync(self) -> None:
        """Bring what was written to the disk; done once a second anyway.  Raises CaptureError."""
        upto = self.bytes_written
        try:
            os.fdatasync(self._fd)
        except OSError as e:
            self._failure = write_error(self.path, e)
            raise self._failure from e
        self._synced = upto

    def close(self) -> None:
        """End the stream and close the file; raises CaptureError when that can't be done.

        After a failed write the stream is left without its end mark: readers then say that the
        recording was cut.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._syncer.join()
        try:
            # A batch whose writing was interrupted is not continued.
            self._encoder.take()
            self._encoder.end()
            if self._failure is None:
                self._append(self._encoder.take())
                self.sync()
                if self._made != self.path:
                    self._made.replace(self.path)
        except OSError as e:
            raise write_error(self.path, e) from e
        finally:
            os.close(self._fd)
            if self._whole and (self._failure is not None or self._made != self.path):
                self._made.unlink(missing_ok=True)

    def _abandon(self) -> None:
        """End without a file; one that was ended before stays."""
        if not self._closing.is_set():
            self._closing.set()
            self._syncer.join()
            os.close(self._fd)
            self._made.unlink(missing_ok=True)

    def _append(self, data: memoryview) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], self.bytes_written + done)
        except BaseException as e:
            # Half a batch is of no use, and its space may be what the next program needs.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.bytes_written)
            if not isinstance(e, OSError):
                raise
            self._failure = write_error(self.path, e)
            raise self._failure from e
        self.bytes_written += done

    def _sync_often(self) -> None:
        while not self._closing.wait(_SYNC_SECONDS):
            if self._synced != self.bytes_written:
                try:
                    self.sync()
                except CaptureError:
                    return  # the next write raises it


class _Encoder:
    """Turns columns into the bytes of an Arrow stream, so that the file is written by us.

    Arrow's own files say neither how many bytes of a batch reached a full disk nor take a file
    descriptor.
    """

    def __init__(self, arrow: pyarrow.Schema) -> None:
        import pyarrow as pa

        self._pa = pa
        self._schema = arrow
        self._sink = _Sink()
        self._stream = pa.ipc.new_stream(
            pa.PythonFile(self._sink, mode="w"),
            arrow,
            options=pa.ipc.IpcWriteOptions(compression="lz4"),
        )

    def begin(self, columns: list[NDArray[Any]]) -> memoryview:
        """The stream's first message, its schema.

        Arrow writes it with the first batch only.  That batch is thrown away: it is a rehearsal,
        which takes the first-time costs of Arrow's conversion and of lz4.
        """
        self.batch(columns, {fmt.KEY: b"{}"})
        data = self.take()
        return data[: 8 + int.from_bytes(data[4:8], "little")]

    def batch(self, columns: list[NDArray[Any]], metadata: dict[bytes, bytes]) -> None:
        pa = self._pa
        # Not pa.array(): it imports pandas, 0.8 s during which the ring runs over.
        arrays = [
            pa.Array.from_buffers(f.type, len(column), [None, pa.py_buffer(column)])
            for f, column in zip(self._schema, columns, strict=True)
        ]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        self._stream.write_batch(batch, custom_metadata=metadata)

    def end(self) -> None:
        self._stream.close()

    def take(self) -> memoryview:
        """The bytes made since the last call; good until the next."""
        return self._sink.take()


class _Sink:
    """A file for Arrow to write to, in memory that is there from the beginning."""

    closed = False

    def __init__(self) -> None:
        # lz4 lets incompressible bytes grow by less than 1 in 56.
        self._data = bytearray(b"\xff") * (fmt.MAX_ROWS * 57 + fmt.MAX_METADATA)
        self._used = 0

    def write(self, data: bytes) -> int:
        end = self._used + len(data)
        self._data[self._used : end] = data
        self._used = end
        return len(data)

    def take(self) -> memoryview:
        used, self._used = self._used, 0
        return memoryview(self._data)[:used]

    def flush(self) -> None:
        """Nothing to do: nothing is buffered."""

    def close(self) -> None:
        """Nothing to do: the memory stays."""


def _loss(row: np.void) -> dict[str, Any]:
    """What a LOSS event says, by name where there is one."""
    return {
        "observation": _name(schema.Type, int(row["kind"])),
        "cpu": int(row["aux"]),
        "cause": _name(schema.LossCause, int(row["len"])),
        "records": int(row["addr"]),
    }


def _name(enum: type[schema.Type] | type[schema.LossCause], value: int) -> str:
    try:
        return enum(value).name
    except ValueError:
        return str(value)
