# A device at $other that no driver of the kernel's knows: looked at, and driven from user space.
load_unit
until_true [ -e $(pci $other) ] || fail "no device at $other"
say IDENTITY $(cat $(pci $other)/vendor $(pci $other)/device $(pci $other)/class)
say SIZES $(sed -n '1p;3p' $(pci $other)/resource)
load vfio_iommu_type1
load vfio_pci
# An IOMMU that is served has nothing to say on interrupts, and VFIO wants to hear that this is known.
echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts
echo vfio-pci > $(pci $other)/driver_override
echo 0000:$other > /sys/bus/pci/drivers_probe
inside rust-vmm 0000:$other $(group_of $other) || fail "driven from user space"
