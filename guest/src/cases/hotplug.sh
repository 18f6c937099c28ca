# Waits for a source of random numbers at $rng, uses it, removes it, finds it again.
load_unit
load virtio_rng
[ -e $(pci $rng) ] && fail "$rng is there already"
say EMPTY
used() {
    until_true [ -e $(pci $rng)/driver ] || fail "no device at $rng, or no driver"
    until_true grep -q virtio_rng /sys/class/misc/hw_random/rng_current || fail "not the source of random numbers"
    [ "$(dd if=/dev/hwrng bs=64 count=16 2> /dev/null | wc -c)" = 1024 ] || fail "no random numbers"
    [ -n "$(group_of $rng)" ] || fail "$rng is in no group"
    say USED
    listen
}
used
port=$(dirname $(readlink -f $(pci $rng)))
echo 1 > $(pci $rng)/remove
[ -e $(pci $rng) ] && fail "$rng is still there"
say REMOVED
listen
echo 1 > $port/rescan 2> /dev/null || echo 1 > /sys/bus/pci/rescan
used
