# SPDX-License-Identifier: MIT
"""`kvmprobe ack`: findings of a watch that nobody has taken note of yet."""

from __future__ import annotations

import os
import pwd
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmprobe.errors import HostError, UsageError

if TYPE_CHECKING:
    from kvmprobe.watch.latch import Acknowledgement, Latches

#: Seconds for which a running watch is given time to take an acknowledgement.
_WAIT_SECONDS = 5.0
_MAX_REASON = 400


def ack(
    finding: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="The finding; without it, list all.")
    ] = None,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Why it is settled: kept in the log.")
    ] = None,
    state_directory: Annotated[
        Path | None,
        typer.Option("--state-directory", help="The watch's.  [default: /var/lib/kvmprobe]"),
    ] = None,
) -> None:
    """Acknowledge a finding of `kvmprobe watch`, so that it raises no alarm; or list them.

    If the fault is seen on that VM again, it is a new finding.  Needs root.
    """
    from kvmprobe.watch.config import STATE_DIRECTORY
    from kvmprobe.watch.latch import Acknowledgement, Latches, check_id
    from kvmprobe.watch.output import wall
    from kvmprobe.watch.status import boot_id

    directory = state_directory or STATE_DIRECTORY
    if finding is None and reason is not None:
        raise UsageError("--reason needs the ID of a finding; kvmprobe ack lists them")
    if finding is not None:
        check_id(finding)
        if reason is None or not reason.strip() or len(reason) > _MAX_REASON:
            raise UsageError(f"say --reason, in 1 to {_MAX_REASON} characters: it is kept")
    _check_readable(directory)
    latches = Latches(directory, boot_id())
    if latches.damaged:
        raise HostError(latches.damaged)
    if finding is None or reason is None:
        _list(latches)
        return
    if finding not in latches.kept:
        raise UsageError(f"no finding has the id {finding}; kvmprobe ack lists them")
    _acknowledge(directory, Acknowledgement(finding, reason.strip(), _user(), wall()))


def _check_readable(directory: Path) -> None:
    try:
        os.scandir(directory).close()
    except FileNotFoundError:
        raise HostError(
            f"{directory} does not exist: no kvmprobe watch has run; see --state-directory"
        ) from None
    except OSError as error:
        raise HostError(f"can't read {directory}: {error.strerror}; run as root") from None


def _list(latches: Latches) -> None:
    from kvmprobe.analysis.vms import printable
    from kvmprobe.cli.tables import columns
    from kvmprobe.watch.latch import worst_rule

    rows = [
        (
            each.id,
            each.severity,
            worst_rule(each),
            f"{each.count:,}",
            each.first,
            printable(each.vm or "-"),
        )
        for each in latches.kept.values()
    ]
    if rows:
        print("\n".join(columns([("ID", "SEVERITY", "RULE", "COUNT", "FIRST", "VM"), *rows])))
    else:
        print("no finding of this boot waits to be acknowledged")


def _acknowledge(directory: Path, acknowledgement: Acknowledgement) -> None:
    from kvmprobe.watch.latch import request_ack

    try:
        path = request_ack(directory, acknowledgement)
    except OSError as error:
        raise HostError(f"can't write to {directory}: {error.strerror}; run as root") from None
    end = time.monotonic() + _WAIT_SECONDS
    while path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    if path.exists():
        print(f"{acknowledgement.id}: noted; the next kvmprobe watch takes it: none runs now")
    else:
        print(f"{acknowledgement.id}: acknowledged")


def _user() -> str:
    """Who called: through sudo, the user behind it."""
    name = os.environ.get("SUDO_USER")
    if name is None or os.geteuid() != 0:
        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            name = str(os.getuid())
    return name[:64]
