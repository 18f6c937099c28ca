# The group of the disk at $blk is translated, then not, then translated again; the disk is written and read in each.
load_unit
load virtio_blk
kind=/sys/kernel/iommu_groups/$(group_of $blk)/type
number=0
for want in DMA identity DMA; do
    if [ "$(cat $kind)" != $want ]; then
        echo 0000:$blk > /sys/bus/pci/drivers/virtio-pci/unbind
        echo $want > $kind || fail "the group does not become $want"
        echo 0000:$blk > /sys/bus/pci/drivers/virtio-pci/bind
    fi
    until_true disk_there $blk || fail "no disk at $blk"
    disk=/dev/$(disk_of $blk)
    number=$((number + 1))
    dd if=/dev/urandom of=/tmp/block bs=64k count=4 2> /dev/null
    dd if=/tmp/block of=$disk bs=64k seek=$number oflag=direct 2> /dev/null || fail "write"
    dd if=$disk bs=64k skip=$number count=4 iflag=direct 2> /dev/null | cmp - /tmp/block || fail "other bytes"
    say NOW $(cat $kind)
    listen
done
