# SPDX-License-Identifier: MIT
"""The page of a fleet in a real browser: it fits, opens its hosts, filters and runs nothing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from kvmprobe.fleet.host import Host, analyze_host, empty_result
from kvmprobe.fleet.hosts import hosts_of
from kvmprobe.fleet.page import render
from kvmprobe.fleet.places import list_files
from kvmprobe.fleet.results import Results
from kvmprobe.fleet.simulate import Fleet, simulate_host
from kvmprobe.fleet.survey import survey
from tests.browser import chromium
from tests.browser.test_report_browser import CONTRAST, EVIL, WIDTHS

pytestmark = pytest.mark.skipif(chromium.missing() is not None, reason=str(chromium.missing()))


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    with chromium.browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> list[Host]:
    folder = tmp_path_factory.mktemp("fleet")
    fleet = Fleet(hosts=10, days=3, events=3000, vulnerable=0.5, hit=0.3, lossy=0.1)
    for number in range(10):
        simulate_host(fleet, folder, number)
    return hosts_of(survey(list_files(str(folder))))


def page_of(folder: Path, results: list[tuple[Host, dict[str, Any]]]) -> Path:
    with Results(folder / "r") as kept:
        for _, result in results:
            kept.keep(result)
        kept.finish([host for host, _ in results], {})
    page = folder / "fleet.html"
    page.write_text("".join(render(folder / "r")), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def page(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = [(host, analyze_host(host)) for host in hosts]
    made[0][1]["problems"] = ["/captures/host-1/2026-01-01.parquet: it is damaged"]
    return page_of(tmp_path_factory.mktemp("page"), made)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_can_be_read(driver: Chrome, page: Path, width: int, dark: bool) -> None:
    chromium.look(driver, page, width, dark=dark)
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert driver.execute_script("return document.documentElement.scrollWidth") == width
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 28)" if dark else "rgb(245, 246, 248)")
    assert driver.execute_script(CONTRAST) == []
    assert chromium.complaints(driver) == []


def test_from_the_overview_to_a_finding(driver: Chrome, page: Path) -> None:
    chromium.look(driver, page, 1280)
    assert driver.find_element(By.TAG_NAME, "h1").text == "5 vulnerable"
    assert driver.title == "5 of 10 hosts vulnerable (kvmprobe)"
    hosts = driver.find_elements(By.CSS_SELECTOR, "details.host")
    assert len(hosts) >= 6
    assert not driver.find_elements(By.CSS_SELECTOR, "details.host[open]")
    hosts[0].find_element(By.TAG_NAME, "summary").click()
    finding = hosts[0].find_element(By.CSS_SELECTOR, ".found").text
    assert "internal-slot-" in finding
    assert "VM 5 (model, pid 1), vCPU 0" in finding
    driver.get(f"{page.resolve().as_uri()}#host-2")
    opened = driver.find_elements(By.CSS_SELECTOR, "details.host[open]")
    assert [host.get_attribute("id") for host in opened] == ["host-1", "host-2"]


def test_hosts_can_be_filtered(driver: Chrome, page: Path) -> None:
    chromium.look(driver, page, 390)
    driver.find_element(By.ID, "filter").send_keys("internal-slot-hit")
    shown = [h for h in driver.find_elements(By.CSS_SELECTOR, ".host") if h.is_displayed()]
    assert len(shown) == 3
    assert driver.find_element(By.ID, "shown").text == "3 of 10"
    driver.find_element(By.ID, "filter").clear()
    driver.execute_script("document.getElementById('filter').dispatchEvent(new Event('input'))")
    assert driver.find_element(By.ID, "shown").text == ""


def test_it_is_whole_without_a_script(driver: Chrome, page: Path) -> None:
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.look(driver, page, 1280)
        assert not driver.find_element(By.ID, "filter").is_displayed()
        driver.find_element(By.CSS_SELECTOR, "details.host summary").click()
        assert driver.find_element(By.CSS_SELECTOR, ".found").is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_names_for_a_screen_reader(driver: Chrome, page: Path) -> None:
    chromium.look(driver, page, 1280)
    tree = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and "role" in node
    ]
    for role in ("button", "link", "heading", "region", "image", "searchbox"):
        assert [name for kind, name in nodes if kind == role and not name] == [], role
    bars = [name for role, name in nodes if role == "image"]
    assert bars[0].startswith("internal-slot: 5 vulnerable, 1 inconclusive, ")


def test_nothing_of_a_host_comes_alive(driver: Chrome, hosts: list[Host], tmp_path: Path) -> None:
    made = []
    for host in hosts[:6]:
        result = analyze_host(host)
        for finding in result["findings"]:
            finding |= dict.fromkeys(("kernel", "vm_name", "file", "configuration", "rule"), EVIL)
        result |= {name: [EVIL] for name in ("kernels", "configurations", "problems", "notes")}
        made.append((replace(host, name=EVIL, notes=(EVIL,)), result))
    page = page_of(tmp_path, made)
    chromium.look(driver, page, 390)
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert driver.execute_script("return window.evil") is None
    assert driver.find_elements(By.CSS_SELECTOR, "#evil, img") == []
    assert EVIL[:20] in driver.find_element(By.CSS_SELECTOR, ".host").text
    assert "\u202e" not in page.read_text(encoding="utf-8")
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390
    assert chromium.complaints(driver) == []


def test_an_empty_fleet(driver: Chrome, hosts: list[Host], tmp_path: Path) -> None:
    calm = empty_result(hosts[0]) | {"done": True, "verdict": "not exercised"}
    calm["verdicts"] = [
        verdict | {"verdict": "not exercised", "missing": []} for verdict in calm["verdicts"]
    ]
    page = page_of(tmp_path, [(hosts[0], calm)])
    chromium.look(driver, page, 390)
    assert driver.find_element(By.TAG_NAME, "h1").text == "1 not exercised"
    assert chromium.complaints(driver) == []
