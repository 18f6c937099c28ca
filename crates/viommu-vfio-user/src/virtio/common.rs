//! The common configuration (4.1.4.3): what the driver chose, and its queues.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_queue::{Queue, QueueT};

use super::feature;
use super::signal::NO_VECTOR;

/// What the driver has said of a queue.
#[derive(Debug)]
pub(super) struct QueueSetup {
    pub(super) max: u16,
    pub(super) size: u16,
    pub(super) vector: Arc<AtomicU16>,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

impl QueueSetup {
    pub(super) fn new(max: u16) -> Self {
        let vector = Arc::new(AtomicU16::new(NO_VECTOR));
        Self { max, size: max, vector, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }

    /// As it was before the driver came. The vector is the same place: whoever holds it finds none there.
    pub(super) fn reset(&mut self) {
        self.vector.store(NO_VECTOR, Ordering::SeqCst);
        let vector = self.vector.clone();
        *self = Self { vector, ..Self::new(self.max) };
    }

    /// The ring, if it is one.
    pub(super) fn ring(&self, features: u64) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(self.max)?;
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(vm_memory::GuestAddress(self.descriptors))?;
        queue.try_set_avail_ring_address(vm_memory::GuestAddress(self.driver))?;
        queue.try_set_used_ring_address(vm_memory::GuestAddress(self.device))?;
        queue.set_event_idx(features & feature::EVENT_IDX != 0);
        queue.set_ready(true);
        Ok(queue)
    }
}

/// Registers of the common configuration, by offset.
pub(super) mod register {
    pub(in crate::virtio) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(in crate::virtio) const DEVICE_FEATURE: u64 = 0x04;
    pub(in crate::virtio) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(in crate::virtio) const DRIVER_FEATURE: u64 = 0x0c;
    pub(in crate::virtio) const CONFIG_VECTOR: u64 = 0x10;
    pub(in crate::virtio) const NUM_QUEUES: u64 = 0x12;
    pub(in crate::virtio) const STATUS: u64 = 0x14;
    pub(in crate::virtio) const GENERATION: u64 = 0x15;
    pub(in crate::virtio) const QUEUE_SELECT: u64 = 0x16;
    pub(in crate::virtio) const QUEUE_SIZE: u64 = 0x18;
    pub(in crate::virtio) const QUEUE_VECTOR: u64 = 0x1a;
    pub(in crate::virtio) const QUEUE_ENABLE: u64 = 0x1c;
    pub(in crate::virtio) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(in crate::virtio) const QUEUE_DESC: u64 = 0x20;
    pub(in crate::virtio) const QUEUE_DRIVER: u64 = 0x28;
    pub(in crate::virtio) const QUEUE_DEVICE: u64 = 0x30;
    pub(in crate::virtio) const QUEUE_NOTIFY_DATA: u64 = 0x38;
    pub(in crate::virtio) const QUEUE_RESET: u64 = 0x3a;
    /// Bytes of them all.
    pub(in crate::virtio) const END: u64 = 0x3c;
}
