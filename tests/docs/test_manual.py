# SPDX-License-Identifier: MIT
"""The manual builds without a warning, and says what the code says."""

import html.parser
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from kvmprobe.cli.main import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROGRAM = "import sys; from kvmprobe.cli.main import main; sys.argv[0] = 'kvmprobe'; main()"


def leaves(group: Any, before: str = "") -> dict[str, Any]:  # noqa: ANN401
    """Every command by its name; those of a group by both names."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        below = hasattr(command, "commands")
        found |= leaves(command, f"{before}{name} ") if below else {before + name: command}
    return found


BY_NAME = leaves(typer.main.get_command(app))
COMMANDS = sorted(BY_NAME)


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = tool("reference")
PAGES: dict[str, str] = reference.pages()


def sphinx(builder: str, out: Path) -> Path:
    command = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", builder)
    folders = (DOCS, out / builder, "-d", out / "doctrees")
    run = subprocess.run([*command, *folders], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out / builder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sphinx("html", tmp_path_factory.mktemp("manual"))


@pytest.fixture(scope="module")
def man(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sphinx("man", tmp_path_factory.mktemp("man"))


@pytest.mark.parametrize("name", PAGES)
def test_reference_is_what_the_code_says(name: str) -> None:
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert written == PAGES[name], "run: python tools/reference.py"


def test_every_command_has_a_page_and_no_page_is_left_over() -> None:
    there = {path.stem for path in (DOCS / "reference/commands").iterdir()}
    assert there == {*map(reference.file_name, COMMANDS), "kvmprobe"}


def test_every_command_has_examples() -> None:
    assert sorted(reference.EXAMPLES) == COMMANDS, "add to EXAMPLES in tools/reference.py"


@pytest.mark.parametrize("name", reference.EXAMPLES)
def test_examples_use_options_that_exist(name: str) -> None:
    known = {option for p in BY_NAME[name].params for option in p.opts}
    begin = ["kvmprobe", *name.split()]
    for line, _ in reference.EXAMPLES[name]:
        words = shlex.split(line.removeprefix("sudo "))
        assert words[: len(begin)] == begin
        own = words[len(begin) : words.index("--") if "--" in words else None]
        assert {word for word in own if word.startswith("-")} <= known


def test_every_schema_and_metric_is_in_the_reference() -> None:
    schemas = {p.resolve() for p in ROOT.glob("*/schema/*.json")}
    schemas |= {p.resolve() for p in ROOT.glob("kvmprobe/*/schema/*.json")}
    assert {p.resolve() for p in reference.schemas()} == schemas
    source = "".join(p.read_text() for p in ROOT.glob("packaging/*.rules.yml"))
    alerted = {n.removesuffix("_total") for n in re.findall(r"\bkvmprobe_\w+", source)}
    assert alerted
    assert not [name for name in alerted if name not in PAGES["metrics.md"]]


class Page(html.parser.HTMLParser):
    """Where a page's links and pictures lead, and the anchors it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if value and (tag, name) in (("a", "href"), ("img", "src")):
                self.links.add(value)


def test_links_lead_somewhere(pages: Path) -> None:
    read = {path.resolve(): Page(path) for path in pages.rglob("*.html")}
    assert len(read) > 30
    broken = []
    for path, page in read.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            anchor = urllib.parse.unquote(url.fragment)
            there = target.exists() and (
                not anchor or target not in read or anchor in read[target].anchors
            )
            if not there:
                broken.append(f"{path.name}: {link}")
    assert broken == []


def test_pages_load_nothing_from_the_network(pages: Path) -> None:
    loaded = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', re.I)
    assert [p.name for p in pages.rglob("*.html") if loaded.search(p.read_text())] == []


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_command_has_a_man_page(man: Path, name: str) -> None:
    page = man / f"kvmprobe{name and '-' + reference.file_name(name)}.1"
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^\.SH NAME?\n|^\.SH Name\n", text, re.M | re.I)
    assert "\\-\\-help" in text
    if shutil.which("man") is None:
        pytest.skip("not installed: man (the page was made, not formatted)")
    run = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page],
        env={**os.environ, "MANWIDTH": "80"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")


def shown() -> list[tuple[str, list[str]]]:
    """What the tutorial shows: each command of which it shows the output, and the pieces of it."""
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n\$ (kvmprobe (?:info|analyze|rules) .*)\n((?s:.+?))```", text)
    assert len(blocks) >= 5
    return [(command, re.split(r"^  \.\.\.\n", pieces, flags=re.M)) for command, pieces in blocks]


@pytest.mark.parametrize(("command", "pieces"), shown())
def test_the_tutorial_shows_what_is_printed(command: str, pieces: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *shlex.split(command)[1:]],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rest = run.stdout
    for piece in filter(None, pieces):
        _, found, rest = rest.partition(piece)
        assert found, f"the tutorial shows what {command!r} does not print here:\n{piece}"


def test_completions_complete(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools/completions.py", tmp_path], check=True)
    assert (tmp_path / "zsh/_kvmprobe").read_text().startswith("#compdef kvmprobe\n")
    assert "complete --command kvmprobe" in (tmp_path / "fish/kvmprobe.fish").read_text()
    program = tmp_path / "kvmprobe"
    program.write_text(
        f"#!{sys.executable}\nimport sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}"
    )
    program.chmod(0o755)
    code = """. "$1"; COMP_WORDS=(kvmprobe record --m) COMP_CWORD=2
        _kvmprobe_completion kvmprobe; printf '%s\\n' "${COMPREPLY[@]}" """
    run = subprocess.run(
        ["bash", "-c", code, "bash", tmp_path / "bash/kvmprobe"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["--max-size", "--min-free"]
