//! The request queue: requests in ring order, answers when their steps are complete.

pub(crate) mod chain;
pub(crate) mod near;

use core::sync::atomic::Ordering;
use core::task::{Context, Poll};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use viommu::{Blocker, Completion, WaitError};
use virtio_queue::{AvailIter, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend};

use crate::device::VirtioIommu;
use crate::device::execute::{Executor, Requests};
use chain::Frame;
use near::Near;

/// Times that one [`RequestQueue::process`] looks for more: a driver that goes on filling the ring does not keep it.
const ROUNDS: usize = 4;

/// Called when the driver is to be interrupted for a queue.
pub(crate) type Interrupt = Box<dyn Fn() + Send>;

/// Whether the driver wants to be interrupted for what has been used since the last time. Without EVENT_IDX its flag
/// says so, which virtio-queue does not look at; a driver that polls (Linux's does) is spared an exit a batch.
pub(crate) fn wants_interrupt(
    queue: &mut Queue,
    memory: &impl GuestMemory,
) -> Result<bool, virtio_queue::Error> {
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

/// The ring itself is not usable: the device needs a reset (`DEVICE_NEEDS_RESET`), which the transport tells.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The rings lie outside memory, or the driver's index is nonsense.
    #[error("the ring is broken: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The driver has put a request into the ring again that was not answered yet.
    #[error("more requests than the ring holds")]
    TooMany,
}

/// Answers of one [`RequestQueue::process`] that wait for the same.
struct Waiting {
    answers: usize,
    unmaps: u64,
    done: Completion,
    since: Instant,
}

/// What is in the ring now, and the answers that are not given back.
struct Ring<'q, 'm, M: GuestMemoryBackend> {
    memory: &'q Near<'m, M>,
    chains: AvailIter<'q, &'q Near<'m, M>>,
    size: u16,
    answers: &'q mut VecDeque<(u16, u32)>,
    /// As many requests are out as the ring holds, and there are more: they cannot all be requests of their own.
    overflow: bool,
}

impl<M: GuestMemoryBackend> Requests for Ring<'_, '_, M> {
    fn next(&mut self, frame: &mut Frame) -> Option<(u16, bool)> {
        let chain = self.chains.next()?;
        if self.answers.len() >= usize::from(self.size) {
            self.overflow = true;
            return None;
        }
        let head = chain.head_index();
        Some((head, frame.read(self.memory, chain, self.size).is_ok()))
    }

    fn answer(&mut self, head: u16, used: u32) {
        self.answers.push_back((head, used));
    }
}

/// Takes requests and answers them. One thread at a time has it: a worker, or the embedder's event loop.
///
/// Call [`RequestQueue::process`] when the driver has kicked. It executes all requests at once and in order; their
/// statuses are written at once too, but the driver gets a request back only when nothing uses any more what it took
/// away. Until then call [`RequestQueue::poll`] (an event loop, with its waker) or [`RequestQueue::wait`] (a thread).
pub struct RequestQueue<M> {
    device: VirtioIommu,
    queue: Queue,
    memory: M,
    interrupt: Interrupt,
    frame: Frame,
    /// Head and used length of what is executed and not given back, in order.
    answers: VecDeque<(u16, u32)>,
    waiting: VecDeque<Waiting>,
}

impl<M> RequestQueue<M>
where
    M: GuestAddressSpace,
    M::M: GuestMemoryBackend,
{
    pub(crate) fn new(device: VirtioIommu, queue: Queue, memory: M, interrupt: Interrupt) -> Self {
        Self {
            device,
            queue,
            memory,
            interrupt,
            frame: Frame::default(),
            answers: VecDeque::new(),
            waiting: VecDeque::new(),
        }
    }

    /// Executes the requests that are in the ring, and gives back those that are complete. Interrupts the driver if it
    /// wants that. Never waits; takes the device's lock. Gives whether there may be more already: call it again soon,
    /// for the driver will not kick for those.
    ///
    /// # Errors
    /// See [`QueueError`]. Requests executed before stay executed.
    pub fn process(&mut self) -> Result<bool, QueueError> {
        let memory = self.memory.memory();
        let memory = &Near::new(&*memory);
        let mut more = false;
        for _ in 0..ROUNDS {
            self.queue.disable_notification(memory)?;
            self.execute(memory)?;
            self.give_back(memory, None)?;
            more = self.queue.enable_notification(memory)?;
            if !more {
                break;
            }
        }
        Ok(more)
    }

    fn execute(&mut self, memory: &Near<'_, M::M>) -> Result<(), QueueError> {
        let since = Instant::now();
        let before = self.answers.len();
        let size = self.queue.size();
        let Self { device, queue, frame, answers, .. } = self;
        let mut ring = Ring { memory, chains: queue.iter(memory)?, size, answers, overflow: false };
        let (done, unmaps) = Executor::new(device).run(memory, &mut ring, frame);
        let overflow = ring.overflow;
        let answers = self.answers.len().saturating_sub(before);
        if answers > 0 {
            self.waiting.push_back(Waiting { answers, unmaps, done, since });
        }
        if overflow { Err(QueueError::TooMany) } else { Ok(()) }
    }

    /// Gives back what is complete, in order.
    fn give_back(
        &mut self,
        memory: &Near<'_, M::M>,
        mut cx: Option<&mut Context<'_>>,
    ) -> Result<(), QueueError> {
        let mut used = false;
        while let Some(first) = self.waiting.front_mut() {
            let over = match &mut cx {
                None => first.done.is_complete(),
                Some(cx) => Pin::new(&mut first.done).poll(cx).is_ready(),
            };
            if !over {
                break;
            }
            let (count, unmaps, since) = (first.answers, first.unmaps, first.since);
            self.waiting.pop_front();
            for (head, len) in self.answers.drain(..count.min(self.answers.len())) {
                self.queue.add_used(memory, head, len)?;
                used = true;
            }
            let requests = u64::try_from(count).unwrap_or(u64::MAX);
            self.device.counters().gave_back(requests, unmaps, since.elapsed());
        }
        if used && wants_interrupt(&mut self.queue, memory)? {
            (self.interrupt)();
        }
        Ok(())
    }

    /// Gives back what is complete. Ready when nothing is pending; else the waker is woken when it may be worth another
    /// call.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), QueueError>> {
        let memory = self.memory.memory();
        match self.give_back(&Near::new(&*memory), Some(cx)) {
            Ok(()) if !self.waiting.is_empty() => Poll::Pending,
            outcome => Poll::Ready(outcome),
        }
    }

    /// Waits until all is given back, for a worker thread.
    ///
    /// # Errors
    /// See [`WaitError`]: at the limit it names what is in the way (endpoint, reader, age), and the embedder chooses:
    /// to wait on, to reset that device, to stop the virtual machine. No answer is given early.
    pub fn wait(&mut self, limit: Duration) -> Result<(), PendingError> {
        let start = Instant::now();
        while let Some(first) = self.waiting.front_mut() {
            first.done.wait_timeout(limit.saturating_sub(start.elapsed()))?;
            let memory = self.memory.memory();
            self.give_back(&Near::new(&*memory), None)?;
        }
        Ok(())
    }

    /// Requests that are executed and not given back.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.answers.len()
    }

    /// What keeps the oldest of them, for an event loop that has its own time limit; none when nothing is pending.
    #[must_use]
    pub fn blockers(&self) -> Vec<Blocker> {
        self.waiting.front().map_or_else(Vec::new, |first| first.done.blockers())
    }

    /// The queue, for the transport to set up, or to save when nothing is pending.
    pub fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// The queue as it was before it was set up: for a reset of the device or of the queue. Answers that are pending
    /// never touch a ring again; what they wait for is in the completion, and the reset is over only when that is.
    #[must_use = "the reset is over only when this has resolved"]
    pub fn reset(&mut self) -> Completion {
        self.queue.reset();
        self.answers.clear();
        let mut done = Completion::ready();
        self.waiting.drain(..).for_each(|waiting| done.merge(waiting.done));
        done
    }
}

/// Why requests are still pending.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PendingError {
    /// They are not complete.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// They could not be given back.
    #[error(transparent)]
    Queue(#[from] QueueError),
}
