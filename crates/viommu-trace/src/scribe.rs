//! The history of a unit as its record makes it: what endpoints see, and what changes there. For units whose drivers keep
//! tables in memory and say only where they have changed, and for whoever has no journal of the guest's own words.

use core::fmt;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::endpoint::RegionKind;
use viommu::subscribe::{Interest, Observer};
use viommu::{
    Change, Endpoint, EndpointId, IovaRange, Kinds, Mapping, Space, SubscribeError, Subscription, View,
};

use crate::event::{Event, Reserved};

/// Tells the events of the endpoints that it follows. Of a domain with several endpoints, one is listened to.
pub struct Scribe {
    write: Box<dyn Fn(Event) + Send + Sync>,
    views: Mutex<Views>,
}

type Views = BTreeMap<EndpointId, View>;

impl Scribe {
    /// The domain that endpoints are in, in a history, whose accesses pass. A unit's own domains have smaller numbers.
    pub const PASS: u32 = u32::MAX;

    /// Gives the events to `write`, from inside the unit's steps: it must not ask the unit anything. See
    /// [`Recorder::scribe`](crate::Recorder::scribe) for one that writes a history. The first says that the unit takes
    /// everything.
    pub fn new(write: impl Fn(Event) + Send + Sync + 'static) -> Arc<Self> {
        write(Event::Config { page_sizes: !0xfff, input: IovaRange::ALL, bypass: false });
        Arc::new(Self { write: Box::new(write), views: Mutex::default() })
    }

    /// Follows an endpoint that has just been added, until the subscription ends.
    ///
    /// # Errors
    /// The endpoint is gone, or its unit has no caching mode.
    pub fn follow(self: &Arc<Self>, endpoint: &Endpoint) -> Result<Subscription, SubscribeError> {
        let id = endpoint.id();
        (self.write)(Event::EndpointAdded { endpoint: id.requester });
        for region in endpoint.regions() {
            let kind = match region.kind {
                RegionKind::Reserved => Reserved::Reserved,
                RegionKind::Msi => Reserved::Msi,
            };
            (self.write)(Event::ReservedRegion { endpoint: id.requester, kind, range: region.range });
        }
        let follower = Box::new(Follower { scribe: self.clone(), id });
        let subscription =
            endpoint.subscribe_observer(follower, Interest::all_of(Kinds::MAP | Kinds::UNMAP))?;
        self.first_seen(id, endpoint.view().unwrap_or(View::Blocked));
        Ok(subscription)
    }

    /// An endpoint has gone.
    pub fn forget(&self, id: EndpointId) {
        if self.views().remove(&id).is_some() {
            (self.write)(Event::EndpointRemoved { endpoint: id.requester });
        }
    }

    fn views(&self) -> MutexGuard<'_, Views> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an endpoint sees, if nothing has been heard of it yet.
    fn first_seen(&self, id: EndpointId, view: View) {
        let mut views = self.views();
        if !views.contains_key(&id) {
            self.enter(&mut views, id, view);
        }
    }

    fn enter(&self, views: &mut Views, id: EndpointId, to: View) {
        let before = views.insert(id, to);
        let endpoint = id.requester;
        let event = match (before, to) {
            (Some(before), to) if before == to => return,
            (_, View::Domain(domain)) => Event::Attach { domain, endpoint, bypass: false },
            (_, View::Identity) => Event::Attach { domain: Self::PASS, endpoint, bypass: true },
            (Some(View::Domain(domain)), View::Blocked) => Event::Detach { domain, endpoint },
            (Some(View::Identity), View::Blocked) => Event::Detach { domain: Self::PASS, endpoint },
            (Some(View::Blocked) | None, View::Blocked) => return,
        };
        (self.write)(event);
    }

    /// Whether it is for that endpoint to tell of the domain: the first one that sees it. Steps and moves of a unit come
    /// one after the other, so no change falls between two of them.
    fn speaks(&self, id: EndpointId, domain: u32) -> bool {
        let views = self.views();
        views.iter().find(|(_, view)| **view == View::Domain(domain)).is_some_and(|(first, _)| *first == id)
    }
}

impl fmt::Debug for Scribe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scribe").finish_non_exhaustive()
    }
}

struct Follower {
    scribe: Arc<Scribe>,
    id: EndpointId,
}

impl Observer for Follower {
    fn changed(&mut self, space: Space, change: &Change) {
        // Identity changes with the machine's memory, which is no doing of the driver's.
        let Space::Domain(domain) = space else { return };
        self.scribe.first_seen(self.id, View::Domain(domain));
        if !self.scribe.speaks(self.id, domain) {
            return;
        }
        if let Some(old) = change.before() {
            (self.scribe.write)(Event::Unmap { domain, range: old.range });
        }
        if let Some(Mapping { range, gpa, access, target, .. }) = change.after().copied() {
            (self.scribe.write)(Event::Map { domain, range, gpa, access, target });
        }
    }

    fn moved(&mut self, endpoint: EndpointId, to: View) {
        if endpoint == self.id {
            self.scribe.enter(&mut self.scribe.views(), endpoint, to);
        }
    }
}
