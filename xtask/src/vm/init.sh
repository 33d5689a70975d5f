#!/bin/busybox sh
# The first program of the initramfs: finds the disk and goes there.
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t devtmpfs none /dev
for module in $(/bin/busybox cat /modules); do
    /bin/busybox insmod "/$module" || /bin/busybox echo "cannot load $module"
done
tries=0
until [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -lt 200 ] || { /bin/busybox echo "there is no disk"; /bin/busybox poweroff -f; }
    /bin/busybox usleep 50000
done
/bin/busybox mount -t ext4 /dev/vda /root || /bin/busybox poweroff -f
/bin/busybox umount /proc
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/vm-init
