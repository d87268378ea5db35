# SPDX-License-Identifier: MIT
"""A running watch on a terminal: its VMs, vCPUs, verdicts and findings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from kvmprobe.cli.liveview import COLOURS, View, counts
from kvmprobe.watch.status import Latched, Status

#: A picture may take this part of the time; the flight recorder grows with the vCPUs.
_SHARE = 0.05


class WatchView:
    """Draws a watch on stderr, below what the watch says there."""

    def __init__(self) -> None:
        """Draw nothing yet."""
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._view = View()
        self._shown = time.monotonic()
        self._cost = 0.0

    def __enter__(self) -> WatchView:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)

    def begin(self) -> None:
        """Forget all vCPUs: probes were attached, and VMs are numbered from 1."""
        self._view = View()

    def feed(self, rows: NDArray[Any]) -> None:
        """Take in what a drain gave: rows of dtype `schema.EVENT`."""
        if len(rows):
            self._view.feed(rows)

    def show(self, status: Status, flight: Callable[[], NDArray[Any]]) -> None:
        """Bring the picture up to date.

        Args:
            status: the watch's own; names in it are printable.
            flight: gives the flight recorder's events, see `View.sample`.

        """
        now = time.monotonic()
        if (now - self._shown) * _SHARE < self._cost:
            return
        picture = self.picture(
            status, flight(), max(now - self._shown, 1e-3), self._live.console.size.height
        )
        self._live.update(picture, refresh=True)
        self._shown, self._cost = now, time.monotonic() - now

    def picture(
        self, status: Status, flight: NDArray[Any], seconds: float, height: int
    ) -> RenderableType:
        """What to show.

        Args:
            status: the watch's own.
            flight: the flight recorder's events, see `View.sample`.
            seconds: since the last picture.
            height: lines of the terminal.

        """
        self._view.sample(flight)
        self._view.keep({vm.id for vm in status.vms})
        findings = sorted(status.findings, key=lambda each: each.last)
        verdicts = {vm.id: vm.verdict for vm in status.vms}
        return self._view.picture(_head(status), findings, _line, seconds, height, verdicts)


def _head(status: Status) -> list[Text]:
    """One line of counts, one for the verdict, and one for what is missing, if anything is."""
    vms = len(status.vms) + status.vms_left_out
    line = (
        f"{status.seconds:.0f} s  {vms:,} VMs  "
        f"{sum(status.events.values()):,} events sent  {sum(status.lost.values()):,} lost  "
        f"{len(status.findings) + status.findings_left_out:,} findings"
    )
    head = [
        counts(line),
        Text.assemble("verdict: ", (status.verdict, COLOURS.get(status.verdict, ""))),
    ]
    if status.reason is not None:
        head.append(Text(f"detached: {status.reason}", style="yellow"))
    missing = sorted({why for each in status.verdicts.values() for why in each.missing})
    if missing and status.reason is None:
        head.append(Text("; ".join(missing), style="yellow"))
    return head


def _line(latched: Latched) -> Text:
    """One latched finding: what `kvmprobe ack` wants to know comes first."""
    rules = ", ".join(latched.rules)
    vm = latched.vm or "VM without a name"
    text = Text(f"{latched.id} {latched.severity} {rules}: {vm}, {latched.count:,} times")
    text.stylize("dim" if latched.ignored is not None else COLOURS[latched.severity])
    return text
