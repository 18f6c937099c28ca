//! The device against the specification's own list, item by item (VIRTIO 1.4, "IOMMU Device": what the device must and
//! should do, D1 to D47 in its order), what Linux's driver does, the choices that are left to a device, and rings as a
//! hostile driver lays them.

mod drivers;
mod faults;
mod features;
mod hostile;
mod journal;
mod mappings;
mod probe;
mod rig;
mod splits;
mod state;
mod topology;
mod views;
