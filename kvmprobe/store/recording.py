# SPDX-License-Identifier: MIT
"""Reads a recording: what a capture's writer left, whatever became of it since."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.store import flatbuf
from kvmprobe.store import format as fmt
from kvmprobe.store.flatbuf import MalformedError
from kvmprobe.store.reader import MAX_DAMAGES, Batch, CaptureReader, Damage, Loss

if TYPE_CHECKING:
    import pyarrow

#: Read at once at a message's begin: its framing and, nearly always, all of its metadata.
_HEAD = 4096
#: Searching for the next whole batch after damage.
_WINDOW = 1 << 22
#: So much is looked at in one iteration; beyond that, somebody made the file so.
_MAX_TRIES = 1000
_NO_END = "it has no end mark: still being written, or the recording was killed"


class _CutError(Exception):
    """A message goes on beyond the end of the file."""


class RecordingReader(CaptureReader):
    """A capture as `record` wrote it.  Raises and tells what `CaptureReader` does."""

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
        offset, index, first = self._start, 0, 0
        self._tries = _MAX_TRIES
        problem: tuple[int, str] | None = None
        while True:
            if len(self.damaged) >= MAX_DAMAGES:
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

    def _columns(self, batch: Batch, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        import pyarrow as pa

        codec = pa.Codec("lz4")
        return {name: self._column(codec, batch, name) for name in names}

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
