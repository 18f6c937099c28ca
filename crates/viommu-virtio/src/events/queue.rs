//! The event queue: buffers of the driver that take fault reports.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
use zerocopy::IntoBytes;

use crate::device::VirtioIommu;
use crate::journal::Entry;
use crate::metrics::bump;
use crate::queue::chain::Frame;
use crate::queue::near::Near;
use crate::queue::{Interrupt, QueueError, wants_interrupt};
use crate::spec::event;

/// Gives fault reports to the driver. Call [`EventQueue::process`] when the driver has put buffers there, and when the
/// notifier says that there are faults ([`VirtioIommu::notify_faults`]).
pub struct EventQueue<M> {
    device: VirtioIommu,
    queue: Queue,
    memory: M,
    interrupt: Interrupt,
    frame: Frame,
}

impl<M> EventQueue<M>
where
    M: GuestAddressSpace,
    M::M: GuestMemoryBackend,
{
    pub(crate) fn new(device: VirtioIommu, queue: Queue, memory: M, interrupt: Interrupt) -> Self {
        Self { device, queue, memory, interrupt, frame: Frame::default() }
    }

    /// Reports as many faults as there are buffers for. A buffer that is too small for a report is given back empty: a
    /// report is never split. Gives the number of reports.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn process(&mut self) -> Result<usize, QueueError> {
        let memory = self.memory.memory();
        let memory = &Near::new(&*memory);
        let faults = self.device.faults();
        let mut reported = 0_usize;
        let mut used = false;
        // A driver that puts back what it gets while this runs does not keep it here for ever.
        let mut buffers = self.queue.size();
        while buffers > 0 {
            let Some(fault) = faults.take() else { break };
            let Some(chain) = self.queue.iter(memory)?.next() else {
                faults.put_back(fault);
                if self.queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            buffers = buffers.saturating_sub(1);
            let (head, longest) = (chain.head_index(), self.queue.size());
            let fits = self.frame.read(memory, chain, longest).is_ok()
                && self.frame.can_write(memory, 0, event::SIZE)
                && self.frame.write(memory, 0, fault.as_bytes()).is_ok();
            let len = if fits { event::SIZE } else { 0 };
            self.queue.add_used(memory, head, u32::try_from(len).unwrap_or(0))?;
            used = true;
            if fits {
                bump(&self.device.counters().events_sent);
                self.device.note(|| Entry::Fault(fault));
                reported = reported.saturating_add(1);
            } else {
                faults.put_back(fault);
                bump(&self.device.counters().small_buffers);
            }
        }
        if used && wants_interrupt(&mut self.queue, memory)? {
            (self.interrupt)();
        }
        Ok(reported)
    }

    /// The queue, for the transport to set up or to save.
    pub fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// The queue as it was before it was set up. Faults that wait stay.
    pub fn reset(&mut self) {
        self.queue.reset();
    }
}
