# SPDX-License-Identifier: MIT
"""Where the captures of a fleet lie: folders and object stores, by fsspec."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmprobe.errors import CaptureError, KvmprobeError, UsageError

#: What is missing where only the core is installed.
NEEDS = "`kvmprobe fleet` needs {}: pip install 'kvmprobe[fleet]'"
_SUFFIXES = (".kvmprobe", ".parquet")
#: What a file system raises for what is not there, not allowed or not reachable.
_REFUSED = (OSError, ValueError, ImportError)
_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, here and on every worker"
)
#: In what the AWS client says when it may not, or has nobody to be.
_DENIED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "HTTP status 403")


@dataclass(frozen=True)
class File:
    """A capture at rest.

    `version` changes when the file does: its time of change, or what the store has instead.
    `host` is the name of the folder that holds one host's files.
    """

    url: str
    host: str
    size: int
    version: str


def list_files(url: str) -> list[File]:
    """List the captures below a folder, sorted by name: FOLDER/HOST/…/FILE.

    Files that lie in the folder itself are of one host that has the folder's name.

    Args:
        url: a path, or a URL of a kind that fsspec knows; s3:// is read by pyarrow.

    Raises:
        KvmprobeError: it can't be listed, or has no capture.

    """
    system, root = _open_place(url)
    try:
        found = _find(system, root)
    except _REFUSED as error:
        raise KvmprobeError(f"can't list {url}: {_why(error)}") from None
    files = []
    for path, info in sorted(found.items()):
        inside = path[len(root.rstrip("/")) :].strip("/").split("/")
        if info["type"] != "file" or not path.endswith(_SUFFIXES):
            continue
        if any(part.startswith(".") for part in inside):
            continue  # not yet whole: files are written under such a name first
        folder = inside[0] if len(inside) > 1 else _folder_of(path)
        version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
        name = path if _is_local(system) else system.unstrip_protocol(path)
        files.append(File(name, folder, int(info["size"]), str(version)))
    if not files:
        raise KvmprobeError(f"{url} has no capture: nothing ends in {' or '.join(_SUFFIXES)}")
    return files


@contextlib.contextmanager
def local_copy(file: File, *, outline: bool = False) -> Iterator[Path]:
    """Give a file's path on this machine: itself, or a copy that goes with the context.

    Args:
        file: as listed.
        outline: only its begin and its end are wanted, what is between may be zeros.

    Raises:
        CaptureError: it can't be read.

    """
    system, path = _open_place(file.url)
    if _is_local(system):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="kvmprobe-fleet-") as folder:
        copy = Path(folder) / path.rpartition("/")[2]
        try:
            with system.open(path, "rb") as source, copy.open("wb") as target:
                if outline:
                    _copy_ends(source, target, file.size)
                else:
                    shutil.copyfileobj(source, target, 1 << 22)
        except _REFUSED as error:
            raise CaptureError(f"can't read {file.url}: {_why(error)}") from None
        yield copy


#: Both hold the whole of nearly every header and footer.
_HEAD, _TAIL = 1 << 16, 1 << 16


def _copy_ends(source: Any, target: Any, size: int) -> None:  # noqa: ANN401 - fsspec has no types
    """Copy what a reader needs to open a capture."""
    from kvmprobe.store import format as fmt

    head = source.read(_HEAD)
    if head[:4] == fmt.PARQUET:
        source.seek(max(size - 8, 0))
        wanted = max(_TAIL, int.from_bytes(source.read(4), "little") + 8)
        tail = max(size - wanted, 0)
    else:
        wanted = int.from_bytes(head[4:8], "little") + 8 if head[:4] == fmt.MESSAGE else 0
        head += source.read(max(0, min(wanted, fmt.MAX_METADATA) - len(head)))
        tail = size
    target.write(head)
    target.truncate(size)
    if tail > len(head):
        source.seek(tail)
        target.seek(tail)
        target.write(source.read())
    elif tail < size:
        source.seek(len(head))
        target.write(source.read())


def _open_place(url: str) -> tuple[Any, str]:
    """Return the file system of a path or a URL, and the path in it."""
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise KvmprobeError(NEEDS.format("fsspec")) from None
    kind, found, path = url.partition("://")
    try:
        # Not by url_to_fs(): to it, "::" in a name means another file system.
        if not found or not kind.isalnum():
            return fsspec.filesystem("file"), str(Path(url).absolute())
        if kind == "file":
            return fsspec.filesystem("file"), path
        if kind == "s3":
            return _s3(), path.rstrip("/")
        if "::" in url:
            raise ValueError('a name with "::" in it')
        system, path = fsspec.core.url_to_fs(url)
    except _REFUSED as error:
        raise UsageError(f"can't open {url}: {_why(error)}") from None
    return system, str(path)


def _s3() -> Any:  # noqa: ANN401 - fsspec has no types
    """Return S3 by pyarrow: s3fs holds back libraries that kvmprobe needs."""
    from fsspec.implementations.arrow import (  # type: ignore[import-untyped]
        ArrowFSWrapper,
    )
    from pyarrow import fs

    class S3(ArrowFSWrapper):  # type: ignore[misc]
        protocol = "s3"

    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return S3(
        fs.S3FileSystem(
            endpoint_override=address, region=region, connect_timeout=10, request_timeout=60
        )
    )


def _find(system: Any, root: str) -> dict[str, Any]:  # noqa: ANN401
    """List what is below a path, name -> type, size and time."""
    if getattr(system, "protocol", None) != "s3":
        if not system.exists(root):
            raise FileNotFoundError("there is no such folder")
        return dict(system.find(root, detail=True))
    from pyarrow import fs

    # fsspec would ask once for each folder.
    infos = system.fs.get_file_info(fs.FileSelector(root, recursive=True))
    return {
        info.path: {"type": "file", "size": info.size, "mtime": info.mtime_ns}
        for info in infos
        if info.type == fs.FileType.File
    }


def _is_local(system: Any) -> bool:  # noqa: ANN401
    return "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))


def _folder_of(path: str) -> str:
    parts = [part for part in path.split("/")[:-1] if part]
    return parts[-1] if parts else "host"


def _why(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    if any(word in text for word in _DENIED):
        return f"access denied or no credentials; {_CREDENTIALS}"
    if "AWS Error" in text and not _has_credentials():
        return f"there are no credentials; {_CREDENTIALS}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text or type(error).__name__


def _has_credentials() -> bool:
    """Whether there is anything that a client of AWS takes for credentials, beside a role."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN")
    given = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws/credentials"
    return any(os.environ.get(name) for name in names) or Path(given).exists()
