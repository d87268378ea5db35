# SPDX-License-Identifier: MIT
"""What kind of trace a file is, by its content; gzip, xz and zstd are read through."""

from __future__ import annotations

import lzma
import tempfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from kvmprobe.errors import CaptureError
from kvmprobe.formats import perfdata, perfscript, tracedat_header
from kvmprobe.formats.ftrace import Readable

_PIECE = 1 << 18
#: Output of zstd is taken in small pieces: what precedes damage is lost with the piece it is in.
_ZSTD_PIECE = 1 << 14
_XZ_MEMORY = 512 << 20
#: A trace that must be unpacked to a temporary file may become so large.
_MAX_UNPACKED = 32 << 30
_CAPTURE = b"\xff\xff\xff\xff"


class _Unpacker(Protocol):
    """The decompressor objects of zlib and lzma, as far as they agree."""

    @property
    def eof(self) -> bool:
        """Whether its end was reached."""

    @property
    def unused_data(self) -> bytes:
        """What follows the end."""

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """The next bytes."""


class _Packed:
    """A gzip or xz file, unpacked as it is read; several streams may follow each other."""

    def __init__(self, file: BinaryIO, gzip: bool) -> None:
        self._file = file
        self._gzip = gzip
        self._unpacker = self._new()
        self._data = b""

    def _new(self) -> _Unpacker:
        if self._gzip:
            return zlib.decompressobj(31)
        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; raises CaptureError when the file is damaged or cut."""
        while True:
            if self._unpacker.eof:
                self._data = self._unpacker.unused_data or self._file.read(_PIECE)
                # xz pads with zeros.
                if not self._data.strip(b"\0"):
                    return b""
                self._unpacker = self._new()
            elif not self._data and getattr(self._unpacker, "needs_input", True):
                self._data = self._file.read(_PIECE)
                if not self._data:
                    raise self._error()
            try:
                out = self._unpacker.decompress(self._data, size)
            except (zlib.error, lzma.LZMAError, EOFError, MemoryError):
                raise self._error() from None
            self._data = getattr(self._unpacker, "unconsumed_tail", b"")
            if out:
                return out

    def _error(self) -> CaptureError:
        return CaptureError(f"compressed data is damaged or cut before byte {self._file.tell()}")


class _Zstd:
    """A zstd file, unpacked as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        import pyarrow as pa

        self._file = file
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")

    def read(self, size: int, /) -> bytes:
        try:
            data: bytes = self._stream.read(min(size, _ZSTD_PIECE))
        except (OSError, ValueError):
            raise CaptureError(
                f"compressed data is damaged or cut before byte {self._file.tell()}"
            ) from None
        return data


class _Peeked:
    """A stream whose first bytes were looked at."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.head = b""
        while len(self.head) < _PIECE and (data := self._more()):
            self.head += data
        self._rest = self.head

    def _more(self) -> bytes:
        try:
            return self._stream.read(_PIECE)
        except CaptureError:
            if not self.head:
                raise
            # It is met again when the rest is read.
            return b""

    def read(self, size: int, /) -> bytes:
        if self._rest:
            data, self._rest = self._rest[:size], self._rest[size:]
            return data
        return self._stream.read(size)


class Source(NamedTuple):
    """A trace: its kind ("trace.dat", "perf.data", "perf script" or "ftrace") and its content.

    `file` is seekable for the first two, and a stream for text.
    """

    kind: str
    file: BinaryIO
    stream: Readable


def open_trace(path: Path) -> Source:
    """Open a trace and see what it is.

    Raises:
        CaptureError: it can't be read, or is no trace.

    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise CaptureError(f"can't read {path}: {error.strerror}") from error
    try:
        return detect(path, file)
    except OSError as error:
        file.close()
        raise CaptureError(f"can't read {path}: {error.strerror}") from error
    except BaseException:
        file.close()
        raise


def detect(path: Path, file: BinaryIO) -> Source:
    """See what an open file is; `path` names it in errors.  Raises CaptureError, OSError."""
    first = file.peek(6)[:6] if hasattr(file, "peek") else b""
    stream: Readable = file
    packed = True
    if first.startswith(b"\x1f\x8b"):
        stream = _Packed(file, gzip=True)
    elif first.startswith(b"\xfd7zXZ\0"):
        stream = _Packed(file, gzip=False)
    elif first.startswith(b"\x28\xb5\x2f\xfd"):
        stream = _Zstd(file)
    else:
        packed = False
    try:
        peeked = _Peeked(stream)
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}") from error
    kind = _kind(path, peeked.head)
    if kind in ("trace.dat", "perf.data"):
        if packed or not file.seekable():
            file = _spool(path, peeked)
        file.seek(0)
    return Source(kind, file, peeked)


def _kind(path: Path, head: bytes) -> str:
    if head.startswith(tracedat_header.MAGIC):
        return "trace.dat"
    if head.startswith(perfdata.MAGIC):
        return "perf.data"
    if head.startswith(_CAPTURE):
        raise CaptureError(f"{path} is a capture of kvmprobe already; use kvmprobe analyze")
    if not head:
        raise CaptureError(f"{path} is empty")
    if b"\0" in head[:4096]:
        raise CaptureError(f"{path} is no trace that is known: neither ftrace text nor trace.dat "
                           "nor perf.data")  # fmt: skip
    return "perf script" if perfscript.is_perf_script(head) else "ftrace"


def _spool(path: Path, stream: Readable) -> BinaryIO:
    """Unpack to a file that has no name: the formats with a header are read here and there."""
    spool: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed by who reads it
    try:
        while data := stream.read(1 << 20):
            spool.write(data)
            if spool.tell() > _MAX_UNPACKED:
                raise CaptureError(f"{path} unpacks to more than {_MAX_UNPACKED >> 30} GiB")
    except CaptureError:
        # What was unpacked so far ends early; its reader says where, or salvages it.
        if spool.tell() > _MAX_UNPACKED:
            raise
    return spool
