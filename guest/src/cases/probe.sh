# The source of random numbers at $rng in two guises: the kernel's driver, then user space through vfio-pci, then the
# kernel's driver again.
load_unit
load virtio_rng
until_true grep -qv none /sys/class/misc/hw_random/rng_current || fail "no rng at $rng"
random() { dd if=/dev/hwrng bs=64 count=16 2> /dev/null | wc -c; }
[ "$(random)" = 1024 ] || fail "no random numbers by the kernel's driver"
say KERNEL

load vfio_iommu_type1
load vfio_pci
# An IOMMU that is served has nothing to say on interrupts, and VFIO wants to hear that this is known.
echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts
echo vfio-pci > $(pci $rng)/driver_override
echo 0000:$rng > $(pci $rng)/driver/unbind
echo 0000:$rng > /sys/bus/pci/drivers_probe
inside probe 0000:$rng $(group_of $rng) || fail "probe"
# The interrupts of a VT-d unit, of all processors.
[ "$unit" != vtd ] || say DMAR $(sed -n '/DMAR-MSI/s/^[^:]*: *\([0-9]*\) .*/\1/p' /proc/interrupts)
say PROBED
listen

echo > $(pci $rng)/driver_override
echo 0000:$rng > $(pci $rng)/driver/unbind
echo 0000:$rng > /sys/bus/pci/drivers_probe
until_true [ -e $(pci $rng)/driver ] || fail "the kernel's driver does not come back"
[ "$(random)" = 1024 ] || fail "no random numbers after user space had the device"
say KERNEL_AGAIN
listen
