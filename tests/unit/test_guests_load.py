# SPDX-License-Identifier: MIT
"""What the load says before it touches KVM, and how it fails without KVM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvmprobe.errors import GuestError
from kvmprobe.guests import kvm, load


def test_mix_counts_accesses() -> None:
    mix = load.Mix(mmio=2, pio=3, ram=5, outs_ram=7, ins_ram=11, outs_mmio=13, ins_mmio=17)
    assert mix.accesses == 4 + 6 + 5 + 7 + 11 + 13 + 17
    assert mix.times(3).accesses == 3 * mix.accesses


def test_counts_add_up() -> None:
    assert load.Counts(1, 2, 3, 4, 5, 6, 7) + load.Counts(
        10, 20, 30, 40, 50, 60, 70
    ) == load.Counts(11, 22, 33, 44, 55, 66, 77)


def test_no_device_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    assert load.main(["--seconds", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "does not exist" in err
    assert "kvm_intel" in err


def test_device_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "DEVICE", Path("/dev/null"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(GuestError, match="can't tell its API version"):
        kvm.open_device()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("option", ["--seconds", "--rate", "--flips"])
def test_usage_errors(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load.main([option, "0"])
    assert end.value.code == 2
    assert f"{option} must be above 0" in capsys.readouterr().err


def test_the_vmm_needs_the_standard_library_only() -> None:
    import subprocess

    code = (
        "import sys; sys.path.insert(0, '.'); import kvmprobe.guests.load;"
        "print(sorted({m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names"
        " - {'__main__', 'kvmprobe', 'sitecustomize', 'usercustomize'}))"
    )
    root = Path(load.__file__).parents[2]
    run = [sys.executable, "-S", "-c", code]
    output = subprocess.run(run, cwd=root, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
