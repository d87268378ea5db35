# SPDX-License-Identifier: MIT
"""Heavy modules are imported where they are used: the command starts without them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = (
    *("record", "analyze", "info", "import", "export", "rules", "doctor"),
    *("verify", "check", "watch", "ack", "stat", "report", "fleet"),
)
HEAVY = ("bcc", "distributed", "jinja2", "numba", "pandas", "prometheus_client", "pyarrow")

PROGRAM = """
import json, sys
from kvmprobe.cli.main import main
sys.argv = ["kvmprobe", *sys.argv[1:]]
try:
    status = main()
except SystemExit as end:
    status = end.code
print(json.dumps([status or 0, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    status, modules = json.loads(run.stderr.splitlines()[-1])
    assert status == 0
    assert "--help" in run.stdout
    assert sorted(set(HEAVY) & set(modules)) == []
