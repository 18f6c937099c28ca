# A disk at $blk and a source of random numbers at $rng behind the IOMMU: a file system is made, written, read back.
trace_on
load_unit
load virtio_blk
load virtio_rng
load ext4
until_true disk_there $blk || fail "no disk at $blk"
disk=/dev/$(disk_of $blk)
for at in $blk $rng; do
    group=$(group_of $at)
    [ -n "$group" ] || fail "$at is in no group"
    say GROUP $at $(cat /sys/kernel/iommu_groups/$group/type)
done
mke2fs $disk > /dev/null 2>&1 || fail "mke2fs"
mount -t ext4 $disk /mnt || fail "mount"
for i in 1 2 3 4; do
    dd if=/dev/urandom of=/mnt/$i bs=64k count=8 2> /dev/null || fail "write"
done
sync
before=$(cat /mnt/1 /mnt/2 /mnt/3 /mnt/4 | md5sum)
echo 3 > /proc/sys/vm/drop_caches
after=$(cat /mnt/1 /mnt/2 /mnt/3 /mnt/4 | md5sum)
[ "$before" = "$after" ] || fail "read back $after, wrote $before"
umount /mnt || fail "umount"
say DISK $(md5sum < $disk | cut -d' ' -f1)
say RNG $(dd if=/dev/hwrng bs=512 count=4 2> /dev/null | md5sum | cut -d' ' -f1) $(cat /sys/class/misc/hw_random/rng_current)
# The flush queue of lazy mode has sent all it holds by now.
sleep 0.3
echo quiet > $TRACING/trace_marker
say QUIET
listen
for at in $blk $rng; do
    echo 0000:$at > $(pci $at)/driver/unbind
done
sleep 0.3
echo unbound > $TRACING/trace_marker
say UNBOUND
listen
trace_out
