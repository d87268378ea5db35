#!/bin/bash
# SPDX-License-Identifier: MIT
# PID 1 of the lab's VM becomes systemd, which runs the lab's init again as a unit.
ln -s /opt/venv/bin/kvmprobe /usr/local/bin/kvmprobe
cp /lab/kvmprobe-watch.service /etc/systemd/system/
mkdir -p /etc/kvmprobe /etc/systemd/system/kvmprobe-watch.service.d
# Only the emulator needs this: on a busy machine compiling takes it many minutes.
printf '[Service]\nTimeoutStartSec=infinity\n' >/etc/systemd/system/kvmprobe-watch.service.d/lab.conf
cat >/etc/systemd/system/lab.service <<'UNIT'
[Unit]
After=basic.target systemd-journald.service
Wants=systemd-journald.service
[Service]
Type=oneshot
ExecStart=/bin/bash -c 'exec bash /lab/init >/dev/console 2>&1'
UNIT
printf '[Unit]\nRequires=basic.target\nWants=lab.service\n' >/etc/systemd/system/lab.target
exec /lib/systemd/systemd --system --unit=lab.target --show-status=no
