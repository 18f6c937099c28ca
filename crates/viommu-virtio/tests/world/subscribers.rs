//! Mirrors and caches that come, refuse and go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use viommu::ack::Resolver;
use viommu::endpoint::RegionKind;
use viommu::fuzzing::recording::{Event, Handle, RecordingCache, RecordingMirror};
use viommu::subscribe::{FenceFailed, Mirror, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Access, Ack, FillError, Interest, Iova, IovaRange, Mapping, Subscription};
use viommu_virtio::EndpointPlan;

use super::World;
use super::bytes::{Choices, ENDPOINTS, HIGH};
use crate::reference::{self, DEVERR, NOMEM, RANGE, UNSUPP, View};

/// Says its own kind of no.
struct Picky {
    inner: Box<RecordingMirror>,
    kind: RefusalKind,
}

impl Picky {
    fn say<T>(&self, outcome: Result<T, Refused>) -> Result<T, Refused> {
        outcome.map_err(|refused| Refused { kind: self.kind, ..refused })
    }
}

impl Mirror for Picky {
    fn reach(&self) -> Reach {
        self.inner.reach()
    }
    fn begin(&mut self) {
        self.inner.begin();
    }
    fn commit(&mut self) -> Ack {
        self.inner.commit()
    }
    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        let outcome = self.inner.map(extent);
        self.say(outcome)
    }
    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let outcome = self.inner.unmap(range);
        self.say(outcome)
    }
    fn replace(&mut self, old: &Mapping, new: &Mapping) -> Result<Ack, Refused> {
        let outcome = self.inner.replace(old, new);
        self.say(outcome)
    }
    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.inner.fence()
    }
    fn held(&self) -> Vec<Mapping> {
        self.inner.held()
    }
}

pub(crate) struct Sub {
    pub(crate) subscription: Subscription,
    pub(crate) handle: Handle,
    pub(crate) endpoint: u32,
    /// `None`: a cache.
    pub(crate) mirror: Option<reference::Mirror>,
    /// Unmaps until one is refused; 0: none will be.
    pub(crate) refuse_unmap: Arc<AtomicU32>,
    /// Its unmaps were told to fail, so it may be fenced.
    pub(crate) unsound: bool,
}

struct Made {
    mirror: Box<Picky>,
    handle: Handle,
    model: reference::Mirror,
    refuse_unmap: Arc<AtomicU32>,
}

fn make(
    choices: &mut Choices<'_>,
    word: u8,
    endpoint: u32,
    poison: &Arc<AtomicU64>,
    apertures: Vec<IovaRange>,
) -> Made {
    let how = choices.byte();
    let reach = Reach {
        apertures,
        entries: (how & 1 != 0).then_some(8),
        replace: how & 2 != 0,
        wide_unmap: how & 4 == 0,
        batches: how & 8 != 0,
        mmio: how & 16 != 0,
        ..Reach::default()
    };
    let (kind, status) = [
        (RefusalKind::Resources, NOMEM),
        (RefusalKind::Range, RANGE),
        (RefusalKind::Unsupported, UNSUPP),
        (RefusalKind::Device, DEVERR),
    ][usize::from(word % 4)];
    let minds = how & 32 != 0;
    let model = reference::Mirror {
        endpoint,
        entries: reach.entries.map(|most| most as usize),
        refuses: minds.then_some(status),
        mmio: reach.mmio,
        armed: false,
        fenced: false,
    };
    let (inner, handle) = RecordingMirror::new(reach);
    let refuse_unmap = Arc::new(AtomicU32::new(0));
    let (countdown, poison) = (refuse_unmap.clone(), poison.clone());
    handle.lock().refuse = Some(Box::new(move |event| match event {
        Event::Map(m) | Event::Replace(_, m) => minds && is_over(m, poison.load(Ordering::Relaxed)),
        Event::Unmap(_) => {
            let left = countdown.load(Ordering::Relaxed);
            countdown.store(left.saturating_sub(1), Ordering::Relaxed);
            left == 1
        }
        _ => false,
    }));
    Made { mirror: Box::new(Picky { inner, kind }), handle, model, refuse_unmap }
}

fn is_over(m: &Mapping, page: u64) -> bool {
    page != u64::MAX && m.range.contains(Iova(page))
}

impl World {
    /// What an endpoint is made of when it comes: regions, and a mirror of little reach in one case.
    fn plan(
        &mut self,
        choices: &mut Choices<'_>,
        id: u32,
    ) -> (EndpointPlan, reference::Endpoint, Option<Made>) {
        let unit = self.unit;
        let top = 0_u64.wrapping_sub(16 * unit);
        let regions = match id {
            8 => vec![(6 * unit, 7 * unit - 1, true)],
            9 => vec![(4 * unit, 6 * unit - 1, false), (top + 15 * unit, u64::MAX, true)],
            _ => vec![],
        };
        let mut plan = EndpointPlan::default();
        let mut model = reference::Endpoint::default();
        if self.model.offered & reference::PROBE == 0 {
            // The driver could not be told of regions.
            return (plan, model, None);
        }
        for (start, end, msi) in regions {
            let kind = if msi { RegionKind::Msi } else { RegionKind::Reserved };
            plan = plan.region(IovaRange::new(Iova(start), Iova(end)).unwrap(), kind);
            model.regions.push(reference::Region { start, end, msi });
        }
        let mut made = None;
        if id == 11 {
            let of = |start: u64, end: u64| IovaRange::new(Iova(start), Iova(end)).unwrap();
            let apertures = vec![of(0, 12 * unit - 1), of(HIGH, HIGH + (16 * unit - 1))];
            let holes = [(12 * unit, HIGH - 1), (HIGH + 16 * unit, u64::MAX)];
            for (start, end) in holes {
                let (start, end) = (start.max(self.model.input.0), end.min(self.model.input.1));
                if start <= end {
                    model.regions.push(reference::Region { start, end, msi: false });
                }
            }
            made = Some(make(choices, self.word, id, &self.poison, apertures));
        }
        (plan, model, made)
    }

    pub(crate) fn add_endpoint(&mut self, choices: &mut Choices<'_>, id: u32) {
        let (mut plan, model, made) = self.plan(choices, id);
        let mut rest = None;
        if let Some(Made { mirror, handle, model, refuse_unmap }) = made {
            plan = plan.mirror(mirror, Interest::MIRROR);
            rest = Some((handle, model, refuse_unmap));
        }
        let outcome = self.device.add_endpoint(id, plan);
        if self.model.endpoints.contains_key(&id) {
            assert!(outcome.is_err(), "two endpoints {id}");
            return;
        }
        let added = outcome.unwrap();
        assert_eq!(added.subscriptions.len(), usize::from(rest.is_some()));
        self.model.endpoints.insert(id, model);
        self.readers.insert(id, added.endpoint.reader("steps").unwrap());
        for mut subscription in added.subscriptions {
            let (handle, mirror, refuse_unmap) = rest.take().unwrap();
            let filled = subscription.filled();
            self.subs.push(Sub {
                subscription,
                handle,
                endpoint: id,
                mirror: Some(mirror),
                refuse_unmap,
                unsound: false,
            });
            self.complete(filled);
        }
    }

    pub(crate) fn subscribe(&mut self, choices: &mut Choices<'_>) {
        let id = ENDPOINTS[usize::from(choices.byte() % 4)];
        if self.subs.len() >= 8 || !self.model.endpoints.contains_key(&id) {
            return;
        }
        if choices.byte() & 3 == 0 {
            let (cache, handle) = RecordingCache::new();
            let endpoint = self.device.endpoint(id).unwrap();
            let subscription = endpoint.subscribe_cache(cache, Interest::CACHE).unwrap();
            let refuse_unmap = Arc::default();
            self.subs.push(Sub {
                subscription,
                handle,
                endpoint: id,
                mirror: None,
                refuse_unmap,
                unsound: false,
            });
            return;
        }
        let Made { mirror, handle, model, refuse_unmap } =
            make(choices, self.word, id, &self.poison, vec![IovaRange::ALL]);
        let due = self.model.may_subscribe(&model);
        match self.device.subscribe_mirror(id, mirror, Interest::MIRROR) {
            Ok(mut subscription) => {
                assert!(due, "a mirror that should have been refused");
                let filled = subscription.filled();
                let mirror = Some(model);
                self.subs.push(Sub {
                    subscription,
                    handle,
                    endpoint: id,
                    mirror,
                    refuse_unmap,
                    unsound: false,
                });
                self.complete(filled);
            }
            Err(error) => {
                assert!(!due, "a mirror that was refused for no reason: {error}");
                assert!(handle.held().is_empty(), "something is left with who was refused");
            }
        }
    }

    pub(crate) fn unsubscribe(&mut self, choices: &mut Choices<'_>) {
        let count = self.subs.len();
        if count == 0 {
            return;
        }
        let sub = self.subs.remove(usize::from(choices.byte()) % count);
        let was_fenced = sub.subscription.is_fenced();
        let done = sub.subscription.leave();
        let resolvers = core::mem::take(&mut sub.handle.lock().resolvers);
        resolvers.into_iter().for_each(Resolver::done);
        self.complete(done);
        let record = sub.handle.lock();
        assert!(was_fenced || record.fenced || record.shadow.is_empty(), "leaves something behind");
    }

    /// Trouble: unmaps will be refused, acks come later, a page is refused from now on.
    pub(crate) fn meddle(&mut self, choices: &mut Choices<'_>) {
        let how = choices.byte();
        if how & 3 == 0 {
            let page = HIGH + u64::from(choices.byte() % 16) * self.unit;
            let is_held = self.subs.iter().any(|sub| sub.handle.held().iter().any(|m| is_over(m, page)));
            let page = if is_held || how & 4 != 0 { None } else { Some(page) };
            self.model.poison = page;
            self.poison.store(page.unwrap_or(u64::MAX), Ordering::Relaxed);
            return;
        }
        let at = usize::from(choices.byte());
        let count = self.subs.len().max(1);
        let Some(sub) = self.subs.get_mut(at % count) else { return };
        if how & 3 == 1 && sub.mirror.is_some() && !sub.subscription.is_fenced() {
            sub.refuse_unmap.store(1, Ordering::Relaxed);
            sub.unsound = true;
        } else {
            let mut record = sub.handle.lock();
            record.pending = !record.pending;
        }
    }

    pub(crate) fn fill(&mut self, choices: &mut Choices<'_>) {
        let (at, place) = (usize::from(choices.byte()), choices.byte());
        let write = choices.byte() & 1 != 0;
        let count = self.subs.len().max(1);
        let Some(sub) = self.subs.get(at % count).filter(|sub| sub.mirror.is_none()) else { return };
        let windows = super::bytes::windows(self.unit);
        let iova = windows[usize::from(place >> 4) % 3] + u64::from(place & 15) * self.unit + 8;
        let access = if write { Access::WRITE } else { Access::READ };
        let due = self.model.access(sub.endpoint, iova, write);
        match sub.subscription.fill(Iova(iova), access) {
            Ok(entry) => {
                let gpa = match due {
                    Ok(
                        reference::Reached::Memory(at)
                        | reference::Reached::Rom(at)
                        | reference::Reached::Registers(at),
                    ) => at,
                    other => panic!("filled with what is not there: {entry:?}, {other:?}"),
                };
                assert!(entry.range.contains(Iova(iova)) && entry.access.contains(access));
                assert_eq!(entry.translate(Iova(iova)).0, gpa);
            }
            Err(FillError::Fault(_)) => {
                assert!(
                    !matches!(due, Ok(reference::Reached::Memory(_))),
                    "not filled at {iova:#x}: {due:?}"
                );
            }
            Err(error) => panic!("not filled: {error}"),
        }
    }

    /// Tells the model what has become of the subscribers, and holds what they have against the record.
    pub(crate) fn check_subscribers(&mut self) {
        for (id, endpoint) in &mut self.model.endpoints {
            endpoint.fenced = self.device.endpoint(*id).unwrap().is_fenced();
        }
        self.model.mirrors.clear();
        for sub in &mut self.subs {
            let fenced = sub.subscription.is_fenced();
            assert_eq!(fenced, sub.handle.lock().fenced);
            assert!(!fenced || sub.unsound, "fenced for no reason");
            sub.handle.take();
            if let Some(mirror) = &mut sub.mirror {
                mirror.fenced = fenced;
                mirror.armed = sub.refuse_unmap.load(Ordering::Relaxed) != 0;
                self.model.mirrors.push(*mirror);
            }
            if fenced {
                continue;
            }
            let audit = sub.subscription.audit().expect("it tells what it holds");
            assert!(audit.is_clean(), "at endpoint {}: {audit:?}", sub.endpoint);
            if sub.mirror.is_some()
                && let Some(View::Nothing) = self.model.view(sub.endpoint)
            {
                assert!(sub.handle.held().is_empty(), "holds something and sees nothing");
            }
        }
    }
}
