# SPDX-License-Identifier: MIT
"""The manual: one source for the HTML pages and the man pages (`make docs`)."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from kvmprobe import __version__  # noqa: E402 - the checkout's own

project = "kvmprobe"
author = "the kvmprobe authors"
project_copyright = author
version = release = __version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["shots"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
# "--" and quotation marks are what a shell has to be given.
smartquotes = False
nitpicky = True
highlight_language = "text"

html_theme = "furo"
html_title = f"kvmprobe {version}"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False


def _man_page(path: Path) -> tuple[str, str, str, str, int]:
    """The man page of a command; its line of description is the first sentence of its own."""
    name = "kvmprobe" if path.stem == "kvmprobe" else f"kvmprobe-{path.stem}"
    _, _, text = path.read_text(encoding="utf-8").partition("## Description\n\n")
    says = text.split("\n\n")[0].partition(". ")[0].rstrip(".").replace("`", "")
    return (f"reference/commands/{path.stem}", name, says, "", 1)


man_pages = [_man_page(path) for path in sorted(DOCS.glob("reference/commands/*.md"))]
