//! Endpoints come and go, sets, bypass, domains end, reset.

use crate::addr::IovaRange;
use crate::deliver::{FENCED_AGAIN, Seats};
use crate::domain::plan::Op;
use crate::endpoint::{EndpointId, EndpointShared, View};
use crate::error::{AttachError, AttachErrorKind, Cap};
use crate::iommu::unit::{Control, Home, Member, Unit};
use crate::iommu::{EndpointConfig, Iommu};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::{CallbackScope, StepScope};
use crate::sync::lock;
use crate::table::PAGE;

/// What is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetKind {
    /// The IOMMU alone, by its driver: bypass stays as it is.
    Device,
    /// The machine: bypass goes back to what it was at first.
    System,
}

/// What a reset has left to do.
#[derive(Debug)]
#[must_use]
pub struct Reset {
    /// Resolves when nothing of what was mapped is in use any more.
    pub completion: Completion,
    /// Readers that were inside a guard at the reset, by endpoint and label: devices that were not stopped first.
    pub inside: Vec<(EndpointId, String)>,
}

impl Iommu {
    /// Takes everything back: all endpoints see the default view, all domains are gone. The devices behind are to be
    /// stopped first; whoever could not be fenced before is fenced once more.
    ///
    /// # Errors
    /// See [`AttachErrorKind`]: the endpoints that refused their default view are blocked, and the reset goes on for all
    /// others; the first refusal is what is told.
    pub fn reset(&self, kind: ResetKind) -> Result<Reset, AttachError> {
        let _scope = StepScope::enter().map_err(|_| AttachErrorKind::InCallback)?;
        let mut control = lock(&self.unit.control);
        let inside = control
            .spaces()
            .map(|domain| &domain.readers)
            .chain(&control.retired)
            .flat_map(|readers| readers.inside())
            .filter_map(|slot| Some((EndpointId::from_key(slot.endpoint)?, slot.label.to_string())))
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect();
        let mut done = Completion::ready();
        self.unit.fence_again(&mut control, &mut done);
        let mut refused = None;
        // Bypass first, so that each endpoint moves once.
        let ids: Vec<_> = control.endpoints.iter().map(|(id, m)| (*id, m.attached)).collect();
        let attached: Vec<_> = ids.iter().filter(|(_, a)| a.is_some()).map(|(id, _)| *id).collect();
        if kind == ResetKind::System && control.bypass != self.unit.config.initial_bypass {
            match self.unit.switch_bypass(&mut control, self.unit.config.initial_bypass) {
                Ok(completion) => done.merge(completion),
                Err(error) => {
                    done.merge(error.completion);
                    refused = Some(error.kind);
                }
            }
        }
        for group in sets_of(&control, &attached) {
            let moves: Vec<_> = group.iter().map(|id| (*id, id.unattached())).collect();
            match self.unit.move_all(&mut control, &moves, false) {
                Ok(completion) => done.merge(completion),
                Err(error) => {
                    done.merge(error.completion);
                    refused = refused.or(Some(error.kind));
                    let blocks: Vec<_> = group.iter().map(|id| (*id, Some(View::Blocked))).collect();
                    match self.unit.move_all(&mut control, &blocks, false) {
                        Ok(completion) => done.merge(completion),
                        Err(error) => done.merge(error.completion),
                    }
                }
            }
        }
        let domains: Vec<u32> = control.domains.keys().copied().collect();
        for id in domains {
            if control.endpoints_in(id).next().is_none()
                && let Some(completion) = self.unit.destroy_domain(&mut control, id)
            {
                done.merge(completion);
            }
        }
        // What was in use of domains that have gone before is in it too.
        for readers in control.retired.iter().filter(|readers| !readers.is_unused(&[IovaRange::ALL])) {
            done.add_removal(readers, None, &[IovaRange::ALL]);
        }
        match refused {
            None => Ok(Reset { completion: done, inside }),
            Some(kind) => Err(AttachError { kind, blocked: Vec::new(), completion: done }),
        }
    }
}

/// Groups endpoints that move together.
fn sets_of(control: &Control, ids: &[EndpointId]) -> Vec<Vec<EndpointId>> {
    let mut groups: Vec<(Option<u64>, Vec<EndpointId>)> = Vec::new();
    for id in ids {
        let set = control.endpoints.get(id).and_then(|m| m.set);
        match groups.iter_mut().find(|(other, _)| set.is_some() && *other == set) {
            Some((_, group)) => group.push(*id),
            None => groups.push((set, vec![*id])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

impl Unit {
    /// Tries once more to cut off whoever could not be, since devices have been stopped. `done` is not over before they
    /// are.
    fn fence_again(&self, control: &mut Control, done: &mut Completion) {
        for domain in control.spaces() {
            lock(&domain.state).seats.fence_again(done);
        }
        for member in control.endpoints.values_mut() {
            member.parked.fence_again(done);
        }
        let uncut: Vec<_> = control.uncut.iter().map(|(id, (binding, _))| (*id, *binding)).collect();
        for (id, binding) in uncut {
            if !self.fence_at_host(control, binding, id, FENCED_AGAIN)
                && let Some((_, holds)) = control.uncut.get(&id)
            {
                holds.iter().for_each(|h| done.add_removal(&h.space, Some(id.key()), &[IovaRange::ALL]));
            }
        }
    }

    pub(crate) fn add_endpoint(&self, id: EndpointId, config: EndpointConfig) -> Result<(), AttachErrorKind> {
        let mut control = lock(&self.control);
        if control.endpoints.contains_key(&id) {
            return Err(AttachErrorKind::Exists(id.to_string()));
        }
        if control.endpoints.len() >= self.config.endpoints {
            return Err(AttachErrorKind::Cap(Cap::Endpoints));
        }
        let mut regions = config.regions;
        regions.sort_by_key(|r| r.range);
        for (at, region) in regions.iter().enumerate() {
            let overlaps =
                regions.iter().skip(at.saturating_add(1)).any(|next| next.range.overlaps(region.range));
            if overlaps || !region.range.is_aligned(PAGE) {
                return Err(AttachErrorKind::Regions(region.range));
            }
        }
        let regions = regions.into();
        let attached = id.unattached();
        let domain = control.space_of(attached.unwrap_or_else(|| control.default_view()))?;
        let sight = control.sight(Some(id), &regions, self.config.faults.as_ref(), domain);
        let shared = EndpointShared::new(Some(id), sight);
        let parked = Seats::default();
        control.endpoints.insert(id, Member { shared, attached, regions, parked, binding: None, set: None });
        Ok(())
    }

    pub(crate) fn remove_endpoint(&self, id: EndpointId) -> Result<Completion, AttachErrorKind> {
        let mut control = lock(&self.control);
        if !control.endpoints.contains_key(&id) {
            return Err(AttachErrorKind::NoEndpoint(id));
        }
        let mut done = Completion::ready();
        let pasids = control.endpoints.keys().filter(|e| e.requester == id.requester && **e != id);
        let pasids: Vec<_> = pasids.filter(|_| id.pasid.is_none()).copied().collect();
        for id in pasids.into_iter().chain([id]) {
            // A set of its own first: who goes splits nothing.
            if let Some(member) = control.endpoints.get_mut(&id) {
                member.set = None;
            }
            match self.move_all(&mut control, &[(id, Some(View::Blocked))], false) {
                Ok(completion) => done.merge(completion),
                Err(error) => {
                    done.merge(error.completion);
                    self.block(&mut control, id, &error.kind.to_string(), &mut done);
                }
            }
            if let Some(mut member) = control.endpoints.remove(&id) {
                member.shared.publish(|sight| sight.moved_to(None));
                control.homes.retain(|_, home| *home != Home::Endpoint(id));
                // The subscribers go with it: empty by now, or fenced.
                done.let_go(core::mem::take(&mut member.parked));
            }
        }
        Ok(done)
    }

    pub(crate) fn isolate_together(&self, ids: &[EndpointId]) -> Result<(), AttachErrorKind> {
        let mut control = lock(&self.control);
        let mut first: Option<(EndpointId, View)> = None;
        for id in ids {
            let member = control.endpoints.get(id).ok_or(AttachErrorKind::NoEndpoint(*id))?;
            let view = control.view_of(member);
            let (with, seen) = *first.get_or_insert((*id, view));
            if seen != view || member.set.is_some() {
                return Err(AttachErrorKind::SplitsSet { endpoint: *id, with });
            }
        }
        let set = control.next_set;
        control.next_set = set.wrapping_add(1);
        for id in ids {
            if let Some(member) = control.endpoints.get_mut(id) {
                member.set = Some(set);
            }
        }
        // A mirror of one is the host's hold on all of them.
        let shared: Vec<_> =
            ids.iter().filter_map(|id| Some((*id, control.endpoints.get(id)?.shared.clone()))).collect();
        let serve = |seats: &Seats| {
            for seat in &seats.mirrors {
                let follows = seat.sub.endpoint();
                if follows.is_some_and(|id| ids.contains(&id)) {
                    shared.iter().filter(|(id, _)| Some(*id) != follows).for_each(|(_, s)| seat.sub.serve(s));
                }
            }
        };
        control.spaces().for_each(|domain| serve(&lock(&domain.state).seats));
        control.endpoints.values().for_each(|member| serve(&member.parked));
        Ok(())
    }

    pub(crate) fn set_bypass(&self, on: bool) -> Result<Completion, AttachError> {
        let mut control = lock(&self.control);
        self.switch_bypass(&mut control, on)
    }

    fn switch_bypass(&self, control: &mut Control, on: bool) -> Result<Completion, AttachError> {
        if control.bypass == on {
            return Ok(Completion::ready());
        }
        let idle = control.endpoints.iter().filter(|(_, m)| m.attached.is_none()).map(|(id, _)| *id);
        let idle: Vec<_> = idle.collect();
        // Moved as if each were attached to what the switch will say, then left to the switch.
        let to = if on { View::Identity } else { View::Blocked };
        let moves: Vec<_> = idle.iter().map(|id| (*id, Some(to))).collect();
        let moved = self.move_all(control, &moves, true);
        let blocked = moved.as_ref().err().map(|e| e.blocked.clone()).unwrap_or_default();
        for id in idle.iter().filter(|id| !blocked.contains(id)) {
            if let Some(member) = control.endpoints.get_mut(id) {
                member.attached = None;
            }
        }
        let completion = moved?;
        control.bypass = on;
        Ok(completion)
    }

    /// Ends a domain that no endpoint sees.
    pub(crate) fn destroy_domain(&self, control: &mut Control, id: u32) -> Option<Completion> {
        let domain = control.domains.remove(&id)?;
        let mut done = Completion::ready();
        let mut state = lock(&domain.state);
        state.may_cut = true;
        let gone = domain.run(&mut state, &[Op::Unmap(IovaRange::ALL)], false, &mut done);
        debug_assert!(gone.is_ok(), "a removal cannot be refused");
        {
            // Where the guest's tables counted, the record need not know what caches hold; device TLBs have heard nothing.
            let _callback = CallbackScope::enter();
            let caches = state.seats.caches.iter();
            caches.for_each(|cache| cache.invalidate(IovaRange::ALL, &domain.readers, &mut done));
        }
        done.add_removal(&domain.readers, None, &[IovaRange::ALL]);
        state.dead = true;
        let seats = core::mem::take(&mut state.seats);
        drop(state);
        self.settle_wanted(&domain);
        let space = domain.space;
        control.homes.retain(|_, home| *home != Home::Space(space));
        control.retired.retain(|readers| !readers.is_unused(&[IovaRange::ALL]));
        if !domain.readers.is_unused(&[IovaRange::ALL]) {
            control.retired.push(domain.readers.clone());
        }
        done.let_go(seats);
        Some(done)
    }
}
