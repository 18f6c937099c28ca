# A disk at $blk whose device is another process: a file system is made, written, read back, and the driver comes and goes.
[ "$unit" = intel ] || load_unit
load virtio_blk
load ext4
until_true disk_there $blk || fail "no disk at $blk"
disk=/dev/$(disk_of $blk)
group=$(group_of $blk)
[ -n "$group" ] || fail "$blk is in no group"
say GROUP $blk $(cat /sys/kernel/iommu_groups/$group/type)
mke2fs $disk > /dev/null 2>&1 || fail "mke2fs"
mount -t ext4 $disk /mnt || fail "mount"
for i in 1 2 3 4; do
    dd if=/dev/urandom of=/mnt/$i bs=64k count=16 2> /dev/null || fail "write"
done
sync
before=$(cat /mnt/1 /mnt/2 /mnt/3 /mnt/4 | md5sum)
echo 3 > /proc/sys/vm/drop_caches
after=$(cat /mnt/1 /mnt/2 /mnt/3 /mnt/4 | md5sum)
[ "$before" = "$after" ] || fail "read back $after, wrote $before"
umount /mnt || fail "umount"
# The driver goes and comes again: the device is stopped and started, with other rings.
echo 0000:$blk > $(pci $blk)/driver/unbind
echo 0000:$blk > /sys/bus/pci/drivers_probe
until_true disk_there $blk || fail "no disk at $blk the second time"
disk=/dev/$(disk_of $blk)
mount -t ext4 $disk /mnt || fail "mount again"
after=$(cat /mnt/1 /mnt/2 /mnt/3 /mnt/4 | md5sum)
[ "$before" = "$after" ] || fail "read $after the second time, wrote $before"
umount /mnt || fail "umount again"
say DISK $(md5sum < $disk | cut -d' ' -f1)
