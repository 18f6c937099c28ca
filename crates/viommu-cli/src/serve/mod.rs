//! `viommu serve`: a virtio-iommu and devices behind it, for a virtual machine monitor that speaks vfio-user.

pub(crate) mod args;
pub(crate) mod control;
pub(crate) mod device;
pub(crate) mod options;
pub(crate) mod qemu;
pub(crate) mod record;
pub(crate) mod snapshot;
pub(crate) mod socket;
pub(crate) mod viot;
