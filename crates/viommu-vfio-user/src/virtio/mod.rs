//! A virtio device as a PCI function: the modern transport (VIRTIO 1.3, section 4.1).

mod common;
mod function;
mod signal;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use virtio_queue::Queue;

use crate::memory::Window;
use crate::server::Link;

pub use function::VirtioFunction;
pub use signal::{DeviceSignal, DriverState, QueueSignal};

/// Bits of `device_status` (2.1).
pub mod status {
    #![expect(missing_docs, reason = "the specification's own names")]
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// Feature bits that concern the transport and the rings (6).
pub mod feature {
    #![expect(missing_docs, reason = "the specification's own names")]
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    pub const RING_RESET: u64 = 1 << 40;
}

/// Who resets a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetBy {
    /// Its driver.
    Driver,
    /// The machine, or the client that went away.
    Machine,
}

/// A virtio device behind a [`VirtioFunction`].
///
/// All methods are called on the server's thread, one at a time, while the client waits. A device that takes its time
/// has a thread of its own, and wakes it in [`Device::notify`].
pub trait Device: Send {
    /// Virtio's number for this kind of device. Constant.
    fn device_type(&self) -> u16;

    /// PCI class, 0x00BBSSPP. Constant.
    fn class(&self) -> u32;

    /// The greatest size of each queue: powers of two, 32768 at most. Constant.
    fn queue_sizes(&self) -> Vec<u16>;

    /// What is offered; the transport adds VERSION_1 and RING_RESET.
    fn features(&self) -> u64;

    /// The driver has chosen. What it chose is a part of what was offered. `false`: it cannot be served so.
    fn negotiate(&mut self, features: u64) -> bool;

    /// Reads the device's configuration; what lies behind its end is zero.
    fn read_config(&mut self, offset: u64, data: &mut [u8]);

    /// Writes it; what cannot be written is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _unused = (offset, data);
    }

    /// The driver runs now: how to tell it of the device as a whole. Before the first [`Device::start`].
    fn ready(&mut self, signal: DeviceSignal) {
        let _unused = signal;
    }

    /// A queue begins. There may be something in it already.
    fn start(&mut self, index: u16, queue: Queue, signal: QueueSignal);

    /// A queue ends. Returns when it is not touched any more.
    fn stop(&mut self, index: u16);

    /// The driver has put something into a queue that was started.
    fn notify(&mut self, index: u16);

    /// The device is reset; all its queues have ended before. Returns when that is over.
    fn reset(&mut self, by: ResetBy);

    /// An event that comes to the same as [`Device::notify`], for a queue that has a thread of its own to wait for it.
    /// Constant.
    fn doorbell(&self, index: u16) -> Option<Arc<OwnedFd>> {
        let _unused = index;
        None
    }

    /// See [`Function::connected`](crate::Function::connected).
    fn connected(&mut self, link: &Link) {
        let _unused = link;
    }

    /// See [`Function::mapped`](crate::Function::mapped).
    fn mapped(&mut self, window: Window) {
        let _unused = window;
    }

    /// See [`Function::unmapped`](crate::Function::unmapped).
    fn unmapped(&mut self, window: Window) {
        let _unused = window;
    }

    /// See [`Function::events`](crate::Function::events).
    fn events(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// See [`Function::event`](crate::Function::event).
    fn event(&mut self, index: usize) {
        let _unused = index;
    }
}

#[cfg(test)]
mod tests;
