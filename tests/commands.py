# SPDX-License-Identifier: MIT
"""Commands that tests run in their own process."""

from collections.abc import Callable

#: Calls a command with its words: (status, stdout, stderr).
Call = Callable[..., tuple[int, str, str]]
