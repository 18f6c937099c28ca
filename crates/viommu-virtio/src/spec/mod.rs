//! What lies in memory between driver and device: layouts and numbers of VIRTIO 1.4, "IOMMU Device", and no behaviour.
//!
//! Every bit pattern of every structure here is a value: what the driver writes is looked at later, and what is unknown
//! keeps its number. All integers are little-endian; ranges are inclusive at both ends.

pub mod config;
pub mod event;
pub mod property;
pub mod request;

use bitflags::bitflags;

/// The device's type number ("Device ID").
pub const DEVICE_ID: u32 = 23;
/// The PCI device id: 0x1040 and the type. There is no transitional one.
pub const PCI_DEVICE_ID: u16 = 0x1057;
/// The queue with requests ("Virtqueues").
pub const REQUEST_QUEUE: u16 = 0;
/// The queue with fault reports ("Virtqueues").
pub const EVENT_QUEUE: u16 = 1;

bitflags! {
    /// Feature bits of the device ("Feature bits"), without those of every device.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    pub struct Features: u64 {
        /// `input_range` limits the addresses.
        const INPUT_RANGE = 1 << 0;
        /// `domain_range` limits the numbers of domains.
        const DOMAIN_RANGE = 1 << 1;
        /// Requests MAP and UNMAP exist.
        const MAP_UNMAP = 1 << 2;
        /// Endpoints that are attached to nothing bypass: replaced by BYPASS_CONFIG, which is never offered with it.
        const BYPASS = 1 << 3;
        /// The request PROBE exists.
        const PROBE = 1 << 4;
        /// MAP may say that the target is MMIO.
        const MMIO = 1 << 5;
        /// The field `bypass` can be written, and ATTACH has a flag BYPASS.
        const BYPASS_CONFIG = 1 << 6;

        const _ = !0;
    }
}
