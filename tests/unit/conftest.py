# SPDX-License-Identifier: MIT
"""What many unit tests use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvmprobe.cli.main import main
from tests.commands import Call


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run `kvmprobe` with these words in this process: (status, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvmprobe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        assert end.value.code is None or isinstance(end.value.code, int)
        return end.value.code or 0, out, err

    return run
