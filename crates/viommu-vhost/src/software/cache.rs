//! The cache over an IOTLB, and the channel of a slow back-end.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use viommu::ack::Resolver;
use viommu::subscribe::{Cache, FenceFailed};
use viommu::{Ack, IovaRange, Mapping};

use super::iotlb::Iotlb;
use super::lock;

/// A [`Cache`] over an [`Iotlb`] that the embedder keeps a handle to.
///
/// It never makes two entries over one address: a fill first drops every entry that it touches. So a fill of what is
/// there replaces it, and one that overlaps something else costs a miss later.
#[derive(Debug)]
pub struct SoftwareCache {
    iotlb: Arc<Mutex<Iotlb>>,
    channel: Option<Channel>,
}

impl SoftwareCache {
    /// Over `iotlb`; every message takes effect at once.
    #[must_use]
    pub fn new(iotlb: Arc<Mutex<Iotlb>>) -> Self {
        Self { iotlb, channel: None }
    }

    /// Over `iotlb`, whose back-end reads a message only when the channel's handle says so.
    #[must_use]
    pub fn behind_channel(iotlb: Arc<Mutex<Iotlb>>) -> (Self, Channel) {
        let channel = Channel { iotlb: iotlb.clone(), queue: Arc::default() };
        (Self { iotlb, channel: Some(channel.clone()) }, channel)
    }

    /// The IOTLB.
    #[must_use]
    pub fn iotlb(&self) -> &Arc<Mutex<Iotlb>> {
        &self.iotlb
    }
}

impl Cache for SoftwareCache {
    fn install(&mut self, entry: &Mapping) {
        match &self.channel {
            Some(channel) => channel.send(Message::Update(*entry), None),
            None => update(&mut lock(&self.iotlb), entry),
        }
    }

    fn invalidate(&mut self, range: IovaRange) -> Ack {
        match &self.channel {
            Some(channel) => {
                let (ack, resolver) = Ack::pending();
                channel.send(Message::Invalidate(range), Some(resolver));
                ack
            }
            None => {
                lock(&self.iotlb).invalidate(range);
                Ack::Done
            }
        }
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        lock(&self.iotlb).fence();
        Ok(())
    }

    fn held(&self) -> Option<Vec<Mapping>> {
        Some(lock(&self.iotlb).iter().copied().collect())
    }
}

fn update(iotlb: &mut Iotlb, entry: &Mapping) {
    if entry.access.is_empty() {
        return; // occupies its range, and means "not mapped" to every consumer
    }
    iotlb.displace(entry.range);
    // A fill that comes after the fence is for nobody.
    let _ = iotlb.update(entry);
}

/// A message to the back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A fill.
    Update(Mapping),
    /// A removal; it is acknowledged when the back-end has read it.
    Invalidate(IovaRange),
}

/// The messages that were not read, oldest first, and what acknowledges them.
type Queue = VecDeque<(Message, Option<Resolver>)>;

/// The ordered channel to a back-end, and the test's handle to it. The back-end reads nothing by itself: until it
/// does, its device uses what it has. May be used from any thread, also while a step runs.
#[derive(Clone, Debug)]
pub struct Channel {
    iotlb: Arc<Mutex<Iotlb>>,
    queue: Arc<Mutex<Queue>>,
}

impl Channel {
    /// The messages that were not read, oldest first.
    #[must_use]
    pub fn waiting(&self) -> Vec<Message> {
        lock(&self.queue).iter().map(|(message, _)| *message).collect()
    }

    /// The back-end reads the oldest message, does what it says, and acknowledges; `None` when there is none.
    pub fn deliver(&self) -> Option<Message> {
        // Both locks, so that two deliveries at once keep the order; resolving comes after, since it wakes who waits.
        let mut queue = lock(&self.queue);
        let (message, resolver) = queue.pop_front()?;
        let mut iotlb = lock(&self.iotlb);
        match &message {
            Message::Update(entry) => update(&mut iotlb, entry),
            Message::Invalidate(range) => {
                iotlb.invalidate(*range);
            }
        }
        drop((iotlb, queue));
        if let Some(resolver) = resolver {
            resolver.done();
        }
        Some(message)
    }

    /// The back-end reads every message; how many there were.
    pub fn deliver_all(&self) -> usize {
        core::iter::from_fn(|| self.deliver()).count()
    }

    /// The back-end fails at the oldest message, and nothing of it is done: an invalidation is answered with a
    /// failure, a fill is lost. `None` when there is none.
    pub fn fail(&self) -> Option<Message> {
        let (message, resolver) = lock(&self.queue).pop_front()?;
        if let Some(resolver) = resolver {
            resolver.failed();
        }
        Some(message)
    }

    fn send(&self, message: Message, resolver: Option<Resolver>) {
        lock(&self.queue).push_back((message, resolver));
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
