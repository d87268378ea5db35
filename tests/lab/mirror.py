# SPDX-License-Identifier: MIT
"""Where Debian's packages come from: read from this machine's own apt sources."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.lab.base import MissingError, find_program, run_program

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_RELEASE_FILE = re.compile(r"^'(?P<uri>\S+)/dists/(?P<suite>[^/\s]+)/(?:In)?Release'", re.M)
_PRIMARY = frozenset({"bullseye", "bookworm", "trixie", "forky", "sid", "stable", "testing"})
_ROLLING = frozenset({"sid", "unstable"})


@dataclass(frozen=True)
class Mirror:
    """The addresses of the Debian archive and, where the machine has one, its security archive."""

    archive: str
    security: str | None

    def sources(self, release: str) -> str:
        """Return an apt sources list for a release such as "trixie"; "sid" has only itself."""
        signed = f"[signed-by={KEYRING}]"
        lines = [f"deb {signed} {self.archive} {release} main"]
        if release not in _ROLLING:
            lines += [
                f"deb {signed} {self.archive} {release}-{pocket} main"
                for pocket in ("updates", "backports")
            ]
            if self.security:
                lines.append(f"deb {signed} {self.security} {release}-security main")
        return "\n".join(lines) + "\n"


def parse_uris(text: str) -> Mirror:
    """Return the mirror named by the output of `apt-get update --print-uris`.

    Third-party sources are told apart by their suites.  Raises MissingError when no source is
    Debian's.
    """
    archive = security = None
    for match in _RELEASE_FILE.finditer(text):
        uri, suite = match["uri"], match["suite"]
        if suite in _PRIMARY and archive is None:
            archive = uri
        elif suite.endswith("-security") and suite.split("-")[0] in _PRIMARY and security is None:
            security = uri
    if archive is None:
        raise MissingError("apt's sources name no Debian mirror; the lab needs a Debian machine")
    return Mirror(archive, security)


def read_mirror() -> Mirror:
    """Ask apt for this machine's sources, whatever format they are written in."""
    apt = find_program("apt-get", "apt")
    return parse_uris(run_program([apt, "update", "--print-uris"]))
