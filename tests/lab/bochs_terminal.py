# SPDX-License-Identifier: MIT
"""Run Bochs on a terminal of its own and swallow what it draws: `bochs_terminal.py COMMAND …`.

Bochs' text display wants a terminal, and the build with the debugger opens a second one for the
screen.  Unread, that one is full after 4 KiB and Bochs then waits a second at each refresh.
"""

import contextlib
import os
import pty
import re
import selectors
import subprocess
import sys

_SCREEN = re.compile(rb'connected to screen "([^"]+)"')


def main() -> int:
    """Run the command to its end; what it says on its first terminal goes to stdout."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        sys.argv[1:],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    said = b""
    screen: int | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(master, selectors.EVENT_READ)
        while child.poll() is None:
            for key, _ in selector.select(timeout=0.5):
                # EIO: the other side was closed.
                with contextlib.suppress(OSError):
                    drawn = os.read(key.fd, 65536)
                    if key.fd != master:
                        continue
                    os.write(1, drawn)
                    if screen is None:
                        said = (said + drawn)[-4096:]
                        if match := _SCREEN.search(said):
                            screen = os.open(match[1], os.O_RDONLY | os.O_NOCTTY)
                            selector.register(screen, selectors.EVENT_READ)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
