# SPDX-License-Identifier: MIT
"""kvmprobe: finds KVM taking memory for MMIO.

`kvmprobe.open(path)` gives a capture, `kvmprobe.stream()` the live host's events; see kvmprobe.api.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmprobe.api import Capture, open, stream

__all__ = ["Capture", "__version__", "open", "stream"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported on demand: every start of the command imports this package.
    if name in ("Capture", "open", "stream"):
        from kvmprobe import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
