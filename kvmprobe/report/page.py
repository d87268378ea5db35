# SPDX-License-Identifier: MIT
"""The page: text that needs no script, and the data that the script draws."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kvmprobe import __version__
from kvmprobe.analysis.vms import printable
from kvmprobe.report.drawing import drawing
from kvmprobe.report.findings import rule_groups
from kvmprobe.report.gather import Gathered
from kvmprobe.report.maps import vm_maps
from kvmprobe.report.summary import facts, plan, verdicts, vms

_HERE = Path(__file__).parent
#: Unescaped in a script element these could end it, or mean something to an old browser.
_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render(found: Gathered) -> Iterator[str]:
    """Yield the page's text, part by part: HTML, UTF-8, without anything outside itself.

    Everything that comes from the capture is escaped for a reader's eyes (nothing invisible) and
    then for HTML.
    """
    script = joined(_HERE / "page.js", _HERE / "report.js")
    style = joined(_HERE / "report.css")
    groups = rule_groups(found)
    return (
        templates(_HERE)
        .get_template("page.html.j2")
        .generate(
            version=__version__,
            script=Markup(script),  # noqa: S704 - our own files
            style=Markup(style),  # noqa: S704
            script_hash=digest(script),
            style_hash=digest(style),
            data=Markup(embedded(drawing(found, groups))),  # noqa: S704
            verdict=verdicts(found),
            vms=vms(found),
            groups=groups,
            maps=vm_maps(found),
            facts=facts(found),
            plan=plan(found),
        )
    )


def joined(*paths: Path) -> str:
    """Return our own scripts, or styles, as one."""
    return "".join(path.read_text(encoding="utf-8") for path in paths)


def templates(folder: Path) -> Environment:
    """Return the templates of a folder; what they show is escaped for HTML and for a reader."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def digest(text: str) -> str:
    """Name a script or a style as a page's policy does, which allows no other."""
    value = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"'sha256-{value}'"


def embedded(data: Any) -> str:  # noqa: ANN401 - whatever JSON takes
    """Return `data` as JSON that can stand inside a script element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT)


def _visible(value: Any) -> Any:  # noqa: ANN401 - whatever a template shows
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)
