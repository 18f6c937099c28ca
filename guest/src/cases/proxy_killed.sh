# Load on a disk at $blk whose device is another process, which is killed amid it, and on one at $local. Then the other
# process's device comes again at $place.
load_unit
load virtio_blk
for at in $blk $local; do
    until_true disk_there $at || fail "no disk at $at"
done
inside load 0 /dev/$(disk_of $blk) 0 $threads $blocks 0 0 &
inside load 1 /dev/$(disk_of $local) $threads 1 $blocks 0 0 &
listen
# Nothing of the load may be left to be mapped. This must be, and is never answered.
cat /dev/$(disk_of $blk) > /dev/null &
say CONFIG $(od -An -tx1 -N4 $(pci $blk)/config)
listen
until_true disk_there $place || fail "no disk at $place"
say AGAIN $(md5sum < /dev/$(disk_of $place) | cut -d' ' -f1)
# Drivers wait for a device that is gone for good: the host ends the machine.
listen
