# SPDX-License-Identifier: MIT
"""The report in a real browser: it draws, zooms, answers keys and complains about nothing."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

from kvmprobe.analysis.vms import named
from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, Type
from kvmprobe.report.gather import gather
from kvmprobe.report.page import render
from kvmprobe.store import format as fmt
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter
from tests.browser import chromium
from tests.streams import L1, L2, UNKNOWN, ev, noslot, stream

pytestmark = pytest.mark.skipif(chromium.missing() is not None, reason=str(chromium.missing()))

EVIL = "</script><img src=x onerror='window.evil=1'><b id=evil>\u202e"
WIDTHS = (390, 1280)


def write_page(capture: Path, page: Path) -> Path:
    with CaptureReader(capture) as reader:
        page.write_text("".join(render(gather(reader))), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    with chromium.browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(chromium.FAULT, tmp_path_factory.mktemp("page") / "fault.html")


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    capture = chromium.FAULT.parent / "siblings-6.12.107.kvmprobe"
    return write_page(capture, tmp_path_factory.mktemp("page") / "siblings.html")


def shown(driver: Chrome) -> str:
    """What part of the recording is shown."""
    return driver.find_element(By.ID, "span").text


def said(driver: Chrome) -> str:
    return driver.find_element(By.ID, "readout").text


def press(driver: Chrome, *keys: str) -> None:
    driver.find_element(By.ID, "lanes").send_keys(*keys)
    settle(driver)


def settle(driver: Chrome) -> None:
    """Wait until the page has drawn."""
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def do(driver: Chrome, action: str) -> None:
    driver.execute_script(f"document.querySelector('[data-do={action}]').click()")
    settle(driver)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_complains_about_nothing(
    driver: Chrome, fault: Path, siblings: Path, width: int, dark: bool
) -> None:
    for page in (fault, siblings):
        chromium.look(driver, page, width, dark=dark)
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide == width
        drawn = driver.execute_script("return document.querySelectorAll('.track svg path').length")
        assert drawn > 10
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(18, 22, 28)" if dark else "rgb(245, 246, 248)")
        assert chromium.complaints(driver) == []


def test_text_can_be_read(driver: Chrome, fault: Path) -> None:
    """Every text has WCAG's contrast of 4.5 to 1 against what is behind it."""
    for dark in (False, True):
        chromium.look(driver, fault, 1280, dark=dark)
        low = driver.execute_script(CONTRAST)
        assert low == [], f"dark={dark}"


CONTRAST = """
const parse = (text) => (text.match(/[0-9.]+/g) ?? []).map(Number);
const bright = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const low = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || node.tagName === "SCRIPT" || !node.checkVisibility()) continue;
  const svg = node.tagName === "text";
  const [a, b] = [parse(getComputedStyle(node)[svg ? "fill" : "color"]), behind(node)].map(bright);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${node.tagName} ${node.textContent.slice(0, 30)}`);
}
return [...new Set(low)];
"""


def test_it_opens_at_the_worst_finding(driver: Chrome, fault: Path) -> None:
    chromium.look(driver, fault, 1280)
    assert said(driver).startswith("internal-slot-hit (critical). VM 1 (python3), vCPU 0")
    assert "a page filled by L2, where memory stands (0xfffbd000)" in said(driver)
    assert shown(driver).endswith("ms of 100.096 ms")


def test_buttons(driver: Chrome, fault: Path) -> None:
    chromium.look(driver, fault, 1280)
    do(driver, "fit")
    assert shown(driver) == "100.096 ms of 100.096 ms"
    do(driver, "in")
    assert shown(driver) == "51.049 ms of 100.096 ms"
    do(driver, "out")
    assert shown(driver) == "100.096 ms of 100.096 ms"
    do(driver, "next")
    assert "internal-slot-" in said(driver)


def test_from_a_finding_to_the_timeline_and_back(driver: Chrome, fault: Path) -> None:
    chromium.look(driver, fault, 1280)
    do(driver, "fit")
    button = driver.find_element(By.CSS_SELECTOR, "[data-finding=finding-2]")
    driver.execute_script("arguments[0].click()", button)
    settle(driver)
    assert said(driver).startswith("internal-slot-fill (warning)")
    assert driver.switch_to.active_element.get_attribute("id") == "lanes"
    mark = driver.find_element(By.CSS_SELECTOR, ".f-mark[data-go=finding-2]")
    ActionChains(driver).move_to_element(mark).click().perform()
    assert driver.switch_to.active_element.get_attribute("id") == "finding-2"


def test_keys(driver: Chrome, siblings: Path) -> None:
    chromium.look(driver, siblings, 1280)
    press(driver, "0")
    whole = shown(driver)
    press(driver, "+")
    assert shown(driver) != whole
    press(driver, "-")
    assert shown(driver) == whole
    press(driver, Keys.HOME)
    before = said(driver)
    press(driver, Keys.ARROW_RIGHT)
    assert said(driver) != before
    press(driver, *[Keys.ARROW_UP] * 30)
    assert said(driver).startswith("VM 1 (python3), vCPU 0")
    press(driver, Keys.ARROW_DOWN)
    assert not said(driver).startswith("VM 1 (python3), vCPU 0,")
    press(driver, "n")
    assert re.match(r"[a-z-]+ \((info|warning|critical)\)\. VM ", said(driver))
    assert chromium.complaints(driver) == []


def test_everything_is_reached_by_the_tab_key(driver: Chrome, fault: Path) -> None:
    chromium.look(driver, fault, 1280)
    reached = set()
    for _ in range(80):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        active = driver.switch_to.active_element
        reached.add(
            active.get_attribute("id") or active.get_attribute("data-do") or active.tag_name
        )
    assert {"theme", "lanes", "in", "out", "fit", "next", "summary", "a", "button"} <= reached


def test_names_for_a_screen_reader(driver: Chrome, fault: Path) -> None:
    chromium.look(driver, fault, 1280)
    tree = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and "role" in node
    ]
    for role in ("button", "link", "heading", "region", "image", "toolbar"):
        assert [name for kind, name in nodes if kind == role and not name] == [], role
    assert ("heading", "Vulnerable") in nodes
    assert ("heading", "L1 was sent to MMIO for an access to memory") in nodes
    assert ("button", "Zoom in") in nodes
    assert ("group", "Timeline") in nodes
    assert "status" in dict(nodes)


def test_dragging_and_the_wheel(driver: Chrome, fault: Path) -> None:
    chromium.look(driver, fault, 1280)
    driver.execute_script("document.getElementById('lanes').scrollIntoView({block: 'center'})")
    settle(driver)
    axis = ".axis text"
    before = driver.find_elements(By.CSS_SELECTOR, axis)[0].text, shown(driver)
    lane = driver.find_element(By.CSS_SELECTOR, ".track.chosen svg")
    ActionChains(driver).click_and_hold(lane).move_by_offset(200, 0).release().perform()
    settle(driver)
    after = driver.find_elements(By.CSS_SELECTOR, axis)[0].text, shown(driver)
    assert (after[0] != before[0], after[1]) == (True, before[1])
    driver.execute_script(
        "const at = arguments[0].getBoundingClientRect();"
        "arguments[0].dispatchEvent(new WheelEvent('wheel', {bubbles: true, cancelable: true,"
        "ctrlKey: true, deltaY: -300, clientX: at.left + 300, clientY: at.top + 5}))",
        lane,
    )
    settle(driver)
    assert shown(driver) != before[1]


def test_colours_can_be_chosen(driver: Chrome, fault: Path) -> None:
    chromium.look(driver, fault, 1280)
    button = driver.find_element(By.ID, "theme")
    seen = []
    for _ in range(3):
        button.click()
        colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        seen.append((button.text, colour))
    assert seen == [
        ("Colours: light", "rgb(245, 246, 248)"),
        ("Colours: dark", "rgb(18, 22, 28)"),
        ("Colours: auto", "rgb(245, 246, 248)"),
    ]


def test_paper(driver: Chrome, fault: Path) -> None:
    """Printed from a dark screen it is light, and all tracks are on it."""
    chromium.look(driver, fault, 1280, dark=True)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    hidden = driver.execute_script("return !document.querySelector('.top').checkVisibility()")
    assert (colour, hidden) == ("rgb(255, 255, 255)", True)
    assert len(driver.execute_cdp_cmd("Page.printToPDF", {})["data"]) > 20_000
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_nothing_of_a_capture_comes_alive(driver: Chrome, tmp_path: Path) -> None:
    seen = ev(Type.LIFECYCLE, UNKNOWN, slot=-1, kind=LifecycleChange.VM_SEEN, vcpu=NO_VCPU, aux=7)
    rows = [stream([seen]), named(1, 7, EVIL, 1000), stream([noslot(L2), ev(Type.MATCH, L1)], 2000)]
    header = fmt.new_header("live")
    header["command"] = [EVIL]
    header["host"]["kernel"] = EVIL
    header["host"]["parameters"] = {EVIL: EVIL}
    capture = tmp_path / "evil.kvmprobe"
    with CaptureWriter(capture, header) as writer:
        writer.write(np.concatenate(rows))
    page = write_page(capture, tmp_path / "evil.html")
    chromium.look(driver, page, 390)
    press(driver, "n", "0", "+")
    assert driver.execute_script("return window.evil") is None
    assert driver.find_elements(By.CSS_SELECTOR, "#evil, img") == []
    assert EVIL[:20] in driver.find_element(By.CSS_SELECTOR, ".track.chosen").text
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390
    assert chromium.complaints(driver) == []


def test_an_empty_capture(driver: Chrome, tmp_path: Path) -> None:
    capture = tmp_path / "empty.kvmprobe"
    with CaptureWriter(capture, fmt.new_header("live")):
        pass
    chromium.look(driver, write_page(capture, tmp_path / "empty.html"), 390)
    press(driver, "+", "-", "0", "n", Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert driver.title.startswith("inconclusive")
    assert chromium.complaints(driver) == []
