# SPDX-License-Identifier: MIT
"""Runs inside the lab's VM: `kvmprobe record` with the probes as `kvmprobe watch` has them.

    watched_inside.py record …

That is in watch mode, with the flight recorder.  At the end the number of events in the flight
recorder is printed.
"""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kvmprobe.capture import session
from kvmprobe.cli.main import main


class _Watching(session.Session):
    def __init__(
        self,
        filters: session.Filters,
        *,
        backend: str | None = None,
        kernel_headers: Path | None = None,
    ) -> None:
        super().__init__(
            filters, backend=backend, kernel_headers=kernel_headers, watch=True, flight=True
        )

    def stop(self) -> NDArray[Any]:
        print(f"flight {len(self.flight()['ts'])}", flush=True)
        return super().stop()


if __name__ == "__main__":
    session.Session = _Watching  # type: ignore[assignment,misc]
    main()
