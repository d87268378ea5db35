# SPDX-License-Identifier: MIT
"""The shipped unit under a systemd that is PID 1: in namespaces of this machine, not in a VM.

python3 -m tests.lab.service

Its root is this machine's, seen through an overlay: nothing is written to it.  Needs root, systemd,
/dev/kvm, and a python3 below /usr.  The kernel is the real one, so the probes are too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CGROUPS = "/sys/fs/cgroup/unified", "/sys/fs/cgroup"
_PORT = 19973
_MINUTES = 20

#: Run in new namespaces: the root, then systemd.  $1 scratch, $2 checkout, $3 libraries of Python.
_ENTER = r"""
set -e
mount --make-rprivate /
mkdir "$1/disk"; mount -t tmpfs tmpfs "$1/disk"
mkdir "$1/disk/up" "$1/disk/work" "$1/disk/root"
R="$1/disk/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/disk/up,workdir=$1/disk/work" "$R"
mkdir -p "$R/opt/kvmprobe" "$R/etc/kvmprobe"
mount -t tmpfs tmpfs "$R/opt/kvmprobe"
cp -r "$2/kvmprobe" "$2/probes" "$2/analysis" "$2/packaging" "$R/opt/kvmprobe/"
mkdir "$R/opt/kvmprobe/libraries"; mount --bind "$3" "$R/opt/kvmprobe/libraries"
mount -t proc proc "$R/proc"
mount -t sysfs sysfs "$R/sys"
mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
mount -t tmpfs tmpfs "$R/run"
mount -t tmpfs tmpfs "$R/tmp"
mount --rbind /dev "$R/dev"
mount --bind "$1/out" "$R/mnt"
cp "$R/opt/kvmprobe/packaging/kvmprobe-watch.service" "$R/etc/systemd/system/"
cp "$1/out/watch.toml" "$R/etc/kvmprobe/"
cp "$1/out/kvmprobe" "$R/usr/local/bin/"
cp "$1/out/try.service" "$1/out/try.target" "$R/etc/systemd/system/"
exec chroot "$R" env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=try.target --log-target=console --show-status=no
"""

_FILES = {
    "kvmprobe": """#!/bin/sh
export PYTHONPATH=/opt/kvmprobe:/opt/kvmprobe/libraries PYTHONDONTWRITEBYTECODE=1
exec /usr/bin/python3 -c 'from kvmprobe.cli.main import main; main()' "$@"
""",
    "watch.toml": f'metrics.listen = "127.0.0.1:{_PORT}"\n',
    "try.target": "[Unit]\nWants=try.service systemd-journald.socket\n",
    "try.service": f"""[Unit]
DefaultDependencies=no
Wants=systemd-journald.service
After=systemd-journald.service
[Service]
Type=oneshot
ExecStart=/bin/sh /mnt/steps
TimeoutStartSec={60 * _MINUTES}
StandardOutput=file:/mnt/said
StandardError=file:/mnt/said
""",
    "steps": f"""
W=kvmprobe-watch
show() {{ systemctl show "$W" -p ActiveState -p Result -p NRestarts; }}
echo "PID 1: $(cat /proc/1/comm)"
echo "== start"; systemctl start $W; echo "status $?"; show
P=$(systemctl show -p MainPID --value $W); grep CapEff "/proc/$P/status"
echo "== reload"; systemctl reload $W; echo "status $?"
sleep 3; echo 'colour = 1' >> /etc/kvmprobe/watch.toml
echo "== bad reload"; systemctl reload $W; sleep 3
/usr/bin/python3 -c 'import urllib.request as u
print(u.urlopen("http://127.0.0.1:{_PORT}/metrics").read().decode())' | grep '^kvmprobe_config_good'
sed -i /colour/d /etc/kvmprobe/watch.toml
systemd-analyze security $W --no-pager | tail -1
echo "== watchdog"; kill -STOP "$P"
for i in $(seq 120); do sleep 1; systemctl is-active -q $W || break; done; show
for i in $(seq 600); do sleep 1; systemctl is-active -q $W && break; done; show
echo "== stop"; systemctl stop $W; show; ls /run/kvmprobe 2>&1
echo "== journal"; journalctl -u $W -o cat --no-pager
touch /mnt/done
""",
}

#: What has to be said, in this order.
_EXPECTED = (
    "PID 1: systemd",
    "== start",
    "status 0",
    "ActiveState=active",
    # CAP_PERFMON and CAP_BPF
    "CapEff:\t000000c000000000",
    "== reload",
    "status 0",
    "== bad reload",
    "kvmprobe_config_good 0.0",
    "== watchdog",
    "Result=watchdog",
    "NRestarts=1",
    "== stop",
    "ActiveState=inactive",
    "No such file or directory",
    "== journal",
    "the configuration was read again",
    "colour: unknown key",
)


def missing(said: str) -> str | None:
    """The first expected text that was not said in its place; None: all were."""
    at = 0
    for text in _EXPECTED:
        at = said.find(text, at)
        if at < 0:
            return text
        at += len(text)
    return None


def main() -> None:
    """Run the unit through its life, print what was said, and exit with 1 if something lacks."""
    cgroups = next((Path(p) for p in _CGROUPS if (Path(p) / "cgroup.procs").exists()), None)
    if os.geteuid() != 0 or cgroups is None or not shutil.which("systemctl"):
        sys.exit("this needs root, systemd and cgroups of version 2")
    libraries = next(p for p in sys.path if p.endswith("site-packages"))
    own = cgroups / f"kvmprobe-lab-{os.getpid()}"
    own.mkdir()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "out").mkdir()
        for file, text in _FILES.items():
            (scratch / "out" / file).write_text(text)
            (scratch / "out" / file).chmod(0o755)
        enter = ("unshare", "-pfmC", "--kill-child", "sh", "-c", _ENTER, "sh")
        process = subprocess.Popen(
            [*enter, str(scratch), str(ROOT), libraries],
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: (own / "cgroup.procs").write_text("0") and None,
        )
        end = time.monotonic() + 60 * _MINUTES
        while not (scratch / "out/done").exists() and time.monotonic() < end:
            if process.poll() is not None:
                break
            time.sleep(0.5)
        process.kill()
        process.wait()
        path = scratch / "out/said"
        said = path.read_text() if path.exists() else ""
    for directory in sorted(own.rglob("*/"), reverse=True):
        directory.rmdir()
    own.rmdir()
    print(said)
    lacking = missing(said)
    if lacking is not None:
        sys.exit(f"not said: {lacking}")


if __name__ == "__main__":
    main()
