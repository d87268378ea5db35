# SPDX-License-Identifier: MIT
"""Which files belong to which host."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from kvmprobe.fleet.host import Host
from kvmprobe.fleet.survey import Surveyed

#: Digits of a machine's hash that tell hosts of one name apart.
_SHORT = 8


def hosts_of(surveyed: Iterable[Surveyed]) -> list[Host]:
    """Group files into hosts, the largest first.

    A host is a machine, as the captures' headers name it, wherever its files lie.  Files that name
    none belong to the machine of their folder if that has one machine, and else are a host of the
    folder's name.
    """
    by_folder: dict[str, list[Surveyed]] = {}
    for each in surveyed:
        by_folder.setdefault(each.file.host, []).append(each)
    by_machine: dict[str, list[Surveyed]] = {}
    nameless: dict[str, list[Surveyed]] = {}
    machines_in: dict[str, list[str]] = {}
    for folder, files in by_folder.items():
        machines = list(dict.fromkeys(f.facts.machine for f in files if f.facts.machine))
        machines_in[folder] = machines
        for each in files:
            machine = each.facts.machine or (machines[0] if len(machines) == 1 else None)
            if machine is None:
                nameless.setdefault(folder, []).append(each)
            else:
                by_machine.setdefault(machine, []).append(each)
    hosts = [_of_machine(machine, files, machines_in) for machine, files in by_machine.items()]
    hosts += [_of_folder(folder, files) for folder, files in nameless.items()]
    # The largest first: else one could be left over at the end that all others wait for.
    return sorted(hosts, key=lambda host: (-host.size, host.name, host.id))


def _of_machine(machine: str, files: list[Surveyed], machines_in: dict[str, list[str]]) -> Host:
    folders = sorted({each.file.host for each in files})
    name, notes = folders[0], []
    if len(folders) > 1:
        notes.append(f"one machine has files under {len(folders)} names: {_listed(folders)}")
    if len(machines_in[name]) > 1:
        number = len(machines_in[name])
        notes.append(f"{number} machines are called {name}: they are told apart by their id")
        name = f"{name} ({machine[:_SHORT]})"
    return _host(f"machine {machine}", name, machine, files, notes)


def _of_folder(folder: str, files: list[Surveyed]) -> Host:
    roots = {each.file.url.rpartition(f"/{folder}/")[0] for each in files}
    notes = []
    if len(roots) > 1:
        notes.append(f"{folder} is in {len(roots)} places and names no machine: taken for one host")
    return _host(f"folder {folder}", folder, None, files, notes)


def _host(
    key: str, name: str, machine: str | None, files: list[Surveyed], notes: Sequence[str]
) -> Host:
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    schemas = sorted({each.facts.schema for each in files if each.facts.schema})
    more = [f"files of {len(schemas)} schema versions: {', '.join(schemas)}"] * (len(schemas) > 1)
    ordered = tuple(sorted(files, key=lambda each: each.file.url))
    return Host(digest, name, machine, ordered, (*notes, *more))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
