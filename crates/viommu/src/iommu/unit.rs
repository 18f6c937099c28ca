//! What the unit's lock protects: who is there, and what each of them sees.

use std::collections::BTreeMap;
use std::sync::Weak;

use crate::addr::IovaRange;
use crate::backing::{Backing, Memory};
use crate::deliver::Seats;
use crate::domain::inner::{DomainInner, DomainState, Line, Tables};
use crate::endpoint::{EndpointId, EndpointShared, Region, Sight, View};
use crate::error::{AttachErrorKind, Cap, Incident};
use crate::quiesce::scope::{CallbackScope, StepScope};
use crate::quiesce::space;
use crate::reader::FaultSink;
use crate::subscribe::{Binding, Kinds, Producer, Refused, Space};
use crate::sync::{Arc, AtomicU64, AtomicUsize, Mutex, Ordering, StdArc, lock};
use crate::table::{Arena, Table};

pub(crate) type Alarm = StdArc<dyn Fn(&Incident) + Send + Sync>;

/// Shared by the unit and its domains: counted across them.
pub(crate) struct Totals {
    mappings: AtomicU64,
    /// Completions that wait for a subscriber.
    pub(crate) outstanding: AtomicUsize,
    alarms: AtomicU64,
    pub(crate) cap: Option<u64>,
    pub(crate) alarm: Option<Alarm>,
}

impl Totals {
    pub(crate) fn new(cap: Option<u64>, alarm: Option<Alarm>) -> Arc<Self> {
        let (mappings, alarms) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Self { mappings, outstanding: AtomicUsize::new(0), alarms, cap, alarm })
    }

    /// Counts `count` more mappings; `false` when that is more than the cap.
    #[inline]
    pub(crate) fn claim(&self, count: u64) -> bool {
        let Some(cap) = self.cap else { return true };
        let grow = |now: u64| now.checked_add(count).filter(|now| *now <= cap);
        self.mappings.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow).is_ok()
    }

    #[inline]
    pub(crate) fn give_back(&self, count: u64) {
        if self.cap.is_some() && count != 0 {
            self.mappings.fetch_sub(count, Ordering::Relaxed);
        }
    }

    pub(crate) fn alarm(&self, incident: &Incident) {
        // A guest can cause some of these again and again: the log gets the first ones, then ever fewer.
        let nth = self.alarms.fetch_add(1, Ordering::Relaxed);
        if nth < 16 || nth.is_power_of_two() {
            #[cfg(feature = "tracing")]
            tracing::error!(?incident, nth, "a subscriber or an endpoint was cut off");
        }
        if let Some(alarm) = &self.alarm {
            alarm(incident);
        }
    }
}

/// What does not change after the unit is made.
pub(crate) struct Config {
    pub(crate) page_size: u64,
    pub(crate) aperture: IovaRange,
    pub(crate) initial_bypass: bool,
    pub(crate) domain_mappings: Option<u64>,
    pub(crate) domains: usize,
    pub(crate) endpoints: usize,
    pub(crate) subscriptions: usize,
    pub(crate) faults: Option<StdArc<dyn FaultSink>>,
    pub(crate) producer: Option<StdArc<dyn Producer>>,
}

pub(crate) struct Unit {
    pub(crate) config: Config,
    pub(crate) arena: Arc<Arena>,
    pub(crate) totals: Arc<Totals>,
    pub(crate) this: Weak<Self>,
    /// Taken before any domain's lock, never inside one.
    pub(crate) control: Mutex<Control>,
    pub(crate) next_subscription: AtomicU64,
}

pub(crate) struct Control {
    pub(crate) backing: Arc<Backing>,
    pub(crate) bypass: bool,
    pub(crate) endpoints: BTreeMap<EndpointId, Member>,
    pub(crate) domains: BTreeMap<u32, Arc<DomainInner>>,
    pub(crate) identity: Arc<DomainInner>,
    pub(crate) bindings: BTreeMap<u64, Box<dyn Binding>>,
    /// Where each subscription hangs.
    pub(crate) homes: BTreeMap<u64, Home>,
    pub(crate) next_set: u64,
    /// Endpoints that their hosts (bindings) could not cut off, and where their devices may still reach something.
    pub(crate) uncut: BTreeMap<EndpointId, (u64, Vec<space::Hold>)>,
    /// The readers of domains that are gone, as long as one of them may be inside.
    pub(crate) retired: Vec<Arc<space::Space>>,
}

/// Where a subscription hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    /// It follows an endpoint.
    Endpoint(EndpointId),
    /// It stays at an address space.
    Space(Space),
}

/// An endpoint, as the unit keeps it.
pub(crate) struct Member {
    pub(crate) shared: Arc<EndpointShared>,
    /// What the guest asked for; `None`: nothing, so bypass or blocked as the switch says.
    pub(crate) attached: Option<View>,
    pub(crate) regions: Arc<[Region]>,
    /// Those that follow it, while it is blocked.
    pub(crate) parked: Seats,
    pub(crate) binding: Option<u64>,
    /// Endpoints of one set move together.
    pub(crate) set: Option<u64>,
}

/// A new, empty address space.
pub(crate) fn make_domain(
    config: &Config,
    arena: &Arc<Arena>,
    totals: &Arc<Totals>,
    space: Space,
    tables: &Tables,
    backing: &Arc<Backing>,
) -> Result<Arc<DomainInner>, AttachErrorKind> {
    let readers = Arc::new(space::Space::default());
    let no_memory = |_| AttachErrorKind::Cap(Cap::TableBytes);
    let (table, writer) = Table::new(arena, readers.clone()).map_err(no_memory)?;
    let (walker, caching_mode) = match tables {
        Tables::Walked { walker, caching_mode } => (Some(walker.clone()), *caching_mode),
        _ => (None, true),
    };
    let identity = space == Space::Identity;
    let state = DomainState {
        writer,
        seats: Seats::default(),
        memory: Memory::new(backing.clone()),
        regions: Vec::new(),
        told: Kinds::empty(),
        dirty: None,
        limit: if identity { None } else { config.domain_mappings },
        may_cut: !matches!(tables, Tables::Owned),
        refusable: walker.is_none() && !identity,
        dead: false,
        gone: Vec::new(),
        removed: Vec::new(),
        pieces: Vec::new(),
    };
    // Identity covers whatever has backing, and is not the guest's to fill.
    let totals = if identity { Totals::new(None, totals.alarm.clone()) } else { totals.clone() };
    Ok(Arc::new(DomainInner {
        space,
        table,
        readers,
        walker,
        caching_mode,
        version: Line(AtomicU64::new(0)),
        page_size: if identity { crate::table::PAGE } else { config.page_size },
        aperture: if identity { IovaRange::ALL } else { config.aperture },
        totals,
        state: Line(Mutex::new(state)),
    }))
}

impl Unit {
    /// Fences a subscriber whose pending ack came back as a failure.
    pub(crate) fn fence(&self, id: u64, why: &str) {
        let _scope = StepScope::enter();
        let mut control = lock(&self.control);
        for domain in control.spaces() {
            lock(&domain.state).seats.fence_and_tell(id, why, Some(&domain.readers));
        }
        for member in control.endpoints.values_mut() {
            member.parked.fence_and_tell(id, why, None);
        }
    }

    /// Asks the model for `more` besides what it has been asked for. Who does not come after all is told by
    /// [`Unit::settle_wanted`].
    pub(crate) fn ask_producer(&self, domain: &DomainInner, more: Kinds) -> Result<(), Refused> {
        let old = lock(&domain.state).told;
        self.tell_producer(domain.space, old, old | more)?;
        lock(&domain.state).told = old | more;
        Ok(())
    }

    /// Tells the model what is wanted now, whatever it was asked for. Observers that moved here are new to it; it cannot
    /// refuse them.
    pub(crate) fn settle_wanted(&self, domain: &DomainInner) {
        let (old, new) = {
            let mut state = lock(&domain.state);
            let new = state.seats.wanted();
            (core::mem::replace(&mut state.told, new), new)
        };
        let _ = self.tell_producer(domain.space, old, new);
    }

    fn tell_producer(&self, space: Space, old: Kinds, new: Kinds) -> Result<(), Refused> {
        match &self.config.producer {
            Some(producer) if old != new => {
                let _callback = CallbackScope::enter();
                producer.wanted_changed(space, old, new)
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn make_domain(
        &self,
        space: Space,
        tables: &Tables,
        backing: &Arc<Backing>,
    ) -> Result<Arc<DomainInner>, AttachErrorKind> {
        make_domain(&self.config, &self.arena, &self.totals, space, tables, backing)
    }

    /// Completions that have not resolved.
    pub(crate) fn outstanding(&self, control: &Control) -> usize {
        let removals = control.spaces().map(|domain| domain.readers.outstanding.load(Ordering::Relaxed));
        removals.sum::<usize>().saturating_add(self.totals.outstanding.load(Ordering::Relaxed))
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.next_subscription.fetch_add(1, Ordering::Relaxed)
    }
}

impl Control {
    /// An endpoint that its host could not cut off reaches nothing any more; whether there was one.
    pub(crate) fn let_go_of(&mut self, id: EndpointId) -> bool {
        let uncut = self.uncut.remove(&id);
        let was_uncut = uncut.is_some();
        uncut.into_iter().flat_map(|(_, holds)| holds).for_each(space::Hold::end);
        was_uncut
    }

    /// What the endpoint sees when the guest has asked for nothing.
    pub(crate) fn default_view(&self) -> View {
        if self.bypass { View::Identity } else { View::Blocked }
    }

    pub(crate) fn view_of(&self, member: &Member) -> View {
        member.attached.unwrap_or_else(|| self.default_view())
    }

    /// The address space of a view; `Ok(None)`: blocked.
    pub(crate) fn space_of(&self, view: View) -> Result<Option<Arc<DomainInner>>, AttachErrorKind> {
        match view {
            View::Blocked => Ok(None),
            View::Identity => Ok(Some(self.identity.clone())),
            View::Domain(id) => self.domains.get(&id).cloned().map(Some).ok_or(AttachErrorKind::NoDomain(id)),
        }
    }

    pub(crate) fn domain_at(&self, space: Space) -> Option<&Arc<DomainInner>> {
        match space {
            Space::Identity => Some(&self.identity),
            Space::Domain(id) => self.domains.get(&id),
        }
    }

    pub(crate) fn spaces(&self) -> impl Iterator<Item = &Arc<DomainInner>> {
        self.domains.values().chain([&self.identity])
    }

    /// Endpoints that see the domain.
    pub(crate) fn endpoints_in(&self, id: u32) -> impl Iterator<Item = EndpointId> {
        self.endpoints.iter().filter(move |(_, m)| m.attached == Some(View::Domain(id))).map(|(id, _)| *id)
    }

    /// What a new endpoint sees.
    pub(crate) fn sight(
        &self,
        id: Option<EndpointId>,
        regions: &Arc<[Region]>,
        faults: Option<&StdArc<dyn FaultSink>>,
        domain: Option<Arc<DomainInner>>,
    ) -> Sight {
        Sight {
            endpoint: id,
            domain,
            backing: self.backing.clone(),
            regions: regions.clone(),
            table: None,
            clear_from: 0,
            faults: faults.cloned(),
            fenced: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claim_stops_at_the_cap_and_gives_back() {
        let totals = Totals::new(Some(2), None);
        assert!(totals.claim(2));
        assert!(!totals.claim(1));
        totals.give_back(1);
        assert!(totals.claim(1));
        let free = Totals::new(None, None);
        assert!(free.claim(u64::MAX) && free.claim(u64::MAX));
    }
}
