# SPDX-License-Identifier: MIT
"""A capture as a Parquet file: the columns of the event schema as they are.

`kvmprobe.store.parquet` reads it back.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes import schema
from kvmprobe.store import format as fmt
from kvmprobe.store.parquet import GROUP, End

#: All integers have their bytes split apart, in which lz4 sees what is regular.  Against
#: dictionaries, deltas and zstd that costs 3 of 13 bytes an event, and takes half the time to write
#: and to read.
_ENCODING = "BYTE_STREAM_SPLIT"


class ParquetWriter:
    """Writes batches as row groups of half a million events."""

    def __init__(self, file: BinaryIO, header: Mapping[str, Any]) -> None:
        """Begin the file; `header` becomes its metadata, key "kvmprobe", as JSON."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa = pa
        text = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
        self._seed = fmt.header_crc(text, fmt.CODES.items())
        self._schema = schema.arrow_schema().with_metadata(
            {fmt.KEY: text, fmt.KEY_CRC: fmt.encode_crc(self._seed)}
        )
        self._stream = pq.ParquetWriter(
            file,
            self._schema,
            compression="lz4",
            use_dictionary=False,
            column_encoding={f.name: _ENCODING for f in schema.FIELDS},
            store_schema=True,
            write_page_checksum=True,
        )
        self._columns = {f.name: np.empty(GROUP, f.dtype) for f in schema.FIELDS}
        self._used = 0
        self._groups: list[int] = []

    def write(self, columns: schema.Columns) -> int:
        """Take in one batch; returns how many events it has."""
        rows = len(columns["ts"])
        done = 0
        while done < rows:
            count = min(rows - done, GROUP - self._used)
            for name, group in self._columns.items():
                group[self._used : self._used + count] = columns[name][done : done + count]
            self._used += count
            done += count
            if self._used == GROUP:
                self._flush()
        return rows

    def close(self, end: End | None = None) -> None:
        """Write what is left, and the file's footer.

        `end` says what could not be read of the capture that the events come from, if that is not
        told by the events themselves.
        """
        self._flush()
        text = (end or End()).encode(self._groups)
        self._stream.add_key_value_metadata(
            {fmt.KEY_END: text, fmt.KEY_END_CRC: fmt.encode_crc(zlib.crc32(text, self._seed))}
        )
        self._stream.close()

    def abandon(self) -> None:
        """Let go of a file that could not be written to."""
        with contextlib.suppress(OSError):
            self._stream.close()

    def _flush(self) -> None:
        if self._used:
            columns = {name: group[: self._used] for name, group in self._columns.items()}
            self._stream.write_batch(self._batch(columns), row_group_size=GROUP)
            self._groups.append(self._used)
            self._used = 0

    def _batch(self, columns: dict[str, NDArray[Any]]) -> Any:  # noqa: ANN401 - pyarrow has no types
        pa = self._pa
        # Not pa.array(): it imports pandas.
        arrays = [
            pa.Array.from_buffers(
                f.type, len(columns[f.name]), [None, pa.py_buffer(columns[f.name])]
            )
            for f in self._schema
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)
