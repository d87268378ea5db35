# SPDX-License-Identifier: MIT
"""The sdist holds all of the checkout, the wheel all of the package, and the wheel runs."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = {"probes": "kvmprobe/probes", "analysis": "kvmprobe/analysis"}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that has to succeed, away from this environment's own PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """Every tracked file; the links count as the files behind them."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked is unknown")
    names = set(run("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0"))
    for folder, link in LINKS.items():
        names.remove(link)
        names |= {f"{link}{n.removeprefix(folder)}" for n in names if n.startswith(f"{folder}/")}
    return names


@pytest.fixture(scope="module")
def dist(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy of the tracked files: the checkout stays as it is, strays stay out."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not name.startswith(tuple(f"{link}/" for link in LINKS.values())):
            shutil.copy2(ROOT / name, target)
    for folder, link in LINKS.items():
        shutil.rmtree(copy / link)
        (copy / link).symlink_to(Path("..") / folder)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=copy)
    return out


def test_sdist_holds_every_tracked_file(dist: Path, tracked: set[str]) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if not m.isdir()}
    made = {n for n in names if n.startswith("kvmprobe.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == tracked


def test_wheel_holds_every_file_of_the_package(dist: Path, tracked: set[str]) -> None:
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        licenses = {
            n.split(".dist-info/licenses/")[1] for n in archive.namelist() if "/licenses/" in n
        }
    assert names == {n for n in tracked if n.startswith("kvmprobe/")}
    assert licenses == {"LICENSE", "LICENSES/GPL-2.0-only.txt"}


def test_wheel_runs_outside_the_checkout(dist: Path, tmp_path: Path) -> None:
    """The dependencies are this environment's, kvmprobe is the wheel's."""
    venv, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "venv", venv, cwd=elsewhere)
    pip = (venv / "bin/python", "-I", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=elsewhere)
    # A path in a .pth comes behind the environment's own packages and, unlike site.addsitedir(),
    # does not run the .pth of the editable install that lies there.
    (site,) = venv.glob("lib/python3*/site-packages")
    (outer,) = {p for p in sys.path if p.endswith("site-packages") and p.startswith(sys.prefix)}
    (site / "dependencies.pth").write_text(outer + "\n")

    where = run(
        venv / "bin/python", "-c", "import kvmprobe; print(kvmprobe.__file__)", cwd=elsewhere
    )
    assert Path(where.strip()).is_relative_to(venv)
    assert "record" in run(venv / "bin/kvmprobe", "--help", cwd=elsewhere)
    assert "internal-slot-fill" in run(venv / "bin/kvmprobe", "rules", cwd=elsewhere)
