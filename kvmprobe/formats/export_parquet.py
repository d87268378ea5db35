# SPDX-License-Identifier: MIT
"""A capture as a Parquet file: the columns of the event schema as they are."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes import schema

#: Events in a row group: 28 MiB before they are compressed.
_GROUP = 1 << 19
#: Times only grow, and their steps are small; addresses and values are the wild columns, and
#: splitting their bytes apart lets the compressor see what is regular in them.
_ENCODING = {
    "ts": "DELTA_BINARY_PACKED",
    "seq": "DELTA_BINARY_PACKED",
    "gen": "DELTA_BINARY_PACKED",
    "addr": "BYTE_STREAM_SPLIT",
    "value": "BYTE_STREAM_SPLIT",
}


class ParquetWriter:
    """Writes batches as row groups of half a million events."""

    def __init__(self, file: BinaryIO, header: Mapping[str, Any]) -> None:
        """Begin the file; `header` becomes its metadata, key "kvmprobe", as JSON."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa = pa
        text = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
        self._schema = schema.arrow_schema().with_metadata({"kvmprobe": text})
        self._stream = pq.ParquetWriter(
            file,
            self._schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[f.name for f in schema.FIELDS if f.name not in _ENCODING],
            column_encoding=_ENCODING,
            store_schema=True,
        )
        self._columns = {f.name: np.empty(_GROUP, f.dtype) for f in schema.FIELDS}
        self._used = 0

    def write(self, columns: schema.Columns) -> int:
        """Take in one batch; returns how many events it has."""
        rows = len(columns["ts"])
        done = 0
        while done < rows:
            count = min(rows - done, _GROUP - self._used)
            for name, group in self._columns.items():
                group[self._used : self._used + count] = columns[name][done : done + count]
            self._used += count
            done += count
            if self._used == _GROUP:
                self._flush()
        return rows

    def close(self) -> None:
        """Write what is left, and the file's footer."""
        self._flush()
        self._stream.close()

    def abandon(self) -> None:
        """Let go of a file that could not be written to."""
        with contextlib.suppress(OSError):
            self._stream.close()

    def _flush(self) -> None:
        if self._used:
            columns = {name: group[: self._used] for name, group in self._columns.items()}
            self._stream.write_batch(self._batch(columns), row_group_size=_GROUP)
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
