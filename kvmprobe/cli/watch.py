# SPDX-License-Identifier: MIT
"""`kvmprobe watch`: the service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmprobe.cli.target import Backend

if TYPE_CHECKING:
    from kvmprobe.watch.config import Config


def watch(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="The configuration.  [default: /etc/kvmprobe/watch.toml, if any]"
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen", help='ADDRESS:PORT of the metrics, "" for none.  [default: 127.0.0.1:9973]'
        ),
    ] = None,
    state_directory: Annotated[
        Path | None,
        typer.Option(
            "--state-directory", help="Findings and evidence.  [default: /var/lib/kvmprobe]"
        ),
    ] = None,
    runtime_directory: Annotated[
        Path | None,
        typer.Option("--runtime-directory", help="The status file.  [default: /run/kvmprobe]"),
    ] = None,
    backend: Backend = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Say whether the configuration is good; no more.")
    ] = False,
) -> None:
    """Watch this host's KVM until SIGTERM or Ctrl-C: metrics, findings, evidence.  Needs root.

    On a terminal it shows VMs, vCPUs and findings as they come; elsewhere it prints a line for what
    is new.

    Options outrank the configuration file.  SIGHUP reads the file again.  SIGUSR1 detaches, so that
    KVM's modules can be unloaded, until SIGHUP.
    """
    overrides: dict[str, Any] = {
        "state_directory": _absolute(state_directory),
        "runtime_directory": _absolute(runtime_directory),
        "backend": backend,
        "metrics": None if listen is None else {"listen": listen},
    }
    overrides = {key: value for key, value in overrides.items() if value is not None}

    def read() -> Config:
        from kvmprobe.watch.config import load

        return load(config, overrides)

    wanted = read()
    if check_config:
        from kvmprobe.watch.config import CONFIG_FILE, today

        print(f"{config or CONFIG_FILE}: good")
        for entry in wanted.expired(today()):
            print(f"expired on {entry.expires}: the ignore of {entry.rule} on {entry.vm!r}")
        return
    from kvmprobe.cli.live import on_terminal
    from kvmprobe.watch.service import Service

    if not on_terminal():
        Service(wanted, read).run()
        return
    from kvmprobe.cli.watchview import WatchView

    with WatchView() as view:
        Service(wanted, read, view).run()


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
