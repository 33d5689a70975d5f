#!/bin/busybox sh
# The first program on the disk: mounts what a node has, cgroup version 2 alone, and runs the tests.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/tmp RUST_BACKTRACE=1
end() {
    sync
    echo "minipod-vm: exit $1"
    poweroff -f
    sleep 60
}
mount -t proc none /proc
mount -t sysfs none /sys
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
mount -t mqueue none /dev/mqueue
mount -t tmpfs none /run
mount -t cgroup2 none /sys/fs/cgroup || end 90
# AppArmor's profiles are loaded through it.
mount -t securityfs none /sys/kernel/security || end 92
export MINIPOD_HAS_APPARMOR=1
mount --make-rshared /
ip link set lo up
# What two tests ask for at once is loaded for one of them and missing for the other.
for module in overlay veth bridge nf_tables; do
    modprobe $module || end 91
done
echo "==> the machine: $(uname -sr), cgroup2 with $(cat /sys/fs/cgroup/cgroup.controllers)"
