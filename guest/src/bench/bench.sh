# The disk at $blk is read and written, $small requests of 4 KiB and $large of 64 KiB each way.
load virtio_iommu
load virtio_blk
until_true disk_there $blk || fail "no disk at $blk"
disk=/dev/$(disk_of $blk)
group=$(group_of $blk)
[ -z "$group" ] || say GROUP $(cat /sys/kernel/iommu_groups/$group/type)
say CLOCK $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
say READY
listen
inside time $disk 4096 $small || fail "4 KiB"
say SMALL
listen
inside time $disk 65536 $large || fail "64 KiB"
