# SPDX-License-Identifier: MIT
"""Debian's Chromium without a screen, driven by selenium, for the browser tests and shots."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

ROOT = Path(__file__).parents[2]
FAULT = ROOT / "tests/data/golden/lab-6.1-intel.kvmprobe"


def missing(*more: str) -> str | None:
    """Say what of the browser, and of `more` commands, is not installed; None: all is."""
    wanted = ("chromium", "chromedriver", *more)
    lacking = [name for name in wanted if shutil.which(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


@contextlib.contextmanager
def browser() -> Iterator[Chrome]:
    """A browser that can reach nothing: every host name fails to resolve."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in (
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--window-size=1400,1100",
        "--force-device-scale-factor=1",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses root otherwise
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def look(driver: Chrome, page: Path, width: int, *, dark: bool = False, height: int = 900) -> None:
    """Open a page at a width in CSS pixels, in light or dark colours."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    still = {"name": "prefers-reduced-motion", "value": "reduce"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme, still]})
    driver.get(page.resolve().as_uri())


def picture(driver: Chrome, top: int, height: int) -> bytes:
    """A PNG of a part of the page, as wide as the page, in CSS pixels."""
    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": top, "width": size["width"], "height": height, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    return base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"])


def complaints(driver: Chrome) -> list[str]:
    """What the console said since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]  # type: ignore[no-untyped-call]
