//! Which endpoints are behind the device, and what of their subscribers' limits the driver is told.

use viommu::endpoint::{Region, RegionKind};
use viommu::subscribe::{Cache, Interest, Mirror, Observer, Reach};
use viommu::{
    AttachErrorKind, Completion, Endpoint, EndpointConfig, Iova, IovaRange, SubscribeError, Subscription,
};

use super::{Control, Member, VirtioIommu, granule};
use crate::journal::Entry;
use crate::spec::{Features, property};

/// Bytes: what regions are made of.
const PAGE: u64 = 4096;

/// An endpoint that is to come, with those who hold copies for it.
#[derive(Default)]
pub struct EndpointPlan {
    regions: Vec<Region>,
    subscribers: Vec<Subscriber>,
}

enum Subscriber {
    Mirror(Box<dyn Mirror>, Interest),
    Cache(Box<dyn Cache>, Interest),
    Observer(Box<dyn Observer>, Interest),
}

impl EndpointPlan {
    /// Adds a region that no mapping may meet: page-aligned, inclusive. On x86 every endpoint needs its MSI doorbell,
    /// 0xfee00000 to 0xfeefffff.
    #[must_use]
    pub fn region(mut self, range: IovaRange, kind: RegionKind) -> Self {
        self.regions.push(Region { range, kind });
        self
    }

    /// Adds somebody with a full copy. Where its host cannot map, the driver is told not to.
    #[must_use]
    pub fn mirror(mut self, mirror: Box<dyn Mirror>, interest: Interest) -> Self {
        self.subscribers.push(Subscriber::Mirror(mirror, interest));
        self
    }

    /// Adds a cache.
    #[must_use]
    pub fn cache(mut self, cache: Box<dyn Cache>, interest: Interest) -> Self {
        self.subscribers.push(Subscriber::Cache(cache, interest));
        self
    }

    /// Adds an observer.
    #[must_use]
    pub fn observer(mut self, observer: Box<dyn Observer>, interest: Interest) -> Self {
        self.subscribers.push(Subscriber::Observer(observer, interest));
        self
    }
}

/// An endpoint that has come.
#[derive(Debug)]
pub struct Added {
    /// Its handle: readers are made with it.
    pub endpoint: Endpoint,
    /// Of the plan's subscribers, in their order. Who drops one, leaves.
    pub subscriptions: Vec<Subscription>,
}

/// An endpoint or a subscriber that cannot come. Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// The endpoint is there already, or is not; a region is not page-aligned, or they overlap; a cap.
    #[error(transparent)]
    Endpoint(AttachErrorKind),
    /// An endpoint has one MSI region at most (VIRTIO, "Property RESV_MEM").
    #[error("more than one MSI region")]
    TwoMsi,
    /// The driver's PROBE could not be told of all regions.
    #[error("{regions} regions do not fit into {probe_size} bytes of properties, or PROBE is not offered")]
    Regions {
        /// How many there would be.
        regions: usize,
        /// Bytes.
        probe_size: u32,
    },
    /// The driver may know that smaller pages can be mapped than the mirror's host can.
    #[error(
        "the smallest page of the mirror's host is of {wanted:#x} bytes, and the driver may use {granule:#x}"
    )]
    PageSize {
        /// Bytes of the host's smallest page.
        wanted: u64,
        /// Bytes of what the driver was told.
        granule: u64,
    },
    /// The mirror's host cannot map there, and the driver has not been told.
    #[error("the mirror's host cannot map {0}, which is no reserved region of the endpoint")]
    Unreachable(IovaRange),
    /// The subscription was refused.
    #[error(transparent)]
    Subscribe(#[from] SubscribeError),
}

/// The parts of `range` that are in none of `others`, ascending.
fn without(range: IovaRange, others: impl IntoIterator<Item = IovaRange>) -> Vec<IovaRange> {
    let mut rest = vec![range];
    for other in others {
        rest = rest
            .into_iter()
            .flat_map(|part| {
                let before = other.start().0.checked_sub(1).map(Iova);
                let before = before.and_then(|last| IovaRange::new(part.start(), last.min(part.last())));
                let after =
                    other.next().and_then(|start| IovaRange::new(start.max(part.start()), part.last()));
                match part.overlaps(other) {
                    true => [before, after],
                    false => [Some(part), None],
                }
            })
            .flatten()
            .collect();
    }
    rest
}

/// The smallest range of whole pages around `range`.
fn whole_pages(range: IovaRange) -> IovaRange {
    let mask = PAGE.wrapping_sub(1);
    IovaRange::new(Iova(range.start().0 & !mask), Iova(range.last().0 | mask)).unwrap_or(range)
}

/// Ascending and disjoint, neighbours joined.
fn joined(mut ranges: Vec<IovaRange>) -> Vec<IovaRange> {
    ranges.sort();
    let mut joined: Vec<IovaRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.overlaps(range) || last.next() == Some(range.start()) => {
                *last = last.hull(range)
            }
            _ => joined.push(range),
        }
    }
    joined
}

impl VirtioIommu {
    /// What of the input range the mirror hears of and its host cannot map: whole pages.
    fn unreachable(&self, reach: &Reach, interest: Interest) -> Vec<IovaRange> {
        let Some(heard) = interest.window.intersect(self.config().input_range) else { return Vec::new() };
        let moved = |range: IovaRange, by: u64| {
            IovaRange::new(Iova(range.start().0.wrapping_add(by)), Iova(range.last().0.wrapping_add(by)))
        };
        // A window that wraps with its offset is refused when the mirror subscribes.
        let Some(outward) = moved(heard, interest.offset) else { return Vec::new() };
        let holes = without(outward, reach.apertures.iter().copied());
        let inward = |hole| moved(hole, interest.offset.wrapping_neg());
        joined(holes.into_iter().filter_map(inward).map(whole_pages).collect())
    }

    /// The page sizes that are left when a mirror comes whose host has these.
    fn page_sizes_with(&self, control: &Control, reach: &Reach) -> Result<u64, TopologyError> {
        let (ours, wanted) = (granule(control.page_size_mask), reach.granule());
        if wanted <= ours {
            let common = control.page_size_mask & reach.page_sizes;
            return Ok(if control.frozen { control.page_size_mask } else { common | ours });
        }
        if control.frozen {
            return Err(TopologyError::PageSize { wanted, granule: ours });
        }
        let larger = !wanted.wrapping_sub(1);
        Ok((control.page_size_mask & reach.page_sizes & larger) | wanted)
    }

    /// Adds an endpoint (hot-plug): its number is what the topology tables say (for PCI: segment, bus, device,
    /// function). Its regions are those of the plan, and reserved ones where the hosts of its mirrors cannot map. Page
    /// sizes shrink to what those hosts can do, as long as the driver cannot have read them.
    ///
    /// # Errors
    /// See [`TopologyError`].
    pub fn add_endpoint(&self, id: u32, plan: EndpointPlan) -> Result<Added, TopologyError> {
        let mut control = self.lock();
        let EndpointPlan { mut regions, subscribers } = plan;
        let before = control.page_size_mask;
        let mut holes = Vec::new();
        let narrowed = subscribers.iter().try_for_each(|subscriber| {
            let Subscriber::Mirror(mirror, interest) = subscriber else { return Ok(()) };
            let reach = mirror.reach();
            control.page_size_mask = self.page_sizes_with(&control, &reach)?;
            holes.extend(self.unreachable(&reach, *interest));
            Ok(())
        });
        let outcome = narrowed.and_then(|()| {
            let given: Vec<_> = regions.iter().map(|region| region.range).collect();
            for hole in joined(holes) {
                let parts = without(hole, given.iter().copied());
                regions.extend(parts.into_iter().map(|range| Region { range, kind: RegionKind::Reserved }));
            }
            self.add(&mut control, id, regions, subscribers)
        });
        if outcome.is_err() {
            control.page_size_mask = before;
        }
        outcome
    }

    fn add(
        &self,
        control: &mut Control,
        id: u32,
        mut regions: Vec<Region>,
        subscribers: Vec<Subscriber>,
    ) -> Result<Added, TopologyError> {
        if regions.iter().filter(|region| region.kind == RegionKind::Msi).count() > 1 {
            return Err(TopologyError::TwoMsi);
        }
        let probe_size = if self.features().contains(Features::PROBE) { self.config().probe_size } else { 0 };
        let room = usize::try_from(probe_size).unwrap_or(0) / property::RESV_MEM_SIZE;
        if regions.len() > room {
            return Err(TopologyError::Regions { regions: regions.len(), probe_size });
        }
        regions.sort_by_key(|region| region.range);
        let config = EndpointConfig { regions: regions.clone() };
        let endpoint = self.iommu().add_endpoint(id, config);
        let endpoint = endpoint.map_err(|error| TopologyError::Endpoint(error.kind))?;
        let mut subscriptions = Vec::new();
        for subscriber in subscribers {
            let outcome = match subscriber {
                Subscriber::Mirror(mirror, interest) => endpoint.subscribe_mirror(mirror, interest),
                Subscriber::Cache(cache, interest) => endpoint.subscribe_cache(cache, interest),
                Subscriber::Observer(observer, interest) => endpoint.subscribe_observer(observer, interest),
            };
            match outcome {
                Ok(subscription) => subscriptions.push(subscription),
                Err(error) => {
                    drop(subscriptions);
                    // Nobody can use it yet, so there is nothing to wait for.
                    if let Ok(completion) = endpoint.remove() {
                        drop(completion);
                    }
                    return Err(error.into());
                }
            }
        }
        self.note(|| Entry::EndpointAdded { endpoint: id, regions: &regions });
        control.members.insert(id, Member { regions });
        self.faults().add_endpoint(id);
        Ok(Added { endpoint, subscriptions })
    }

    /// A mirror comes to an endpoint that is there. It must fit what the driver may know: page sizes, if they may have
    /// been read, and the endpoint's regions.
    ///
    /// # Errors
    /// See [`TopologyError`].
    pub fn subscribe_mirror(
        &self,
        id: u32,
        mirror: Box<dyn Mirror>,
        interest: Interest,
    ) -> Result<Subscription, TopologyError> {
        let mut control = self.lock();
        let (endpoint, member) = match (self.endpoint(id), control.members.get(&id)) {
            (Some(endpoint), Some(member)) => (endpoint, member),
            _ => return Err(TopologyError::Endpoint(AttachErrorKind::NoEndpoint(id.into()))),
        };
        let reach = mirror.reach();
        let regions = || member.regions.iter().map(|region| region.range);
        let unknown =
            self.unreachable(&reach, interest).into_iter().flat_map(|hole| without(hole, regions()));
        if let Some(hole) = unknown.into_iter().next() {
            return Err(TopologyError::Unreachable(hole));
        }
        let mask = self.page_sizes_with(&control, &reach)?;
        let subscription = endpoint.subscribe_mirror(mirror, interest)?;
        control.page_size_mask = mask;
        Ok(subscription)
    }

    /// Takes an endpoint away (hot-unplug). Its device has been stopped before. A domain that it was the last one in
    /// dies. The completion says when nothing of it is in use any more.
    ///
    /// # Errors
    /// [`TopologyError::Endpoint`]: there is none.
    pub fn remove_endpoint(&self, id: u32) -> Result<Completion, TopologyError> {
        let mut control = self.lock();
        let gone = || TopologyError::Endpoint(AttachErrorKind::NoEndpoint(id.into()));
        let endpoint = self.endpoint(id).ok_or_else(gone)?;
        let mut done = endpoint.remove().map_err(|error| TopologyError::Endpoint(error.kind))?;
        control.members.remove(&id);
        self.note(|| Entry::EndpointRemoved { endpoint: id });
        self.faults().remove_endpoint(id);
        let old = control.attached.remove(&id);
        self.left(&mut control, old, &mut done);
        Ok(done)
    }

    /// The regions that a PROBE of the endpoint gives, ascending; `None`: there is no such endpoint.
    #[must_use]
    pub fn regions(&self, id: u32) -> Option<Vec<Region>> {
        self.lock().members.get(&id).map(|member| member.regions.clone())
    }
}
