# SPDX-License-Identifier: MIT
"""The result of a fleet's analysis: a folder with a file for each host, and tables of all.

fleet.json          what kvmprobe made it, and the summary
hosts/ID.json       the result of one host and the files it was made of: what is done
hosts.parquet, verdicts.parquet, findings.parquet, losses.parquet
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from kvmprobe import __version__
from kvmprobe.errors import CaptureError, KvmprobeError
from kvmprobe.fleet.host import FORMAT, Host, empty_result
from kvmprobe.store import lock
from kvmprobe.store.files import create_output

SCHEMA = "kvmprobe.fleet/1"
#: Problems and notes that are told; all are in the table of hosts.
TOLD = 20
_SUMMARY = "fleet.json"
_HOSTS = "hosts"


class Results:
    """The folder of a result, for one run at a time: a context."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, or take up what is there.

        Raises KvmprobeError when it is something else, or another run uses it.
        """
        self.folder = folder
        try:
            there = [name.name for name in folder.iterdir()] if folder.exists() else []
            if there and lock.NAME not in there:
                raise KvmprobeError(f"{folder} is no result of kvmprobe fleet; name another folder")
            (folder / _HOSTS).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = lock.DirectoryLock(folder)
        except BlockingIOError:
            raise KvmprobeError(f"another kvmprobe fleet writes to {folder}") from None
        except OSError as error:
            raise KvmprobeError(f"can't use the folder {folder}: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def load(self, host_id: str) -> dict[str, Any] | None:
        """Return a host's result of this or an earlier run; None: there is none that counts."""
        return _read(self.folder / _HOSTS / f"{host_id}.json")

    def done(self, host: Host) -> dict[str, Any] | None:
        """Return a host's result if it was made of the very files that the host has now."""
        result = self.load(host.id)
        if result is None or result["inputs"] != [each.to_json() for each in host.files]:
            return None
        return result

    def all(self) -> Iterator[dict[str, Any]]:
        """Give every host's result that is there, of whatever run."""
        for path in sorted((self.folder / _HOSTS).glob("*.json")):
            result = _read(path)
            if result is not None:
                yield result

    def keep(self, result: Mapping[str, Any]) -> None:
        """Write a host's result: whole, or not at all."""
        path = self.folder / _HOSTS / f"{result['id']}.json"
        with create_output(path, force=True) as file:
            file.write(json.dumps(result, separators=(",", ":")).encode())

    def finish(
        self,
        hosts: Iterable[Host],
        failed: Mapping[str, str],
        tell: Callable[[str], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Write the tables and the summary of these hosts; returns the summary.

        Args:
            hosts: all hosts of the run.
            failed: why a host has no result, by its id.
            tell: called with a line for each problem and note, up to `TOLD`.

        """
        from kvmprobe.fleet.summary import Summary
        from kvmprobe.fleet.tables import Tables

        summary, told = Summary(), 0
        with contextlib.ExitStack() as opened:
            tables = opened.enter_context(Tables(self.folder))
            for host in sorted(hosts, key=lambda host: (host.name, host.id)):
                result = None if host.id in failed else self.load(host.id)
                if result is None:
                    result = empty_result(host, failed.get(host.id, "it was not analysed"))
                # A name and what is noted of it may come from files of other hosts.
                result |= {"name": host.name, "notes": [*host.notes, *result["notes"]]}
                tables.add(result)
                summary.add(result)
                for line in (*result["problems"], *result["notes"]):
                    told += 1
                    if told <= TOLD:
                        tell(f"{host.name}: {line}")
        if told > TOLD:
            tell(f"{told - TOLD:,} more of that kind: see {self.folder / 'hosts.parquet'}")
        document = {"schema": SCHEMA, "version": __version__, **summary.document()}
        with create_output(self.folder / _SUMMARY, force=True) as file:
            file.write(json.dumps(document, indent=1).encode())
        return document


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished result; raises CaptureError when there is none."""
    try:
        document = json.loads((folder / _SUMMARY).read_bytes())
        if document["schema"] != SCHEMA:
            raise CaptureError(
                f"{folder} was made by another kvmprobe ({document['schema']}); analyse again"
            )
    except FileNotFoundError:
        raise CaptureError(
            f"{folder} has no finished result; make one with `kvmprobe fleet analyze -o {folder}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CaptureError(f"{folder / _SUMMARY} can't be read; analyse again") from None
    return dict(document)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        return None
    return result if result.get("version") == __version__ else None
