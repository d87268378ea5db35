#!/bin/bash
# SPDX-License-Identifier: MIT
# The VM's init, on the run's own disk: set the machine up, run /lab/command, hand back what came
# of it.  /lab/vendor names the KVM module.  Never ends: the power goes off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/venv/bin
export HOME=/root LC_ALL=C.UTF-8 TERM=dumb LAB_VENDOR=$(</lab/vendor)

if [ $$ = 1 ]; then
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t tracefs tracefs /sys/kernel/tracing
    mount -t debugfs debugfs /sys/kernel/debug
    mount -t bpf bpf /sys/fs/bpf
    mkdir -p /dev/pts /dev/shm
    mount -t devpts devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /run
    mount -t tmpfs tmpfs /tmp
    mount --bind /lab/out /out
    mount --bind /lab/code /opt/kvmprobe
    mount --bind /lab/modules /lib/modules
    ln -sf /proc/self/fd /dev/fd
    busybox ip link set lo up
    modprobe "kvm_$LAB_VENDOR" || echo "lab: kvm_$LAB_VENDOR did not load"
    [ ! -e /lab/lab_slot.ko ] || insmod /lab/lab_slot.ko
    # A job may bring another PID 1, a service manager: that one runs this file again.
    [ ! -e /lab/first ] || exec bash /lab/first
fi

cd /out
echo "LAB-START $(cut -d' ' -f1 /proc/uptime)"
bash /lab/command </dev/null 2>&1 | tee /lab/output
status=${PIPESTATUS[0]}

cd /
echo "$status" >/lab/status
kill -9 -1
sync
umount /out /opt/kvmprobe /lib/modules
mount -o remount,ro /lab || sync
# The serial line is slow in Bochs: what is still in its buffer would be lost.
sleep 2
echo "LAB-END $status"
sleep 1
busybox poweroff -f
