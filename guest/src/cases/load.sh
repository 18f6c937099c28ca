# Load on the disks at $disks, with $threads threads each that write $writes times, or for $seconds.
load virtio_iommu
load virtio_blk
disks=$(echo $disks | tr , ' ')
for at in $disks; do
    until_true [ -n "$(disk_of $at)" ] || fail "no disk at $at"
    say GROUP $at $(group_of $at)
done
if [ -n "$rng" ]; then
    load virtio_rng
    dd if=/dev/hwrng of=/dev/null bs=512 2> /dev/null &
fi
say LOADING
number=0
workers=
for at in $disks; do
    inside load $number /dev/$(disk_of $at) $((number * 100)) $threads $blocks $writes $seconds &
    workers="$workers $!"
    number=$((number + 1))
done
for worker in $workers; do
    wait $worker || fail "load"
done
sleep 0.3
say LOADED
listen
