# SPDX-License-Identifier: MIT
"""Packages of any Debian release, through apt with lists of its own.

The machine's package lists, state and preferences are neither read nor changed.
"""

import functools
import re
import time
from dataclasses import dataclass
from pathlib import Path

from tests.lab.base import LabError, MissingError, cache_dir, find_program, run_program, say
from tests.lab.mirror import KEYRING, read_mirror

_LISTS_KEPT_SECONDS = 24 * 3600
_PRINTED = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) \d+ SHA256:(?P<sha>[0-9a-f]{64})", re.M)


@dataclass(frozen=True)
class Package:
    """One binary package of an exact version; `depends` holds (name, exact version or None)."""

    name: str
    version: str
    depends: tuple[tuple[str, str | None], ...]


class GoneError(MissingError):
    """The mirror answers and holds no such package, or not any more."""


class Release:
    """The packages of one Debian release: "bookworm", "trixie", "sid"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._root = cache_dir() / "apt" / name

    def _options(self) -> list[str]:
        root = self._root
        values = {
            "Dir::Etc::sourcelist": root / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": root / "state",
            "Dir::State::lists": root / "lists",
            "Dir::State::status": root / "status",
            "Dir::Cache": root / "cache",
            # Debian's container images switch it off: lists would be parsed at each call.
            "Dir::Cache::pkgcache": "pkgcache.bin",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        return [part for key, value in values.items() for part in ("-o", f"{key}={value}")]

    def refresh(self) -> None:
        """Fetch the release's package lists unless those in the cache are from today.

        Lists that can't be fetched are an error only when there are none at all.
        """
        stamp = self._root / "fetched"
        age = time.time() - stamp.stat().st_mtime if stamp.exists() else float("inf")
        if age < _LISTS_KEPT_SECONDS:
            return
        if not KEYRING.exists():
            raise MissingError(f"{KEYRING} is missing; apt-get install debian-archive-keyring")
        for folder in ("lists/partial", "state", "cache/archives/partial"):
            (self._root / folder).mkdir(parents=True, exist_ok=True)
        (self._root / "status").touch()
        (self._root / "sources.list").write_text(read_mirror().sources(self.name))
        try:
            # Without the mode apt-get ends with 0 when it can't reach the mirror.
            strict = ["-q", "-o", "APT::Update::Error-Mode=any", "update"]
            run_program([find_program("apt-get", "apt"), *self._options(), *strict])
        except LabError as error:
            if not stamp.exists():
                raise MissingError(f"no package lists of {self.name}: {error}") from None
            say(f"the package lists of {self.name} are old: {error}")
            return
        stamp.touch()

    def show(self, name: str, version: str | None = None) -> Package:
        """Return a package's exact version and its dependencies.

        Raises GoneError when the release doesn't hold it (any more), MissingError when there are no
        package lists.
        """
        self.refresh()
        wanted = f"{name}={version}" if version else name
        command = [find_program("apt-cache", "apt"), *self._options()]
        try:
            text = _ask((*command, "show", "--no-all-versions", wanted))
        except LabError:
            raise GoneError(f"{self.name} on the mirror holds no package {wanted}") from None
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", text, re.M))
        return Package(name, fields["Version"], tuple(_parse_depends(fields.get("Depends", ""))))

    def fetch(self, package: Package) -> Path:
        """Return the package's file, downloaded (and its hash checked, by apt) if need be."""
        wanted = f"{package.name}={package.version}"
        command = [find_program("apt-get", "apt"), *self._options(), "-q"]
        match = _PRINTED.search(run_program([*command, "download", "--print-uris", wanted]))
        if match is None:
            raise LabError(f"apt names no file for {wanted}; remove {self._root} and try again")
        folder = cache_dir() / "debs" / match["sha"][:16]
        path = folder / match["file"]
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                run_program([*command, "download", wanted], cwd=folder)
            except LabError as error:
                kind = GoneError if "404" in str(error) else MissingError
                raise kind(f"{wanted} could not be downloaded: {error}") from None
        return path


@functools.cache
def _ask(command: tuple[str, ...]) -> str:
    return run_program([*command])


def _parse_depends(field: str) -> list[tuple[str, str | None]]:
    """Return (name, exact version or None) of each dependency's first alternative."""
    found = []
    for clause in field.split(","):
        match = re.match(r"\s*([a-z0-9][a-z0-9+.-]*)(?::\w+)?\s*(?:\(= ([^)]+)\))?", clause)
        if match:
            found.append((match[1], match[2]))
    return found
