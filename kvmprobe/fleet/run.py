# SPDX-License-Identifier: MIT
"""A fleet's analysis from its files to its result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvmprobe.fleet.cluster import connect, each
from kvmprobe.fleet.host import Host, analyze_host
from kvmprobe.fleet.hosts import hosts_of
from kvmprobe.fleet.places import File, list_files
from kvmprobe.fleet.progress import Progress, tell
from kvmprobe.fleet.results import Results
from kvmprobe.fleet.survey import Surveyed, survey

#: Files that a worker looks at in one task.
_FILES = 64


def analyze_fleet(
    places: Sequence[str], output: Path, scheduler: str | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Analyse all captures below some places, and write the result; returns its summary.

    What an earlier run to the same folder did is not done again, unless its files changed.

    Args:
        places: folders or URLs, as `places.list_files` takes them.
        output: the folder of the result.
        scheduler: as `cluster.connect` takes it.
        workers: as `cluster.connect` takes it.

    Raises:
        KvmprobeError: there is nothing to analyse, nowhere to do so or nowhere to write to.

    """
    files = list(dict.fromkeys(file for place in places for file in list_files(place)))
    with Results(output) as results:
        known = {
            (s.file.url, s.file.size, s.file.version): s
            for result in results.all()
            for s in map(Surveyed.from_json, result["inputs"])
        }
        surveyed = [known.get((f.url, f.size, f.version)) for f in files]
        new = [f for f, s in zip(files, surveyed, strict=True) if s is None]
        hosts = [] if new else hosts_of(s for s in surveyed if s is not None)
        if not new and all(results.done(host) for host in hosts):
            return results.finish(hosts, {}, tell)
        with connect(scheduler, workers) as client:
            looked = [s for s in surveyed if s is not None]
            for batch, found in each(client, survey, _batches(new)):
                looked += _broken(batch, found) if isinstance(found, Exception) else found
            hosts = hosts_of(looked)
            failed = _analyze(client, results, hosts)
        return results.finish(hosts, failed, tell)


def _batches(files: list[File]) -> Iterator[list[File]]:
    for start in range(0, len(files), _FILES):
        yield files[start : start + _FILES]


def _broken(files: Iterable[File], error: Exception) -> list[Surveyed]:
    """Stand in for what a worker that died could not say."""
    from kvmprobe.fleet.survey import Facts

    return [Surveyed(file, Facts(problem=_why(error))) for file in files]


def _analyze(client: Any, results: Results, hosts: list[Host]) -> dict[str, str]:  # noqa: ANN401
    """Analyse what is not done yet; returns why a host failed, by its id."""
    failed = {}
    wanted = [host for host in hosts if results.done(host) is None]
    with Progress(sum(host.size for host in wanted), len(wanted)) as progress:
        if len(wanted) < len(hosts):
            tell(f"{len(hosts) - len(wanted):,} hosts are done already")
        for host, result in each(client, analyze_host, wanted):
            if isinstance(result, Exception):
                failed[host.id] = _why(result)
            else:
                results.keep(result)
            progress.done(host.size)
    return failed


def _why(error: Exception) -> str:
    return f"the analysis failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
