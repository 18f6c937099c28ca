# Loads $modules, hands the devices at $vfio to vfio-pci, and runs inside $words, or the program $program with them:
# lists, separated by commas.
list() { echo $1 | tr , ' '; }

for module in $(list $modules); do load $module; done
# A virtio-iommu has nothing to say on interrupts, and VFIO wants to hear that this is known.
unsafe=/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts
[ ! -e $unsafe ] || echo 1 > $unsafe
for address in $(list $vfio); do
    echo vfio-pci > $(pci $address)/driver_override
    [ ! -e $(pci $address)/driver ] || echo 0000:$address > $(pci $address)/driver/unbind
    echo 0000:$address > /sys/bus/pci/drivers_probe
    # Some kernels give a device its group when a driver comes.
    [ -n "$(group_of $address)" ] || fail "$address has no IOMMU group"
    [ -e /dev/vfio/$(group_of $address) ] || fail "$address is not with vfio-pci"
done
case $program in
    replay)
        # A kernel with a simulator of vDPA has it built in.
        [ ! -e /sys/bus/vdpa ] || inside vdpa-add vdpasim_blk || fail "no vDPA device"
        for interface in $(list $words); do
            viommu replay --format json --mirror $interface > /tmp/json 2> /tmp/errors ||
                fail "viommu replay --mirror $interface: $(cat /tmp/errors)"
            say "REPLAY $(cat /tmp/json)"
        done
        ;;
    *) inside $(list $words) || fail "inside $words" ;;
esac
