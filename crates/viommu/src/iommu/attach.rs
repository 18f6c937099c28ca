//! Views change: attach, detach, bypass, bindings.

use std::collections::BTreeMap;

use crate::ack::Ack;
use crate::addr::IovaRange;
use crate::deliver::{MirrorSeat, ObserverSeat, Seats, Sub};
use crate::domain::inner::DomainInner;
use crate::endpoint::{EndpointId, Region, View};
use crate::error::{AttachError, AttachErrorKind, Incident};
use crate::iommu::seating::{ReplayError, fits, join, leave, leave_one};
use crate::iommu::unit::{Control, Unit};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::CallbackScope;
use crate::quiesce::space::Hold;
use crate::subscribe::{Bound, Interest, Kinds, RefusalKind, Refused};
use crate::sync::{Arc, lock};

impl Unit {
    /// Gives each of `moves` what it asks for (`None`: nothing, the default view), all or none. Who is fenced comes to
    /// nothing but the default view, unless it is the default view that changes (`fenced_too`).
    pub(crate) fn move_all(
        &self,
        control: &mut Control,
        moves: &[(EndpointId, Option<View>)],
        fenced_too: bool,
    ) -> Result<Completion, AttachError> {
        let mut views: Vec<View> = moves.iter().filter_map(|(_, to)| *to).collect();
        let members = moves.iter().filter_map(|(id, _)| control.endpoints.get(id));
        views.extend(members.map(|member| control.view_of(member)));
        views.push(control.default_view());
        let outcome = self.move_unsettled(control, moves, fenced_too);
        for view in views {
            if let Ok(Some(domain)) = control.space_of(view) {
                self.settle_wanted(&domain);
            }
        }
        outcome
    }

    fn move_unsettled(
        &self,
        control: &mut Control,
        moves: &[(EndpointId, Option<View>)],
        fenced_too: bool,
    ) -> Result<Completion, AttachError> {
        let mut done = Completion::ready();
        let mut movers = Vec::new();
        for (id, attached) in moves {
            let member = control.endpoints.get(id).ok_or(AttachErrorKind::NoEndpoint(*id))?;
            // Bypass is for requests without PASID.
            let attached = attached.or_else(|| id.pasid.map(|_| View::Blocked));
            let to = attached.unwrap_or_else(|| control.default_view());
            control.space_of(to)?;
            // To nothing it may always go.
            let comes = matches!(attached, Some(View::Domain(_) | View::Identity));
            if comes && !fenced_too && member.shared.sight().1.fenced {
                return Err(AttachErrorKind::Fenced(*id).into());
            }
            movers.push((*id, control.view_of(member), to, attached));
        }
        check_sets(control, &movers)?;
        for (id, from, to, _) in movers.iter().filter(|(_, from, to, _)| from != to) {
            self.check_move(control, *id, *from, *to)?;
        }
        let mut moved: Vec<(EndpointId, View)> = Vec::new();
        for (id, from, to, _) in movers.iter().filter(|(_, from, to, _)| from != to) {
            let Err((kind, is_back)) = self.move_one(control, *id, *from, *to, &mut done) else {
                moved.push((*id, *from));
                continue;
            };
            let mut blocked = Vec::new();
            if !is_back {
                blocked.push(*id);
            }
            for (id, from) in moved.into_iter().rev() {
                let now = movers.iter().find(|m| m.0 == id).map_or(View::Blocked, |m| m.2);
                if self.move_one(control, id, now, from, &mut done).is_err() {
                    blocked.push(id);
                }
            }
            for id in &blocked {
                self.block(control, *id, &kind.to_string(), &mut done);
            }
            return Err(AttachError { kind, blocked, completion: done });
        }
        for (id, _, _, attached) in &movers {
            if let Some(member) = control.endpoints.get_mut(id) {
                member.attached = *attached;
            }
        }
        self.tell_moved(control, movers.iter().filter(|m| m.1 != m.2).map(|m| (m.0, m.2)));
        Ok(done)
    }

    /// Everything that can be refused before anything happens.
    fn check_move(
        &self,
        control: &Control,
        id: EndpointId,
        from: View,
        to: View,
    ) -> Result<(), AttachErrorKind> {
        let Some(target) = control.space_of(to)? else { return Ok(()) };
        let source = control.space_of(from)?;
        let regions = control.endpoints.get(&id).map_or_else(|| Arc::from([]), |m| m.regions.clone());
        if !target.is_identity() {
            check_regions(&target, id, &regions)?;
        }
        let (wanted, lenses) = look_at(control, source.as_ref(), id, |seats| {
            let mine = |sub: &Arc<Sub>| sub.endpoint() == Some(id) && !sub.is_fenced();
            let mirrors = seats.mirrors.iter().filter(|s| mine(&s.sub));
            (seats.wanted_by(id), mirrors.map(|s| (s.sub.id(), s.lens.clone())).collect::<Vec<_>>())
        });
        for (subscription, lens) in lenses {
            fits(&target, &lens, &regions).map_err(|(why, range)| AttachErrorKind::Unreachable {
                subscription,
                why,
                range,
            })?;
        }
        let not_produced = |why| AttachErrorKind::NotProduced { space: target.space, kinds: wanted, why };
        self.check_produced(&target, wanted).map_err(not_produced)
    }

    /// Whether `target` can give `wanted` besides what it gives already.
    pub(crate) fn check_produced(&self, target: &Arc<DomainInner>, wanted: Kinds) -> Result<(), Refused> {
        if wanted.contains(Kinds::MAP) && !target.caching_mode {
            let why = "the guest does not announce new entries (no caching mode)";
            return Err(Refused::new(RefusalKind::Unsupported, why));
        }
        self.ask_producer(target, wanted)
    }

    /// Moves one endpoint. On an error, `true`: it is where it was; `false`: it has nothing now.
    fn move_one(
        &self,
        control: &mut Control,
        id: EndpointId,
        from: View,
        to: View,
        done: &mut Completion,
    ) -> Result<(), (AttachErrorKind, bool)> {
        let source = control.space_of(from).map_err(|kind| (kind, true))?;
        let target = control.space_of(to).map_err(|kind| (kind, true))?;
        let Some(member) = control.endpoints.get(&id) else {
            return Err((AttachErrorKind::NoEndpoint(id), true));
        };
        let (shared, regions, binding) = (member.shared.clone(), member.regions.clone(), member.binding);
        if let Some(binding) = binding {
            // A fenced device gets nothing from its host, whatever its view, until it is bound again.
            let given = target.as_ref().filter(|_| !shared.sight().1.fenced);
            self.rebind(control, binding, id, source.as_ref(), given, done)
                .map_err(|refused| (AttachErrorKind::Refused(refused), true))?;
        }
        // A mirror cannot be at two places, and a cache that fills must be told of steps where it fills from: between
        // the old view and the new one there is none (L6).
        let followed = look_at(control, source.as_ref(), id, |seats| !seats.wanted_by(id).is_empty());
        if followed || target.is_none() {
            shared.publish(|sight| sight.moved_to(None));
        } else {
            shared.publish(|sight| sight.moved_to(target.clone()));
        }
        let seats = match &source {
            Some(source) => leave(source, id, done),
            None => {
                control.endpoints.get_mut(&id).map(|m| core::mem::take(&mut m.parked)).unwrap_or_default()
            }
        };
        if let Some(source) = &source {
            done.add_removal(&source.readers, Some(id.key()), &[IovaRange::ALL]);
            let lent = source.readers.leases.meeting(&[IovaRange::ALL], Some(id.key()));
            lent.iter().for_each(|lent| lent.revoke());
        }
        let outcome = match &target {
            Some(target) => join(target, seats, Some(id), &regions, done),
            None => {
                put_seats(control, None, id, seats);
                Ok(())
            }
        };
        match outcome {
            Ok(()) => {
                shared.publish(|sight| sight.moved_to(target.clone()));
                Ok(())
            }
            Err((seats, error)) => {
                let kind = AttachErrorKind::Refused(refused_of(error));
                let back = match &source {
                    Some(source) => {
                        join(source, *seats, Some(id), &regions, done).map_err(|(seats, _)| seats)
                    }
                    None => Err(seats),
                };
                match back {
                    Ok(()) => shared.publish(|sight| sight.moved_to(source.clone())),
                    Err(seats) => {
                        shared.publish(|sight| sight.moved_to(None));
                        put_seats(control, None, id, *seats);
                        return Err((kind, source.is_none()));
                    }
                }
                if let Some(binding) = binding {
                    // The bound mirrors hold both; only the switch goes back.
                    if self.rebind(control, binding, id, target.as_ref(), source.as_ref(), done).is_err() {
                        return Err((kind, false));
                    }
                }
                Err((kind, true))
            }
        }
    }

    /// Leaves an endpoint with nothing, after it could not be brought back.
    pub(crate) fn block(&self, control: &mut Control, id: EndpointId, why: &str, done: &mut Completion) {
        let Some(member) = control.endpoints.get_mut(&id) else { return };
        member.attached = Some(View::Blocked);
        member.shared.publish(|sight| sight.moved_to(None));
        let binding = member.binding;
        let cut = binding.is_none_or(|binding| self.fence_at_host(control, binding, id, why));
        let mut holds = Vec::new();
        // Wherever the failure has left those that follow it, and the mirrors that its host was to use.
        let mut seats = Seats::default();
        for domain in control.domains.values().chain([&control.identity]) {
            seats.append(leave(domain, id, done));
            done.add_removal(&domain.readers, Some(id.key()), &[IovaRange::ALL]);
            let bound: Vec<_> = {
                let state = lock(&domain.state);
                let bound = state.seats.mirrors.iter().filter(|s| binding.is_some() && s.binding == binding);
                bound.map(|s| s.sub.clone()).collect()
            };
            if !cut && !bound.is_empty() {
                holds.push(Hold::new(&domain.readers, id.key(), &id.to_string()));
            }
            for sub in bound {
                sub.forsake(id);
                if sub.serves_nobody() {
                    let seats = leave_one(domain, sub.id(), done);
                    done.let_go(seats);
                }
            }
        }
        put_seats(control, None, id, seats);
        if let Some(binding) = binding.filter(|_| !cut) {
            let uncut = control.uncut.entry(id).or_insert((binding, Vec::new()));
            uncut.1.append(&mut holds);
        }
        self.totals.alarm(&Incident::Blocked { endpoint: id, why: why.into() });
    }

    /// Has its host cut an endpoint off, and tells the alarm where that is news; whether it held.
    pub(crate) fn fence_at_host(
        &self,
        control: &mut Control,
        binding: u64,
        id: EndpointId,
        why: &str,
    ) -> bool {
        let Some(host) = control.bindings.get_mut(&binding) else { return true };
        let _callback = CallbackScope::enter();
        let (subscription, endpoint) = (binding, Some(id));
        match host.fence(id) {
            Ok(()) if control.let_go_of(id) => {
                self.totals.alarm(&Incident::Fenced { subscription, endpoint, why: why.into() });
                true
            }
            Ok(()) => true,
            Err(failed) => {
                let why = format!("{why}; {failed}");
                self.totals.alarm(&Incident::FenceFailed { subscription, endpoint, why });
                false
            }
        }
    }

    /// Switches the host from one shared mirror to another: made and filled before, emptied behind.
    pub(crate) fn rebind(
        &self,
        control: &mut Control,
        binding: u64,
        id: EndpointId,
        source: Option<&Arc<DomainInner>>,
        target: Option<&Arc<DomainInner>>,
        done: &mut Completion,
    ) -> Result<(), Refused> {
        let Control { bindings, endpoints, .. } = &mut *control;
        let (Some(host), Some(member)) = (bindings.get_mut(&binding), endpoints.get(&id)) else {
            return Ok(());
        };
        let bound = |domain: &Arc<DomainInner>| {
            let state = lock(&domain.state);
            state.seats.mirrors.iter().find(|s| s.binding == Some(binding)).map(|s| s.sub.clone())
        };
        let new = match target {
            None => None,
            Some(target) => Some(match bound(target) {
                Some(sub) if sub.is_fenced() => {
                    let why = format!("the mirror of {} that it shares is fenced", target.space);
                    return Err(Refused::new(RefusalKind::Device, why));
                }
                Some(sub) => sub,
                None => {
                    let mirror = {
                        let _callback = CallbackScope::enter();
                        host.mirror_for(target.space, id)?
                    };
                    let sub = Sub::new(self, None);
                    let mut seat = MirrorSeat::new(sub.clone(), Interest::MIRROR, mirror);
                    seat.binding = Some(binding);
                    self.check_produced(target, Kinds::MAP | Kinds::UNMAP)?;
                    fits(target, &seat.lens, &member.regions).map_err(|(why, range)| {
                        Refused::new(RefusalKind::Range, format!("{range}: {why}"))
                    })?;
                    let seats = Seats::new(vec![seat], Vec::new(), Vec::new());
                    join(target, seats, None, &member.regions, done)
                        .map_err(|(_, error)| refused_of(error))?;
                    sub
                }
            }),
        };
        let to = target.map_or(Bound::Blocked, |t| Bound::Space(t.space));
        let outcome = {
            let _callback = CallbackScope::enter();
            host.bind(id, to)
        };
        let abandon = |domain: &Arc<DomainInner>, sub: &Arc<Sub>, done: &mut Completion| {
            sub.forsake(id);
            if sub.serves_nobody() {
                let seats = leave_one(domain, sub.id(), done);
                done.let_go(seats);
            }
        };
        let ack = match outcome {
            Ok(ack) => ack,
            Err(refused) => {
                if let (Some(target), Some(new)) = (target, &new) {
                    abandon(target, new, done);
                }
                return Err(refused);
            }
        };
        let old = source.and_then(|source| Some((source, bound(source)?)));
        if let Some(new) = &new {
            new.serve(&member.shared);
        }
        let is_switched = matches!(ack, Ack::Done);
        if let Ack::Pending(waiting) = ack {
            let speaker = new.as_ref().or_else(|| old.as_ref().map(|(_, sub)| sub));
            if let Some(sub) = speaker {
                let spaces = target.into_iter().chain(source).map(|domain| domain.readers.clone());
                done.add_ack(sub, waiting, spaces.collect());
            }
        }
        if let Some((source, old)) = &old {
            abandon(source, old, done);
        }
        if is_switched {
            // Whatever it could not be cut off from.
            control.let_go_of(id);
        }
        Ok(())
    }

    fn tell_moved(&self, control: &mut Control, moved: impl Iterator<Item = (EndpointId, View)>) {
        let _callback = CallbackScope::enter();
        for (id, view) in moved {
            let tell = |seats: &mut Seats| {
                let concerned =
                    |seat: &&mut ObserverSeat| seat.sub.endpoint().is_none_or(|whose| whose == id);
                seats.observers.iter_mut().filter(concerned).for_each(|seat| seat.observer.moved(id, view));
            };
            control.domains.values().chain([&control.identity]).for_each(|d| tell(&mut lock(&d.state).seats));
            control.endpoints.values_mut().for_each(|member| tell(&mut member.parked));
        }
    }
}

fn refused_of(error: ReplayError) -> Refused {
    match error {
        ReplayError::Refused(refused) => refused,
        ReplayError::Fenced(why) => Refused::new(RefusalKind::Device, why),
    }
}

/// L13: the host can only move a set as a whole.
fn check_sets(
    control: &Control,
    movers: &[(EndpointId, View, View, Option<View>)],
) -> Result<(), AttachErrorKind> {
    let after: BTreeMap<EndpointId, View> = movers.iter().map(|m| (m.0, m.2)).collect();
    for (id, _, to, _) in movers {
        let Some(set) = control.endpoints.get(id).and_then(|m| m.set) else { continue };
        for (other, member) in control.endpoints.iter().filter(|(_, m)| m.set == Some(set)) {
            let view = after.get(other).copied().unwrap_or_else(|| control.view_of(member));
            if view != *to {
                return Err(AttachErrorKind::SplitsSet { endpoint: *id, with: *other });
            }
        }
    }
    Ok(())
}

fn check_regions(target: &DomainInner, id: EndpointId, regions: &[Region]) -> Result<(), AttachErrorKind> {
    let state = lock(&target.state);
    for region in regions {
        if let Some(m) = state.writer.next(region.range.start()).filter(|m| m.range.overlaps(region.range)) {
            return Err(AttachErrorKind::Reserved { endpoint: id, region: region.range, mapping: m.range });
        }
    }
    Ok(())
}

/// Looks at those who listen where `id` is now.
fn look_at<R>(
    control: &Control,
    source: Option<&Arc<DomainInner>>,
    id: EndpointId,
    look: impl FnOnce(&Seats) -> R,
) -> R {
    match (source, control.endpoints.get(&id)) {
        (Some(source), _) => look(&lock(&source.state).seats),
        (None, Some(member)) => look(&member.parked),
        (None, None) => look(&Seats::default()),
    }
}

fn put_seats(control: &mut Control, source: Option<&Arc<DomainInner>>, id: EndpointId, seats: Seats) {
    match source {
        Some(source) => lock(&source.state).seats.append(seats),
        None => {
            if let Some(member) = control.endpoints.get_mut(&id) {
                member.parked.append(seats);
            }
        }
    }
}
