//! A cache in its place: fills and invalidations on one ordered channel.

use crate::ack::Ack;
use crate::addr::{Iova, IovaRange};
use crate::deliver::{Counts, FENCED_AGAIN, Sub};
use crate::endpoint::EndpointShared;
use crate::mapping::{Access, Mapping};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::CallbackScope;
use crate::quiesce::space::Space;
use crate::reader::{Fault, Reader};
use crate::subscribe::{Cache, FenceFailed, Interest, Kinds};
use crate::sync::{Arc, Mutex, lock};

/// A cache, wherever its endpoint is. Its lock is the channel: what is put in first is first.
pub(crate) struct CacheSeat {
    pub(crate) sub: Arc<Sub>,
    pub(crate) interest: Interest,
    /// What it sees, where it follows no endpoint.
    pub(crate) own: Option<Arc<EndpointShared>>,
    channel: Mutex<Channel>,
}

struct Channel {
    cache: Box<dyn Cache>,
    reader: Reader,
    counts: Counts,
}

impl CacheSeat {
    pub(crate) fn new(
        sub: Arc<Sub>,
        interest: Interest,
        own: Option<Arc<EndpointShared>>,
        cache: Box<dyn Cache>,
        reader: Reader,
    ) -> Arc<Self> {
        let channel = Mutex::new(Channel { cache, reader, counts: Counts::default() });
        Arc::new(Self { sub, interest, own, channel })
    }

    /// Whether it asked for what steps remove.
    #[inline]
    pub(crate) fn hears_steps(&self) -> bool {
        self.interest.kinds.contains(Kinds::UNMAP)
    }

    /// Tells it to drop what it holds inside `range` of the domain whose readers are in `space`. Removals are published
    /// before.
    #[inline]
    pub(crate) fn invalidate(&self, range: IovaRange, space: &Arc<Space>, done: &mut Completion) {
        let Some(range) = range.intersect(self.interest.window) else { return };
        if self.sub.is_fenced() {
            return;
        }
        let ack = {
            let mut channel = lock(&self.channel);
            channel.counts.unmap += 1;
            channel.cache.invalidate(self.interest.outward(range))
        };
        if let Ack::Pending(waiting) = ack {
            done.add_ack(&self.sub, waiting, vec![space.clone()]);
        }
    }

    /// Translates and installs, as one act against every step.
    pub(crate) fn fill(&self, iova: Iova, access: Access) -> Result<Mapping, Fault> {
        let mut channel = lock(&self.channel);
        let channel = &mut *channel;
        let entry = {
            let guard = channel.reader.enter();
            // The peer's address into the domain's, and the answer back out.
            let inside = Iova(iova.0.wrapping_sub(self.interest.offset));
            let entry = guard.extent(inside, access)?;
            let clipped = entry.clip(self.interest.window).filter(|m| m.range.contains(inside));
            clipped.ok_or_else(|| guard.fault(inside, access))?
        };
        let entry = Mapping { range: self.interest.outward(entry.range), ..entry };
        let _callback = CallbackScope::enter();
        channel.counts.fills += 1;
        channel.cache.install(&entry);
        Ok(entry)
    }

    fn fence(&self) -> Result<(), FenceFailed> {
        self.sub.set_fenced();
        let _callback = CallbackScope::enter();
        lock(&self.channel).cache.fence()
    }

    /// Cuts it off, unless it is, and tells the alarm; whether that held.
    pub(crate) fn fence_and_tell(&self, why: &str) -> bool {
        if self.sub.is_fenced() {
            return self.sub.is_cut_off();
        }
        let outcome = self.fence();
        self.sub.tell_fence(outcome, why)
    }

    /// Tries once more, after a fence that failed.
    pub(crate) fn fence_again(&self) {
        let outcome = self.fence();
        self.sub.tell_fence(outcome, FENCED_AGAIN);
    }

    pub(crate) fn held(&self) -> Option<Vec<Mapping>> {
        let _callback = CallbackScope::enter();
        lock(&self.channel).cache.held()
    }

    pub(crate) fn counts(&self) -> Counts {
        lock(&self.channel).counts
    }
}
