# SPDX-License-Identifier: MIT
"""`make shots`: screenshots of the report of the bundled capture, for docs/shots."""

import subprocess
import sys
import tempfile
from pathlib import Path

from kvmprobe.report.gather import gather
from kvmprobe.report.page import render
from kvmprobe.store.reader import CaptureReader
from tests.browser import chromium

SHOTS = chromium.ROOT / "docs/shots"
#: Pixels of a picture by the page's width, and the parts that are shown.
HEIGHTS = {1280: 1350, 390: 1250}
PARTS = {"verdict": None, "finding": "#findings", "timeline": "#timeline"}


def main() -> None:
    """Write the shots; the names tell what they show."""
    if problem := chromium.missing("pngquant"):
        sys.exit(f"{problem}: apt-get install chromium chromium-driver pngquant")
    SHOTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, chromium.browser() as driver:
        page = Path(directory) / chromium.FAULT.with_suffix(".html").name
        with CaptureReader(chromium.FAULT) as reader:
            page.write_text("".join(render(gather(reader))), encoding="utf-8")
        for width, height in HEIGHTS.items():
            for colours in ("light", "dark"):
                chromium.look(driver, page, width, dark=colours == "dark")
                # What sticks to the window's top would stick to the middle of a picture.
                driver.execute_script(
                    "for (const e of document.querySelectorAll('.top, .axis'))"
                    "e.style.position = 'static'"
                )
                for part, place in PARTS.items():
                    top = 0
                    if place:
                        script = "return document.querySelector(arguments[0]).offsetTop"
                        top = int(driver.execute_script(script, place))
                    path = SHOTS / f"report-{part}-{width}-{colours}.png"
                    path.write_bytes(chromium.picture(driver, top, height))
                    pack(path)
                    print(path.relative_to(chromium.ROOT), path.stat().st_size)


def pack(path: Path) -> None:
    """Make a picture a third of its size; what is lost is not to be seen."""
    command = ["pngquant", "--force", "--strip", "--speed", "1", "--output", str(path), str(path)]
    subprocess.run(command, check=True)


main()
