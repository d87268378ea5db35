# SPDX-License-Identifier: MIT
"""The report's page: one file that needs nothing, in which nothing of a capture is markup."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvmprobe.analysis.vms import named
from kvmprobe.probes.schema import NO_VCPU, LifecycleChange, Type
from kvmprobe.report import findings as page_findings
from kvmprobe.report.gather import gather
from kvmprobe.report.page import embedded, render
from kvmprobe.store import format as fmt
from kvmprobe.store.reader import CaptureReader
from kvmprobe.store.writer import CaptureWriter
from tests.streams import L1, L2, UNKNOWN, ev, interleave, noslot, stream, vcpu_streams

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/golden"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\u202e\x1b[31m{{7*7}}"


class Page(HTMLParser):
    """What a page consists of: its elements, attributes, scripts and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.inside: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        self.inside.append(tag)

    def handle_data(self, data: str) -> None:
        inside = self.inside[-1] if self.inside else ""
        (self.scripts if inside in ("script", "style") else self.text).append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside.append("")

    @property
    def data(self) -> Any:  # noqa: ANN401 - what JSON holds
        return json.loads(self.scripts[1])


def page_of(path: Path) -> Page:
    with CaptureReader(path) as reader:
        return Page("".join(render(gather(reader))))


def write(path: Path, *batches: NDArray[Any], **header: object) -> Path:
    with CaptureWriter(path, fmt.new_header("live") | header, force=True) as writer:
        for rows in batches:
            writer.write(rows)
    return path


@pytest.fixture(scope="module")
def fault() -> Page:
    return page_of(GOLDEN / "lab-6.1-intel.kvmprobe")


def test_it_says_what_was_found(fault: Page) -> None:
    text = " ".join(fault.text)
    assert "vulnerable" in text
    assert "0xfffbd000 (TSS)" in text
    assert "VM 1 (python3, pid 146), vCPU 0, L1" in text
    assert "kvm_intel.unrestricted_guest" in text
    rules = [finding["rule"] for finding in fault.data["findings"]]
    assert rules == ["internal-slot-hit", "internal-slot-fill", "internal-slot-armed"]


def test_it_says_which_vm_is_which(tmp_path: Path) -> None:
    lost = ev(Type.LOSS, UNKNOWN, slot=-1, vm=2, vcpu=NO_VCPU, addr=3, kind=Type.FILL, len=1)
    rows = stream([noslot(L2), ev(Type.MATCH, L1), ev(Type.MMIO, L1, vm=2, slot=-1), lost])
    text = " ".join(page_of(write(tmp_path / "c.kvmprobe", rows)).text).split()
    first, second = " ".join(text).partition("On Seen")[2].partition("VM 2")[::2]
    assert first.strip() == "VM 1 vulnerable internal-slot 2 findings, 0 lost"
    told = second.partition("What one VM proves")[0].strip()
    assert told == "inconclusive all 0 findings, 3 lost; missing: lost: 3 records of FILL"


def test_evidence_stands_in_order(fault: Page) -> None:
    text = " ".join(fault.text)
    told = (
        "the MMIO cache now holds 0xfffbd000 (TSS)",
        "an access at 0xfffbd000 (TSS): KVM believed the MMIO cache",
        "a read of 1 bytes at 0xfffbd000 (TSS) was treated as MMIO and given to the VMM",
        "a write at 0xfffbd000 (TSS): KVM believed the MMIO cache",
    )
    places = [text.index(sentence) for sentence in told]
    assert places == sorted(places)


def test_it_needs_nothing_from_outside(fault: Page) -> None:
    outside = ("src", "href", "action", "data", "srcset", "poster", "style", "xlink:href")
    links = [value for name, value in fault.attributes if name in outside]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not [name for name, _ in fault.attributes if name.startswith("on")]
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(fault.tags)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|import\(", "".join(fault.scripts))


def test_only_our_script_and_style_may_run(fault: Page) -> None:
    policy = next(value for _, value in fault.attributes if value.startswith("default-src"))
    style, _, script = fault.scripts
    for text, directive in ((script, "script-src"), (style, "style-src")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_nothing_of_a_capture_is_markup(tmp_path: Path) -> None:
    def capture(name: str, vm: str) -> Page:
        seen = ev(
            Type.LIFECYCLE, UNKNOWN, slot=-1, kind=LifecycleChange.VM_SEEN, vcpu=NO_VCPU, aux=7
        )
        rows = [
            stream([seen]),
            named(1, 7, vm, 1000),
            stream([noslot(L2), ev(Type.MATCH, L1)], 2000),
        ]
        header = fmt.new_header("live")
        return page_of(
            write(
                tmp_path / "c.kvmprobe",
                np.concatenate(rows),
                command=[name, "record"],
                source={"kind": "live", "note": name},
                tool={"name": name, "version": name},
                filters={"pid": None, "vm": name, "vcpu": None},
                host=header["host"]
                | {"kernel": name, "vendor": name, "parameters": {name: name, "kvm.x": name}}
                | {"boot_id": name, "modules": {name: name}},
                plan=[
                    {
                        "observation": "FILL", "site": name, "attachment": name,
                        "attached": attached, "reason": name,
                    }
                    for attached in (True, False)
                ],
            )
        )  # fmt: skip

    evil, good = capture(EVIL, EVIL), capture("good", "good")
    assert evil.tags == good.tags
    assert {name for name, _ in evil.attributes} == {name for name, _ in good.attributes}
    assert evil.scripts[2] == good.scripts[2]
    assert "<" not in evil.scripts[1]
    assert evil.data["lanes"]["all"][0]["name"].startswith("</script>")
    everything = "".join(evil.text) + evil.scripts[1]
    assert not [c for c in everything if not c.isprintable() and c != "\n"]
    assert "{{7*7}}" in "".join(evil.text)


@given(st.text())
def test_embedded_data_cannot_end_its_element(text: str) -> None:
    data = embedded({text: [text]})
    assert not set("<>&\u2028\u2029") & set(data)
    assert json.loads(data) == {text: [text]}


@given(vcpu_streams(), st.integers(0, 99), st.integers(0, 3))
@settings(max_examples=5, deadline=None)
def test_no_finding_and_no_loss_disappears(
    tmp_path_factory: pytest.TempPathFactory,
    streams: list[list[dict[str, Any]]],
    seed: int,
    losses: int,
) -> None:
    lost = [
        ev(Type.LOSS, UNKNOWN, slot=-1, vm=0, vcpu=NO_VCPU, addr=n + 1, kind=Type.FILL, len=1)
        for n in range(losses)
    ]
    rows = stream([e for e in interleave(streams, seed) if e["type"] != Type.LOSS] + lost)
    path = write(tmp_path_factory.mktemp("report") / "c.kvmprobe", rows)
    with CaptureReader(path) as reader:
        found = gather(reader)
        page = Page("".join(render(found)))
    ids = {value for name, value in page.attributes if name == "id"}
    told = page.data["findings"]
    assert {finding["id"] for finding in told} <= ids
    first = int(rows["ts"].min()) if len(rows) else 0
    assert Counter((f["rule"], f["vm"], f["vcpu"], f["first"]) for f in told) == Counter(
        (f.rule.id, f.vm, f.vcpu, f.first_ts - first) for f in found.capture.findings
    )
    assert page.data["losses"] == sum(range(1, losses + 1))


def test_many_findings_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_findings, "MAX_CARDS", 20)
    rows = stream(
        event for n in range(300) for event in (noslot(L2, vcpu=n), ev(Type.MATCH, L1, vcpu=n))
    )
    page = page_of(write(tmp_path / "c.kvmprobe", rows))
    ids = [
        value for name, value in page.attributes if name == "id" and value.startswith("finding-")
    ]
    assert len(ids) == len(set(ids)) == len(page.data["findings"]) == 600
    assert "more findings of this rule" in " ".join(page.text)


def test_an_empty_capture_has_a_page(tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "c.kvmprobe"))
    assert "No finding" in " ".join(page.text)
    assert page.data["lanes"]["all"] == []


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmprobe", "report", *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


def test_the_command(tmp_path: Path) -> None:
    capture = str(GOLDEN / "lab-6.12-intel.kvmprobe")
    made = run(capture, cwd=tmp_path)
    page = tmp_path / "lab-6.12-intel.html"
    assert (made.returncode, made.stdout) == (0, "")
    assert made.stderr == "lab-6.12-intel.html: not exercised, 0 findings\n"
    assert page.read_text().startswith("<!DOCTYPE html>")
    again = run(capture, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr == "kvmprobe: lab-6.12-intel.html exists; pass --force to replace it\n"


def test_no_page_of_no_capture(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    made = run("empty", "-o", "page.html", cwd=tmp_path)
    assert made.returncode == 1
    assert "not a kvmprobe capture" in made.stderr
    assert not (tmp_path / "page.html").exists()
