# SPDX-License-Identifier: MIT
"""The `kvmprobe` command: its subcommands, and the one place where errors become text."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from kvmprobe import __version__
from kvmprobe.cli import (
    ack,
    analyze,
    check,
    compact,
    doctor,
    export,
    fleet,
    import_,
    info,
    record,
    report,
    rules,
    stat,
    verify,
    watch,
)
from kvmprobe.errors import KvmprobeError

app = typer.Typer(
    name="kvmprobe",
    help="Watch live KVM hosts for KVM taking memory for MMIO.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    record.record,
    analyze.analyze,
    report.report,
    info.info,
    stat.stat,
    export.export,
    compact.compact,
    rules.rules,
    doctor.doctor,
    verify.verify,
    check.check,
    watch.watch,
    ack.ack,
):
    app.command()(command)
app.command("import")(import_.import_)
app.add_typer(fleet.fleet)


#: Commands that answer by their exit status, 2 among the answers: their errors are 3 (unknown).
_ANSWER_BY_STATUS = ("check", "verify")
_UNKNOWN = 3

_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvmprobe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command and exit.

    Every error of ours is one line on stderr and its own exit status; a usage error is 2.  A reader
    that closes our output early (`| head`) ends us silently.
    """
    _open_closed_streams()
    status = 0
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except KvmprobeError as error:
        status = _fail(str(error), error.exit_code)
    except TyperException as error:
        status = _fail(f"{error.format_message().rstrip('.')}; see kvmprobe --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:
        pass  # the status is the command's, if it came to its end
    except SystemExit as end:
        # typer's own answer to a closed pipe is to exit with 1
        if not isinstance(end.__context__, BrokenPipeError):
            raise
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS:
            raise
        status = _fail(f"can't write the output: {error.strerror}", 1)
    except Exception:
        # Python's own status for it is 1, which would be one of their answers.
        if not _answers_by_status():
            raise
        traceback.print_exc()
        status = _UNKNOWN
    _drop_broken_stdout()
    sys.exit(status)


def _open_closed_streams() -> None:
    """Open what the caller closed, or a capture would get the descriptor that others print to."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for good


def _answers_by_status() -> bool:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return command in _ANSWER_BY_STATUS


def _fail(message: str, status: int) -> int:
    if _answers_by_status():
        status = _UNKNOWN
    # A name in it may hold a line break, or what a terminal takes for a command.
    line = "".join(c if c.isprintable() else "?" for c in message)
    print(f"kvmprobe: {line}", file=sys.stderr)
    return status


def _drop_broken_stdout() -> None:
    """Keep the interpreter's last flush from failing aloud on a closed pipe or a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
