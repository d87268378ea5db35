# SPDX-License-Identifier: MIT
"""The command called wrongly, and its output where there is no terminal: one line, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvmprobe.cli.record import parse_size
from kvmprobe.errors import UsageError
from tests.commands import Call

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/data/golden/intel-6.1-tss.kvmprobe"
KVMPROBE = (sys.executable, "-c", "from kvmprobe.cli.main import main; main()")
COMMANDS = (
    *("record", "analyze", "info", "import", "export", "rules", "doctor"),
    *("watch", "ack", "stat", "report", "fleet"),
)
#: Their usage errors end with 3, what monitoring plugins call unknown.
PLUGINS = ("verify", "check")


def one_line(answer: tuple[int, str, str], status: int) -> str:
    """The one line on stderr of a command that failed; nothing is on stdout."""
    got, out, err = answer
    assert (got, out) == (status, "")
    assert err.startswith("kvmprobe: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", [[], *([name] for name in (*COMMANDS, *PLUGINS))], ids=str)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(call: Call, monkeypatch: pytest.MonkeyPatch, command: list[str], option: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = call(*command, option)
    assert (status, err) == (0, "")
    assert out.startswith("Usage: ")
    assert "--help" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    if not command:
        assert all(name in out for name in (*COMMANDS, *PLUGINS))


def test_version(call: Call) -> None:
    status, out, err = call("--version")
    assert (status, err) == (0, "")
    assert out.startswith("kvmprobe 0.")


@pytest.mark.parametrize("command", PLUGINS)
def test_a_plugin_called_wrongly_is_unknown(call: Call, command: str) -> None:
    assert "No such option: --colour" in one_line(call(command, "--colour"), 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing command"),
        (["watches"], "No such command 'watches'"),
        (["--colour"], "No such option: --colour"),
        *(([name, "--colour"], "No such option: --colour") for name in COMMANDS),
        (["record", "-o"], "'-o' requires an argument"),
        (["record", "-d", "long"], "'--duration'"),
        (["record", "-d", "-1"], "'--duration'"),
        (["record", "-d", "nan"], "'--duration'"),
        (["record", "--max-size", "big"], "--max-size: 'big' is not a size"),
        (["record", "--max-size", ""], "--max-size: '' is not a size"),
        (["record", "--max-size", "1.5G"], "'1.5G' is not a size"),
        (["record", "--max-size", "-1"], "'-1' is not a size"),
        (["record", "--max-size", "\u00b2"], "is not a size"),
        (["record", "--min-free", "5%"], "--min-free: '5%' is not a size"),
        (["record", "-p", "0"], "'--pid'"),
        (["record", "-p", "init"], "'--pid'"),
        (["record", "-p", "99999999"], "no process has the id 99999999"),
        (["record", "-p", "99999999999999999999"], "no process has the id"),
        (["record", "--vm", "no such VM"], "no running VM is called 'no such VM'"),
        (["record", "--vm", "a", "-p", "1"], "--pid and --vm exclude each other"),
        (["record", "--vcpu", "-1"], "'--vcpu'"),
        (["record", "--vcpu", "65535"], "'--vcpu'"),
        (["record", "--backend", "ftrace"], "--backend is one of kprobe, fentry, tracepoint"),
        (["record", "--kernel-headers", "/no/such"], "'/no/such' does not exist"),
        (["record", "--", "no-such-command"], "no-such-command: no such command"),
        (["record", "--", "/etc/passwd"], "/etc/passwd: no such command"),
        (["record", "--", "two\nlines"], "two?lines: no such command"),
        (["analyze"], "Missing argument"),
        (["analyze", "--fail-on", "bad", "x"], "--fail-on is one of info, warning, critical"),
        (["info"], "Missing argument"),
        (["info", "a", "b"], "unexpected extra argument"),
        (["rules", "no-such-rule"], "no rule is called 'no-such-rule'"),
        (["doctor", "now"], "unexpected extra argument"),
    ],
    ids=" ".join,
)
def test_usage_errors_are_one_line(call: Call, arguments: list[str], says: str) -> None:
    assert says in one_line(call(*arguments), 2)


@pytest.mark.parametrize("command", ["analyze", "info"])
def test_files_that_are_no_captures(call: Call, tmp_path: Path, command: str) -> None:
    def message(path: str | Path) -> str:
        return one_line(call(command, str(path)), 1)

    assert "does not exist" in message(tmp_path / "none")
    assert "a directory" in message(tmp_path)
    assert "not a regular file" in message("/dev/null")
    (tmp_path / "empty").touch()
    assert "empty" in message(tmp_path / "empty")
    (tmp_path / "random").write_bytes(os.urandom(1000))
    assert "not a kvmprobe capture" in message(tmp_path / "random")
    table = pa.table({"a": [1, 2]})
    pq.write_table(table, tmp_path / "parquet")
    assert "not a kvmprobe capture" in message(tmp_path / "parquet")
    for open_, name in ((pa.ipc.new_file, "arrow"), (pa.ipc.new_stream, "stream")):
        with open_(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        assert "not a kvmprobe capture" in message(tmp_path / name)
    assert "a?b\x1b[31m".replace("\x1b", "?") in message(tmp_path / "a\nb\x1b[31m")


@pytest.mark.parametrize("command", [["analyze"], ["info"], ["analyze", "--json"]], ids=" ".join)
def test_a_file_whose_name_is_no_text(call: Call, tmp_path: Path, command: list[str]) -> None:
    path = os.fsencode(tmp_path) + b"/\xe4.kvmprobe"
    with open(path, "wb") as file:  # noqa: PTH123 - the name is bytes
        file.write(GOLDEN.read_bytes())
    status, out, err = call(*command, os.fsdecode(path))
    assert (status, err) == (0, "")
    assert "internal-slot" in out or "FILL" in out


@pytest.mark.parametrize(
    ("command", "redirect", "expected"),
    [
        (["analyze", str(GOLDEN)], ">/dev/full", (1, "No space left on device")),
        (["rules"], ">/dev/full", (1, "No space left on device")),
        (["info", str(GOLDEN)], "| head -1", (0, "")),
        (["rules"], ">&-", (0, "")),
    ],
    ids=["analyze full", "rules full", "info head", "rules closed"],
)
def test_output_that_has_nowhere_to_go(
    command: list[str], redirect: str, expected: tuple[int, str]
) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *KVMPROBE, *command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    status, why = expected
    err = f"kvmprobe: can't write the output: {why}\n" if why else ""
    assert (done.returncode, done.stderr) == (status, err)


def test_a_reader_that_goes_early_is_no_failure() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*KVMPROBE, "analyze", "--json", str(GOLDEN)],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_failure_with_stderr_closed_still_has_its_status() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *KVMPROBE, "rules", "no-such-rule"],
        cwd=ROOT,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.mark.parametrize(
    "command", [["analyze", str(GOLDEN)], ["info", str(GOLDEN)], ["rules"]], ids=lambda c: c[0]
)
def test_no_colour_without_a_terminal(call: Call, command: list[str]) -> None:
    status, out, err = call(*command)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) > 3
    assert "\x1b" not in out


def test_info_shows_plans_that_say_little(call: Call) -> None:
    status, out, _ = call("info", str(GOLDEN.with_name("schema-1.0.kvmprobe")))
    assert status == 0
    assert "None" not in out
    assert "kernel   unknown" in out


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1048576", 1 << 20), ("512M", 512 << 20), ("2g", 2 << 30), ("3K", 3072)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--max-size", text) == size
    with pytest.raises(UsageError, match="--min-free: "):
        parse_size("--min-free", text + "B")
