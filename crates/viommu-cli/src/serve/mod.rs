//! `viommu serve`: a virtio-iommu and devices behind it, for a virtual machine monitor that speaks vfio-user.

pub(crate) mod args;
pub(crate) mod device;
pub(crate) mod options;
