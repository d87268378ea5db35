# SPDX-License-Identifier: MIT
"""The configuration of a watch: what is taken, and how the rest is refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmprobe.cli.main import main
from kvmprobe.watch.config import Config, ConfigError, Ignore, load, parse_listen

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "packaging/kvmprobe-watch.toml"
IGNORE = """
[[ignore]]
rule = "internal-slot-fill"
vm = "build-7"
reason = "TICKET-1: to be moved"
expires = 2026-12-31
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def into(text: str) -> Path:
        path = tmp_path / "watch.toml"
        path.write_text(text)
        return path

    return into


def test_nothing_is_the_defaults(write: Write) -> None:
    assert load(write("")) == Config()
    assert Config().metrics.listen.startswith("127.0.0.1:")


def test_everything_can_be_set(write: Write) -> None:
    config = load(
        write(
            'runtime_directory = "/a"\nstate_directory = "/b"\nbackend = "kprobe"\n'
            'metrics.listen = "[::1]:0"\nlog = { max_kib = 4, files = 1 }\n'
            f"evidence.files = 0\nloss.degrades = 60\n{IGNORE}"
        )
    )
    assert (config.runtime_directory, config.state_directory) == (Path("/a"), Path("/b"))
    assert (config.backend, config.metrics.listen) == ("kprobe", "[::1]:0")
    assert (config.log.max_kib, config.log.files) == (4, 1)
    assert (config.evidence.files, config.loss.degrades) == (0, 60)
    (ignore,) = config.ignore
    assert ignore.expires == date(2026, 12, 31)


def test_flags_outrank_the_file_key_by_key(write: Write) -> None:
    path = write('log = { max_kib = 4, files = 7 }\nmetrics.listen = ""')
    config = load(path, {"log": {"files": 2}, "metrics": {"listen": "127.0.0.1:1"}})
    assert (config.log.max_kib, config.log.files) == (4, 2)
    assert config.metrics.listen == "127.0.0.1:1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colour = 1", "colour: unknown key"),
        ('[metrics]\nlisen = "x"', "metrics.lisen: unknown key"),
        ("a = 1\nb = 2", "a: unknown key (and 1 more)"),
        ("metrics = 3", "metrics: must be a table"),
        ('metrics.listen = "host:1"', "metrics.listen: 'host:1' is not ADDRESS:PORT"),
        ('metrics.listen = "127.0.0.1"', "is not ADDRESS:PORT"),
        ('metrics.listen = "127.0.0.1:65536"', "is not ADDRESS:PORT"),
        ('state_directory = "here"', "state_directory: not an absolute path"),
        ('state_directory = "/run/kvmprobe"', "must differ"),
        ('backend = "ftrace"', "backend: 'ftrace' is not known; there are kprobe, fentry"),
        ("log.files = true", "log.files: must be a valid integer"),
        ("log.files = 0", "log.files: must be greater than or equal to 1"),
        ("loss.degrades = 1.5", "loss.degrades: must be a valid integer"),
        (IGNORE.replace("vm", "VM"), "ignore.1.vm: must be given"),
        (IGNORE.replace('"build-7"', '""'), "ignore.1.vm: "),
        (IGNORE.replace("reason", "#"), "ignore.1.reason: must be given"),
        (IGNORE.replace("expires", "#"), "ignore.1.expires: must be given"),
        (IGNORE.replace("2026-12-31", '"2026-12-31"'), "ignore.1.expires: must be a valid date"),
        (IGNORE.replace("31", "31T00:00:00"), "ignore.1.expires: must be a valid date"),
        (IGNORE.replace("slot-fill", "slot"), "ignore.1.rule: 'internal-slot' is not known"),
        ("a =", "no TOML: Invalid value"),
        ("[" * 10_000, "no TOML: "),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_refused_is_named(write: Write, text: str, says: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="no regular file"):
        load(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="byte 5 is not UTF-8"):
        load(tmp_path / "binary")
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than"):
        load(tmp_path / "large")


@given(st.text())
def test_any_text_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "watch.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    said = ""
    try:
        load(path)
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said


@given(st.ip_addresses(), st.integers(0, 0xFFFF))
def test_addresses(address: object, port: int) -> None:
    host = f"[{address}]" if ":" in str(address) else str(address)
    assert parse_listen(f"{host}:{port}") == (str(address), port)


def test_an_ignore_ends_on_its_day() -> None:
    ignore = Ignore(rule="internal-slot-fill", vm="a", reason="b", expires=date(2026, 1, 2))
    assert ignore.covers("internal-slot-fill", "a", date(2026, 1, 1))
    assert not ignore.covers("internal-slot-fill", "a", date(2026, 1, 2))
    assert not ignore.covers("internal-slot-hit", "a", date(2026, 1, 1))
    assert not ignore.covers("internal-slot-fill", "A", date(2026, 1, 1))
    assert not ignore.covers("internal-slot-fill", None, date(2026, 1, 1))
    assert Config(ignore=(ignore,)).expired(date(2026, 1, 2)) == [ignore]
    assert Config(ignore=(ignore,)).expired(date(2026, 1, 1)) == []


def check_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["kvmprobe", "watch", "--check-config", "-c", str(path)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


def test_check_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write: Write
) -> None:
    path = write(IGNORE.replace("2026", "2020"))
    assert check_config(monkeypatch, capsys, path) == (
        0,
        f"{path}: good\nexpired on 2020-12-31: the ignore of internal-slot-fill on 'build-7'\n",
        "",
    )
    path = write("colour\u202e = 1\n")
    status, out, err = check_config(monkeypatch, capsys, path)
    assert (status, out) == (2, "")
    assert err.startswith(f"kvmprobe: {path}: ")
    assert err.count("\n") == 1


def test_a_flag_is_not_blamed_on_the_file(write: Write) -> None:
    path = write("log.files = 2\n")
    with pytest.raises(ConfigError, match=r"^the command line: metrics\.listen: "):
        load(path, {"metrics": {"listen": "here"}})
    path.write_text("metrics.colour = 1\n")
    with pytest.raises(ConfigError, match=f"^{path}: metrics.colour: unknown key"):
        load(path, {"metrics": {"listen": ""}})


def test_the_example_is_good_and_says_the_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write: Write
) -> None:
    assert check_config(monkeypatch, capsys, EXAMPLE) == (0, f"{EXAMPLE}: good\n", "")
    lines = EXAMPLE.read_text().splitlines()
    # What is commented out with "#" and no blank is the default, or an example of [[ignore]].
    shown = [line.removeprefix("#") for line in lines if line and not line.startswith("# ")]
    config = load(write("\n".join(shown)))
    assert len(config.ignore) == 1
    assert config.model_copy(update={"ignore": ()}) == Config()
