# SPDX-License-Identifier: MIT
"""Write shell completions below a folder: python tools/completions.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

#: The file that each shell looks for.
FILES = {"bash": "kvmprobe", "zsh": "_kvmprobe", "fish": "kvmprobe.fish"}


def script(shell: str) -> str:
    """Return the completion that typer makes for "bash", "zsh" or "fish"."""
    from typer._completion_shared import get_completion_script

    return get_completion_script(
        prog_name="kvmprobe", complete_var="_KVMPROBE_COMPLETE", shell=shell
    )


if __name__ == "__main__":
    for shell, name in FILES.items():
        folder = Path(sys.argv[1]) / shell
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(script(shell) + "\n", encoding="utf-8")
