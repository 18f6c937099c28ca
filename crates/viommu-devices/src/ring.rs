//! Taking what is in a ring, and giving it back.

use core::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// Requests of one batch.
pub(crate) const BATCH: usize = 64;
/// Descriptors of a batch, of chains that are none too: with them, it has been filled.
pub(crate) const DESCRIPTORS: usize = 4096;

/// What one call of a device's `process` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Processed {
    /// Requests given back to the driver.
    pub requests: usize,
    /// The driver wants to be interrupted for them.
    pub interrupt: bool,
    /// There is more in the ring: call again soon, for the driver will not kick for it.
    pub more: bool,
}

/// The ring itself is not usable: the device needs a reset (`DEVICE_NEEDS_RESET`), which the transport tells.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The rings lie outside memory, the driver's index is nonsense, or a head is no descriptor of the table.
    #[error("the ring is broken: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The available ring holds an entry that cannot be read.
    #[error("an entry of the available ring cannot be read")]
    Unreadable,
}

/// What is to become of a chain that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is taken; the next one may be looked at.
    Taken,
    /// It is taken, and nothing after it now.
    Last,
    /// It stays in the ring, with everything after it.
    PutBack,
}

/// Kicks are not needed while the ring is looked at.
pub(crate) fn begin<M: GuestMemory>(queue: &mut Queue, memory: &M) -> Result<(), QueueError> {
    if !queue.ready() {
        return Err(virtio_queue::Error::QueueNotReady.into());
    }
    Ok(queue.disable_notification(memory)?)
}

/// Shows `each` the chains in the ring, at most [`BATCH`]. Gives whether there are more.
pub(crate) fn take<'m, M: GuestMemory>(
    queue: &mut Queue,
    memory: &'m M,
    mut each: impl FnMut(DescriptorChain<&'m M>) -> Verdict,
) -> Result<bool, QueueError> {
    let there = queue.avail_idx(memory, Ordering::Acquire)?.0.wrapping_sub(queue.next_avail());
    let size = queue.size();
    let mut chains = queue.iter(memory)?;
    for seen in 0..BATCH {
        let Some(chain) = chains.next() else {
            // The iterator ends at an entry that it cannot read, too.
            return if seen < usize::from(there) { Err(QueueError::Unreadable) } else { Ok(false) };
        };
        if chain.head_index() >= size {
            return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
        }
        match each(chain) {
            Verdict::Taken => {}
            Verdict::Last => break,
            Verdict::PutBack => {
                chains.go_to_previous_position();
                break;
            }
        }
    }
    Ok(queue.avail_idx(memory, Ordering::Acquire)?.0 != queue.next_avail())
}

/// Gives heads back with the lengths that were written, and looks what the driver wants to be told.
pub(crate) fn give<M: GuestMemory>(
    queue: &mut Queue,
    memory: &M,
    answers: impl Iterator<Item = (u16, u32)>,
    more: bool,
) -> Result<Processed, QueueError> {
    let mut requests = 0_usize;
    for (head, len) in answers {
        queue.add_used(memory, head, len)?;
        requests = requests.saturating_add(1);
    }
    let interrupt = requests > 0 && wants_interrupt(queue, memory)?;
    // While there is more, kicks are not needed.
    let more = more || queue.enable_notification(memory)?;
    Ok(Processed { requests, interrupt, more })
}

/// Whether the driver wants to be interrupted for what has been used since the last time. Without EVENT_IDX its flag
/// says so, which virtio-queue does not look at; a driver that polls (Linux's does) is spared an exit a batch.
fn wants_interrupt<M: GuestMemory>(queue: &mut Queue, memory: &M) -> Result<bool, virtio_queue::Error> {
    const NO_INTERRUPT: u16 = 1;
    // With a fence between what was used and the look at what is wanted.
    let wanted = queue.needs_notification(memory)?;
    if !wanted || queue.event_idx_enabled() {
        return Ok(wanted);
    }
    let flags = memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed);
    let flags = flags.map(u16::from_le).map_err(virtio_queue::Error::GuestMemory)?;
    Ok(flags & NO_INTERRUPT == 0)
}
