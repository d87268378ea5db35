# SPDX-License-Identifier: MIT
"""Reads a capture that is a Parquet file: what `compact` and `export` make of a recording.

The header and its checksum are metadata of the file under the keys of `format`; `kvmprobe.end`
holds what `End` says, with a checksum begun with the header's.  Pages carry Parquet's own
checksums, which are verified.  A row group is a batch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.store import format as fmt
from kvmprobe.store.flatbuf import MalformedError
from kvmprobe.store.reader import Batch, CaptureReader, Damage, Further

#: Events in a row group: 28 MiB before they are compressed.
GROUP = 1 << 19
#: What opens and reads a file raises all of these for bytes it doesn't understand; Arrow's own
#: errors derive from them.
_REFUSED = (ValueError, KeyError, TypeError, OSError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class End:
    """What could not be read of the capture that a Parquet file was made of.

    `damaged`, `truncated` and `unknown_events` are those of `CaptureReader`; offsets are of that
    capture.
    """

    damaged: Sequence[Damage] = ()
    truncated: str | None = None
    unknown_events: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, reader: CaptureReader) -> End:
        """What `reader` says at the end of an iteration."""
        return cls(
            tuple(reader.damaged), reader.truncated, tuple(sorted(reader.unknown_events.items()))
        )

    def encode(self, groups: Sequence[int]) -> bytes:
        """As JSON, with the number of events in each row group."""
        return json.dumps({"groups": groups, **asdict(self)}, separators=(",", ":")).encode()


def _decode(text: bytes) -> tuple[End, tuple[int, ...]]:
    """`End` and the groups' sizes of checked text; raises ValueError, KeyError or TypeError."""
    said = json.loads(text)
    damaged = tuple(
        Damage(
            fmt.number(each["batch_index"]),
            None if each["events"] is None else fmt.number(each["events"]),
            fmt.number(each["offset"]),
            fmt.printable(each["reason"], 200),
        )
        for each in said["damaged"]
    )
    truncated = said["truncated"]
    unknown = tuple((fmt.number(kind), fmt.number(n)) for kind, n in said["unknown_events"])
    end = End(damaged, None if truncated is None else fmt.printable(truncated, 200), unknown)
    return end, tuple(fmt.number(rows) for rows in said["groups"])


class ParquetReader(CaptureReader):
    """A capture in a Parquet file.  Raises and tells what `CaptureReader` does."""

    def _read_header(self) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # By its number: the file that was checked, whatever its name is now.
        self._source = f"/dev/fd/{self._fd}"
        if self._read(max(self._size - 4, 0), min(4, self._size)) != fmt.PARQUET:
            raise CaptureError(
                f"{self.path} is a Parquet file that is cut or damaged at its end, where its index "
                "is: nothing can be read"
            )
        try:
            with pa.OSFile(self._source) as file:
                self._metadata_of_file = pq.read_metadata(file)
            fields = list(self._metadata_of_file.schema.to_arrow_schema())
            metadata = self._metadata_of_file.metadata or {}
        except _REFUSED:
            raise CaptureError(
                f"{self.path} is a Parquet file whose index is damaged: nothing can be read"
            ) from None
        if fmt.KEY not in metadata or fmt.KEY_CRC not in metadata:
            raise CaptureError(f"{self.path} is a Parquet file, but not a kvmprobe capture")
        columns = [(field.name, _code(field)) for field in fields]
        seed = fmt.header_crc(metadata[fmt.KEY], columns)
        end = metadata.get(fmt.KEY_END, b"")
        if metadata[fmt.KEY_CRC] != fmt.encode_crc(seed) or metadata.get(
            fmt.KEY_END_CRC
        ) != fmt.encode_crc(zlib.crc32(end, seed)):
            raise CaptureError(f"{self.path}: the header fails its checksum; the file is damaged")
        try:
            header = fmt.parse_header(metadata[fmt.KEY])
            self._places = fmt.places(columns, header["schema"]["minor"])
            self._end, self._groups = self._parse_end(end)
        except CaptureError as e:
            raise CaptureError(f"{self.path}: {fmt.printable(str(e), 200)}") from None
        return header

    def _parse_end(self, text: bytes) -> tuple[End, tuple[int, ...]]:
        try:
            end, groups = _decode(text)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CaptureError("what stands at its end is not understood") from None
        of_file = self._metadata_of_file
        if groups != tuple(of_file.row_group(i).num_rows for i in range(of_file.num_row_groups)):
            raise CaptureError("its row groups are not those it was written with; it is damaged")
        if not all(0 < rows <= GROUP for rows in groups):
            raise CaptureError("a row group has an impossible number of events")
        return end, groups

    def _walk(self) -> Iterator[Batch]:
        self.damaged = list(self._end.damaged)
        self.truncated = self._end.truncated
        self.unknown_events = dict(self._end.unknown_events)
        first = 0
        for index, events in enumerate(self._groups):
            group = self._metadata_of_file.row_group(index)
            chunk = group.column(0)
            offset = chunk.dictionary_page_offset or chunk.data_page_offset
            size = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
            yield Batch(index, first, events, (), offset, size)
            first += events

    def screened(
        self, columns: Sequence[str], further: Further
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """The events, as `batches(columns)`; a batch's other columns are read when asked for.

        `further` is given the columns of each batch and names others that will be needed, which are
        read ahead; it is called from several threads.  A column that can't be read when it is asked
        for is 0, and the batch is among `damaged`.

        What is not read is not checked: so only here, where each page has a checksum and damage is
        rare, not in recordings that an end of power may have cut.
        """
        return self._decode(self.infos(), tuple(columns), further)

    def _columns(self, batch: Batch, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        stored = [name for name in names if name in self._places]
        found = {
            name: np.zeros(batch.events, "<" + fmt.CODES[name])
            for name in names
            if name not in self._places
        }
        try:
            # One for each call: calls come from several threads.
            with pa.OSFile(self._source) as file:
                table = pq.ParquetFile(
                    file, metadata=self._metadata_of_file, page_checksum_verification=True
                ).read_row_group(batch.index, columns=stored, use_threads=False)
            for name in stored:
                found[name] = _values(table.column(name), np.dtype("<" + fmt.CODES[name]))
        except _REFUSED as e:
            reason = fmt.printable(str(e).partition("\n")[0], 100)
            raise MalformedError(f"the row group can't be read: {reason}") from None
        if any(len(column) != batch.events for column in found.values()):
            raise MalformedError("the row group has another number of events than it was made with")
        return found


def _code(field: Any) -> str:  # noqa: ANN401 - pyarrow has no types
    """The numpy type code of a column; what is no column of integers without nulls has none."""
    try:
        return "" if field.nullable else np.dtype(str(field.type)).str[1:]
    except TypeError:
        return ""


def _values(column: Any, dtype: np.dtype[Any]) -> NDArray[Any]:  # noqa: ANN401
    """A column as an array, without a copy where it is in one piece."""
    pieces = [
        np.frombuffer(chunk.buffers()[1], dtype, len(chunk), chunk.offset * dtype.itemsize)
        for chunk in column.chunks
        if len(chunk)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate([np.empty(0, dtype), *pieces])
