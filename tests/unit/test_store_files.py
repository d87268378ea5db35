# SPDX-License-Identifier: MIT
"""Creating output files: nothing replaced unasked, no link followed, private, given back."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmprobe.errors import CaptureError
from kvmprobe.store.files import create_file, create_output


def put(path: Path, data: bytes, *, force: bool = False) -> None:
    fd = create_file(path, force=force)
    os.write(fd, data)
    os.close(fd)


def document(path: Path, data: bytes, *, force: bool = False) -> None:
    with create_output(path, force=force) as file:
        file.write(data)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


Write = Callable[..., None]
BOTH = pytest.mark.parametrize("write", [put, document])


@BOTH
def test_private_and_whole(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "out"
    old = os.umask(0)
    try:
        write(path, b"data")
    finally:
        os.umask(old)
    assert path.read_bytes() == b"data"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path) == ["out"]


@BOTH
def test_existing_file_is_kept_unless_forced(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(CaptureError, match=r"out exists; pass --force to replace it"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    with path.open("rb") as reader:
        write(path, b"new", force=True)
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path) == ["out"]


@BOTH
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_not_followed(tmp_path: Path, write: Write, force: bool, dangling: bool) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if not dangling:
        target.write_bytes(b"precious")
    link.symlink_to(target)
    with pytest.raises(CaptureError, match="symbolic link"):
        write(link, b"new", force=force)
    assert link.is_symlink()
    assert target.exists() != dangling
    assert dangling or target.read_bytes() == b"precious"


@BOTH
def test_only_regular_files_are_replaced(tmp_path: Path, write: Write) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CaptureError, match="not a regular file"):
        write(tmp_path / "pipe", b"", force=True)
    with pytest.raises(CaptureError, match="is a directory"):
        write(tmp_path / "folder", b"", force=True)
    with pytest.raises(CaptureError, match="not a regular file"):
        write(Path("/dev/null"), b"", force=True)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@BOTH
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere/out", "No such file or directory"),
        ("x" * 300, "File name too long"),
        ("nul\0byte", "embedded null"),
    ],
)
def test_impossible_places(tmp_path: Path, write: Write, name: str, says: str) -> None:
    with pytest.raises(CaptureError, match=says):
        write(tmp_path / name, b"")


@BOTH
def test_longest_name_can_be_replaced(tmp_path: Path, write: Write) -> None:
    path = tmp_path / ("x" * 255)
    path.write_bytes(b"old")
    write(path, b"new", force=True)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("force", [False, True])
def test_document_is_whole_or_not_there(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "out"
    if force:
        path.write_bytes(b"old")

    def interrupted() -> None:
        with create_output(path, force=force) as file:
            file.write(b"half")
            file.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == (["out"] if force else [])
    assert not force or path.read_bytes() == b"old"


def test_document_stands_under_its_name_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with create_output(path, force=True) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_stream_stands_under_its_name_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    fd = create_file(path, force=True)
    try:
        assert path.read_bytes() == b""
    finally:
        os.close(fd)


@BOTH
@pytest.mark.parametrize("force", [False, True])
def test_under_sudo_the_file_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, force: bool
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    path = tmp_path / "out"
    if force:
        path.write_bytes(b"old")
    monkeypatch.setenv("SUDO_UID", "12345")
    monkeypatch.setenv("SUDO_GID", "54321")
    write(path, b"", force=force)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


@pytest.mark.parametrize("uid", ["", "abc", "-7", "99999999999999999999"])
def test_senseless_sudo_variables_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: str
) -> None:
    monkeypatch.setenv("SUDO_UID", uid)
    monkeypatch.setenv("SUDO_GID", uid)
    put(tmp_path / "out", b"data")
    assert (tmp_path / "out").stat().st_uid == os.geteuid()


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare, which mounts a tiny file system for this test alone")
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    mount = [
        unshare,
        "--mount",
        "sh",
        "-c",
        f"mount -t tmpfs -o size=64k none {tiny} && exec $0 $@",
    ]
    if subprocess.run([*mount, "true"], capture_output=True).returncode != 0:
        pytest.skip("this user or container may not mount a file system")
    code = (
        "import os, pathlib\n"
        "from kvmprobe.errors import CaptureError\n"
        "from kvmprobe.store.files import create_output\n"
        "try:\n"
        "    with create_output('out') as f: f.write(bytes(1 << 20))\n"
        "except CaptureError as e: print(e, os.listdir())\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [*mount, "env", "-C", str(tiny), sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout == (
        "can't write out: the disk is full; free some space or choose another place []\n"
    ), done.stderr
