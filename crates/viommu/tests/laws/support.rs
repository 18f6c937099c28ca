//! Short words for what most tests need.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use viommu::reader::Walker;
use viommu::subscribe::{Binding, Bound, FenceFailed, Mirror, Reach, RefusalKind, Refused};
use viommu::{
    Access, Ack, Builder, Completion, Domain, Endpoint, EndpointConfig, EndpointId, Fault, Gpa, GpaRange,
    Incident, Interest, Iommu, Iova, IovaRange, Mapping, Space, Subscription, Tables, Translation,
};

pub use crate::fuzzing::recording::{Event, Handle, RecordingCache, RecordingMirror, RecordingObserver};
pub use crate::fuzzing::reference::{PAGE, range_of as pages};

/// Pages first to last at the page `gpa`.
pub fn map_of(first: u64, last: u64, gpa: u64, access: Access) -> Mapping {
    Mapping::over(pages(first, last), Gpa(gpa * PAGE), access).unwrap()
}

pub fn rw(first: u64, last: u64, gpa: u64) -> Mapping {
    map_of(first, last, gpa, Access::RW)
}

pub fn gpas(first: u64, last: u64) -> GpaRange {
    GpaRange::new(Gpa(first * PAGE), Gpa(last * PAGE + (PAGE - 1))).unwrap()
}

pub fn at(page: u64) -> Iova {
    Iova(page * PAGE)
}

/// Incidents as the alarm hears them.
pub type Incidents = Arc<Mutex<Vec<Incident>>>;

/// A unit with a GiB of RAM.
pub fn unit() -> (Iommu, Incidents) {
    unit_with(|b| b.ram(0, 1 << 30))
}

pub fn unit_with(with: impl FnOnce(Builder) -> Builder) -> (Iommu, Incidents) {
    let incidents = Incidents::default();
    let alarm = incidents.clone();
    let builder = Iommu::builder().alarm(move |incident| alarm.lock().unwrap().push(incident.clone()));
    (with(builder).build().unwrap(), incidents)
}

/// A unit with an endpoint (8) in a domain (1).
pub fn attached() -> (Iommu, Endpoint, Domain) {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let endpoint = endpoint(&iommu, 8);
    over(endpoint.attach(1).unwrap());
    (iommu, endpoint, domain)
}

pub fn endpoint(iommu: &Iommu, id: u32) -> Endpoint {
    iommu.add_endpoint(id, EndpointConfig::default()).unwrap()
}

pub fn mirror_at(endpoint: &Endpoint, reach: Reach) -> (Subscription, Handle) {
    let (mirror, handle) = RecordingMirror::new(reach);
    (endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap(), handle)
}

pub fn mirror_on(iommu: &Iommu, id: u32, reach: Reach) -> (Subscription, Handle) {
    let (mirror, handle) = RecordingMirror::new(reach);
    (iommu.subscribe_mirror(Space::Domain(id), mirror, Interest::MIRROR).unwrap(), handle)
}

pub fn cache_at(endpoint: &Endpoint) -> (Subscription, Handle) {
    let (cache, handle) = RecordingCache::new();
    (endpoint.subscribe_cache(cache, Interest::CACHE).unwrap(), handle)
}

/// It is over, now.
#[track_caller]
pub fn over(mut done: Completion) {
    assert!(done.is_complete(), "still waits for {:?}", done.blockers());
}

pub fn translate(endpoint: &Endpoint, page: u64, access: Access) -> Result<Translation, Fault> {
    endpoint.reader("probe").unwrap().enter().probe(at(page), access)
}

pub fn is_map(event: &Event) -> bool {
    matches!(event, Event::Map(_))
}

pub fn is_unmap(event: &Event) -> bool {
    matches!(event, Event::Unmap(_))
}

pub fn is_add(event: &Event) -> bool {
    matches!(event, Event::Map(_) | Event::Replace(..))
}

pub fn refusal() -> Refused {
    Refused::new(RefusalKind::Device, "told to refuse")
}

/// A guest's tables in memory.
#[derive(Clone, Default)]
pub struct Guest(pub Arc<Mutex<BTreeMap<u64, Mapping>>>);

impl Guest {
    pub fn set(&self, mappings: &[Mapping]) {
        *self.0.lock().unwrap() = mappings.iter().map(|m| (m.range.start().0, *m)).collect();
    }

    pub fn tables(&self) -> Tables {
        Tables::Walked { walker: Arc::new(self.clone()), caching_mode: true }
    }

    pub fn sync(&self, domain: &Domain, range: IovaRange) {
        let mut rest = Some(range);
        while let Some(range) = rest {
            let progress = domain.sync(range, &mut |from, last| self.next(from, last), usize::MAX).unwrap();
            over(progress.completion);
            rest = progress.rest;
        }
    }

    pub fn next(&self, from: Iova, last: Iova) -> Option<Mapping> {
        let tables = self.0.lock().unwrap();
        tables.values().find(|m| m.range.last() >= from && m.range.start() <= last).copied()
    }
}

impl Walker for Guest {
    fn walk(&self, iova: Iova) -> Option<Mapping> {
        self.next(iova, iova).filter(|m| m.range.contains(iova))
    }
}

/// What a binding has been told.
#[derive(Default)]
pub struct Host {
    pub made: Vec<(Space, EndpointId, Handle)>,
    pub bound: Vec<(EndpointId, Bound)>,
    pub fenced: Vec<EndpointId>,
    pub refuse: Option<Bound>,
    pub fence_fails: bool,
    pub reach: Reach,
    /// The next mirrors refuse their first map.
    pub mirrors_refuse: bool,
}

#[derive(Clone, Default)]
pub struct Hosts(pub Arc<Mutex<Host>>);

impl Binding for Hosts {
    fn mirror_for(&mut self, space: Space, first: EndpointId) -> Result<Box<dyn Mirror>, Refused> {
        let mut host = self.0.lock().unwrap();
        let (mirror, handle) = RecordingMirror::new(host.reach.clone());
        if host.mirrors_refuse {
            handle.refuse_nth(1, 1, is_map);
        }
        host.made.push((space, first, handle));
        Ok(mirror)
    }

    fn bind(&mut self, endpoint: EndpointId, to: Bound) -> Result<Ack, Refused> {
        let mut host = self.0.lock().unwrap();
        if host.refuse == Some(to) {
            return Err(refusal());
        }
        host.bound.push((endpoint, to));
        Ok(Ack::Done)
    }

    fn fence(&mut self, endpoint: EndpointId) -> Result<(), FenceFailed> {
        let mut host = self.0.lock().unwrap();
        host.fenced.push(endpoint);
        if host.fence_fails { Err(FenceFailed("told to fail".into())) } else { Ok(()) }
    }
}
