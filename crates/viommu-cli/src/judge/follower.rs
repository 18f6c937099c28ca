//! One mirror and one cache, on an endpoint or on a domain whose endpoints are not known.

use std::sync::{Arc, Mutex};

use viommu::subscribe::Mirror;
use viommu::{Endpoint, Interest, Iommu, Space, SubscribeError, Subscription};
use viommu_vfio::software::{Config, Container, Failing, Faults, Plan, When};
use viommu_vhost::software::{Iotlb, SoftwareCache};

use super::Options;
use super::told::{Asks, Counting, Recording, Told, lock};

/// What is subscribed to.
pub(crate) enum Home<'a> {
    Endpoint(&'a Endpoint),
    Domain(&'a Iommu, u32),
}

impl Home<'_> {
    fn mirror(&self, mirror: Box<dyn Mirror>) -> Result<Subscription, SubscribeError> {
        match self {
            Self::Endpoint(endpoint) => endpoint.subscribe_mirror(mirror, Interest::MIRROR),
            Self::Domain(iommu, id) => iommu.subscribe_mirror(Space::Domain(*id), mirror, Interest::MIRROR),
        }
    }

    fn cache(&self, cache: SoftwareCache) -> Result<Subscription, SubscribeError> {
        let cache = Box::new(cache);
        match self {
            Self::Endpoint(endpoint) => endpoint.subscribe_cache(cache, Interest::CACHE),
            Self::Domain(iommu, id) => iommu.subscribe_cache(Space::Domain(*id), cache, Interest::CACHE),
        }
    }
}

/// Calls of a mirror that guest operations asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) map: u64,
    pub(crate) unmap: u64,
    pub(crate) replace: u64,
    pub(crate) refused: u64,
    /// Extents mapped for other reasons: bypass, a new subscription.
    pub(crate) replayed: u64,
}

/// A mirror and a cache.
pub(crate) struct Follower {
    mirror: Option<Subscription>,
    cache: Option<Subscription>,
    pub(crate) told: Arc<Mutex<Told>>,
    pub(crate) iotlb: Arc<Mutex<Iotlb>>,
    faults: Option<Faults>,
    /// Of those that it succeeds, and of subscriptions that are over.
    carried: Totals,
    /// Refusals of the present subscription that have been looked at.
    seen: u64,
    /// Times that the mirror was fenced.
    pub(crate) fences: u64,
    fence_noted: bool,
}

impl Follower {
    pub(crate) fn new(home: &Home<'_>, options: &Options) -> Result<Self, SubscribeError> {
        let iotlb = Arc::new(Mutex::new(Iotlb::default()));
        let mut follower = Self {
            mirror: None,
            cache: None,
            told: Arc::default(),
            iotlb: iotlb.clone(),
            faults: None,
            carried: Totals::default(),
            seen: 0,
            fences: 0,
            fence_noted: false,
        };
        follower.cache = Some(home.cache(SoftwareCache::new(iotlb))?);
        follower.renew(home, options)?;
        Ok(follower)
    }

    /// Subscribes a new, empty mirror in place of the one that was there.
    pub(crate) fn renew(&mut self, home: &Home<'_>, options: &Options) -> Result<(), SubscribeError> {
        let Totals { replace, refused, .. } = self.totals();
        if let Some(old) = self.mirror.take() {
            drop(old.leave());
        }
        (self.carried.replace, self.carried.refused, self.seen) = (replace, refused, 0);
        let config = Config {
            dma_entry_limit: options.limit_entries.unwrap_or(viommu_vfio::software::DEFAULT_DMA_ENTRY_LIMIT),
            ..Config::default()
        };
        let container = Container::new(config).map_err(|_| SubscribeError::Invalid("container"))?;
        let container = Arc::new(Mutex::new(container));
        let recording = Recording::new(container, self.told.clone());
        let mirror: Box<dyn Mirror> = if options.fails() {
            let failing = match &self.faults {
                Some(faults) => Failing::succeeding(recording, faults),
                None => {
                    let plan = Plan {
                        map: options.fail_map.map_or(When::Never, When::Every),
                        unmap: options.fail_unmap.map_or(When::Never, When::Every),
                        fence_fails: false,
                    };
                    let (failing, faults) = Failing::new(recording, plan);
                    self.faults = Some(faults);
                    failing
                }
            };
            Box::new(Counting::new(failing, self.faults.clone(), self.told.clone()))
        } else {
            Box::new(Counting::new(recording, None, self.told.clone()))
        };
        self.asks(Asks::NOTHING);
        self.mirror = Some(home.mirror(mirror)?);
        self.fence_noted = false;
        Ok(())
    }

    /// Whether it has been fenced since this was asked last; counted then.
    pub(crate) fn newly_fenced(&mut self) -> bool {
        let newly = self.is_fenced() && !self.fence_noted;
        self.fence_noted |= newly;
        self.fences += u64::from(newly);
        newly
    }

    /// What of that which comes is asked for by a guest operation and recorded by a VMM: written down, counted, and
    /// refused as planned.
    pub(crate) fn asks(&self, asks: Asks) {
        lock(&self.told).asks = asks;
    }

    /// Whether the mirror has refused anything since this was asked last.
    pub(crate) fn newly_refused(&mut self) -> bool {
        let now = self.mirror.as_ref().map_or(0, |mirror| mirror.counts().refused);
        now > core::mem::replace(&mut self.seen, now)
    }

    /// Takes over what another did before it.
    pub(crate) fn succeed(&mut self, totals: Totals) {
        self.carried.map += totals.map;
        self.carried.unmap += totals.unmap;
        self.carried.replace += totals.replace;
        self.carried.refused += totals.refused;
        self.carried.replayed += totals.replayed;
    }

    /// An operation was refused on account of this mirror before it was asked.
    pub(crate) fn refused_ahead(&mut self) {
        self.carried.refused += 1;
    }

    pub(crate) fn totals(&self) -> Totals {
        let counts = self.mirror.as_ref().map(Subscription::counts).unwrap_or_default();
        let told = lock(&self.told);
        Totals {
            map: self.carried.map + told.map,
            unmap: self.carried.unmap + told.unmap,
            replace: self.carried.replace + counts.replace,
            refused: self.carried.refused + counts.refused,
            replayed: self.carried.replayed + told.replayed,
        }
    }

    pub(crate) fn held(&self) -> u64 {
        if self.is_fenced() { 0 } else { self.mirror.as_ref().map_or(0, |mirror| mirror.counts().held) }
    }

    pub(crate) fn is_fenced(&self) -> bool {
        self.mirror.as_ref().is_some_and(Subscription::is_fenced)
    }

    pub(crate) fn mirror(&self) -> Option<&Subscription> {
        self.mirror.as_ref()
    }

    pub(crate) fn cache(&self) -> Option<&Subscription> {
        self.cache.as_ref()
    }
}
