//! Subscriptions: made, looked at, ended.

use core::fmt;
use core::ops::ControlFlow;

use crate::addr::{Iova, IovaRange};
use crate::audit::{Audit, compare};
use crate::deliver::{CacheSeat, Counts, MirrorSeat, ObserverSeat, Seats, Sub, backed};
use crate::domain::Domain;
use crate::domain::inner::{DomainInner, DomainState};
use crate::endpoint::{EndpointId, EndpointShared, Region, Sight};
use crate::error::{Cap, Incident, StepError, StepErrorKind, SubscribeError};
use crate::iommu::seating::{ReplayError, empty, fits, join, leave_one, replay};
use crate::iommu::unit::{Control, Home, Unit};
use crate::iommu::{Endpoint, Iommu};
use crate::mapping::{Access, Mapping};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::{CallbackScope, StepScope, after_the_step, in_callback};
use crate::reader::{Fault, FaultReason, Reader};
use crate::subscribe::{Binding, Cache, Interest, Kinds, Mirror, Observer, Reach, Space};
use crate::sync::{Arc, lock};
use crate::table::PAGE;

/// Whoever can be subscribed.
enum Subscriber {
    Mirror(Box<dyn Mirror>),
    Cache(Box<dyn Cache>),
    Observer(Box<dyn Observer>),
}

impl Subscriber {
    fn check(&self, interest: Interest) -> Result<(), SubscribeError> {
        let kinds = interest.kinds;
        if kinds.is_empty() {
            return Err(SubscribeError::Nothing);
        }
        let fits = match self {
            Self::Mirror(_) => kinds == Kinds::MAP | Kinds::UNMAP,
            Self::Cache(_) => !kinds.contains(Kinds::MAP),
            Self::Observer(_) => !kinds.contains(Kinds::DEVICE_TLB),
        };
        if !fits {
            return Err(SubscribeError::WrongKinds(kinds));
        }
        let shifted = |iova: Iova| iova.0.wrapping_add(interest.offset);
        // With an offset, the window must stay one range. [0, 2^64-1] has no offset but 0 that does that.
        if shifted(interest.window.start()) > shifted(interest.window.last()) {
            return Err(SubscribeError::Invalid("the window wraps with its offset"));
        }
        if let Self::Mirror(mirror) = self {
            if !interest.window.is_aligned(PAGE) || interest.offset & (PAGE - 1) != 0 {
                return Err(SubscribeError::Invalid(
                    "a mirror's window and offset must be made of 4 KiB pages",
                ));
            }
            let _callback = CallbackScope::enter();
            check_reach(&mirror.reach())?;
        }
        Ok(())
    }
}

fn check_reach(reach: &Reach) -> Result<(), SubscribeError> {
    let ordered = reach.apertures.windows(2).all(|pair| match pair {
        [a, b] => a.last() < b.start(),
        _ => true,
    });
    if !ordered {
        return Err(SubscribeError::Invalid("apertures must ascend and be disjoint"));
    }
    if reach.page_sizes == 0 {
        return Err(SubscribeError::Invalid("a reach without page sizes"));
    }
    Ok(())
}

/// One subscriber's place. Dropping it takes away what a mirror holds, as far as that can be done, and fences it
/// otherwise; [`Subscription::leave`] does the same and says when it is over.
#[must_use = "dropping a subscription ends it"]
pub struct Subscription {
    iommu: Iommu,
    sub: Arc<Sub>,
    interest: Interest,
    cache: Option<Arc<CacheSeat>>,
    /// What the replay still has under way.
    filling: Completion,
    open: bool,
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("id", &self.id())
            .field("interest", &self.interest)
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Subscribes a mirror that follows this endpoint: it holds what the endpoint sees. It is filled before this
    /// returns, slice by slice; on a fenced endpoint whose device has been reset, it is the way back.
    ///
    /// Inside a callback the subscription is accepted and made after the step; if it is refused then, the embedder's
    /// alarm hears of it.
    ///
    /// # Errors
    /// See [`SubscribeError`]: nothing of it is left.
    pub fn subscribe_mirror(
        &self,
        mirror: Box<dyn Mirror>,
        interest: Interest,
    ) -> Result<Subscription, SubscribeError> {
        self.iommu.subscribe(Home::Endpoint(self.id), Subscriber::Mirror(mirror), interest)
    }

    /// Subscribes a cache that follows this endpoint.
    ///
    /// # Errors
    /// As [`Endpoint::subscribe_mirror`].
    pub fn subscribe_cache(
        &self,
        cache: Box<dyn Cache>,
        interest: Interest,
    ) -> Result<Subscription, SubscribeError> {
        self.iommu.subscribe(Home::Endpoint(self.id), Subscriber::Cache(cache), interest)
    }

    /// Subscribes an observer that follows this endpoint.
    ///
    /// # Errors
    /// As [`Endpoint::subscribe_mirror`].
    pub fn subscribe_observer(
        &self,
        observer: Box<dyn Observer>,
        interest: Interest,
    ) -> Result<Subscription, SubscribeError> {
        self.iommu.subscribe(Home::Endpoint(self.id), Subscriber::Observer(observer), interest)
    }

    /// Tells this endpoint's device TLBs (caches that asked for [`Kinds::DEVICE_TLB`]) to drop what they hold inside
    /// `range`: the guest's explicit invalidation (PCI ATS). A PASID's device TLB is that of its own endpoint.
    ///
    /// # Errors
    /// [`StepErrorKind::InCallback`]; [`StepErrorKind::Gone`] when the endpoint sees no address space.
    pub fn invalidate_device_tlb(&self, range: IovaRange) -> Result<Completion, StepError> {
        let _scope = StepScope::enter().map_err(|_| StepErrorKind::InCallback)?;
        let control = lock(&self.iommu.unit.control);
        let view = control.endpoints.get(&self.id).map(|m| control.view_of(m));
        let Some(domain) = view.and_then(|view| control.space_of(view).ok().flatten()) else {
            return Ok(Completion::ready());
        };
        let mut done = Completion::ready();
        let state = lock(&domain.state);
        let _callback = CallbackScope::enter();
        let mine = |cache: &&Arc<CacheSeat>| cache.sub.endpoint() == Some(self.id);
        for cache in state.seats.caches.iter().filter(mine) {
            if cache.interest.kinds.contains(Kinds::DEVICE_TLB) {
                cache.invalidate(range, &mut done);
            }
        }
        drop(state);
        done.add_removal(&domain.readers, Some(self.id.key()), &[range]);
        Ok(done)
    }

    /// Says that the host switches this endpoint with `binding` from now on. It must see nothing yet, or what it sees is
    /// bound at once. A fenced endpoint that has been detached from what was fenced, and whose device has been reset, is
    /// bound again: its way back.
    ///
    /// # Errors
    /// [`SubscribeError::Gone`], or what the binding refused.
    pub fn bind_with(&self, binding: &BindingHandle) -> Result<Completion, SubscribeError> {
        let _scope = StepScope::enter().map_err(|_| SubscribeError::Invalid("inside a callback"))?;
        let mut control = lock(&self.iommu.unit.control);
        self.iommu.unit.bind(&mut control, self.id, binding.0)
    }
}

/// A host's way to switch endpoints, shared by those that it serves.
#[derive(Clone, Debug)]
pub struct BindingHandle(u64);

impl Iommu {
    /// Makes a binding known, for [`Endpoint::bind_with`].
    #[must_use]
    pub fn add_binding(&self, binding: Box<dyn Binding>) -> BindingHandle {
        let id = self.unit.next_id();
        lock(&self.unit.control).bindings.insert(id, binding);
        BindingHandle(id)
    }

    /// Subscribes a mirror to an address space itself, whoever sees it.
    ///
    /// # Errors
    /// See [`SubscribeError`]: nothing of it is left.
    pub fn subscribe_mirror(
        &self,
        space: Space,
        mirror: Box<dyn Mirror>,
        interest: Interest,
    ) -> Result<Subscription, SubscribeError> {
        self.subscribe(Home::Space(space), Subscriber::Mirror(mirror), interest)
    }

    /// Subscribes a cache to an address space itself.
    ///
    /// # Errors
    /// See [`SubscribeError`]: nothing of it is left.
    pub fn subscribe_cache(
        &self,
        space: Space,
        cache: Box<dyn Cache>,
        interest: Interest,
    ) -> Result<Subscription, SubscribeError> {
        self.subscribe(Home::Space(space), Subscriber::Cache(cache), interest)
    }

    /// Subscribes an observer to an address space itself.
    ///
    /// # Errors
    /// See [`SubscribeError`]: nothing of it is left.
    pub fn subscribe_observer(
        &self,
        space: Space,
        observer: Box<dyn Observer>,
        interest: Interest,
    ) -> Result<Subscription, SubscribeError> {
        self.subscribe(Home::Space(space), Subscriber::Observer(observer), interest)
    }

    fn subscribe(
        &self,
        home: Home,
        subscriber: Subscriber,
        interest: Interest,
    ) -> Result<Subscription, SubscribeError> {
        subscriber.check(interest)?;
        let endpoint = match home {
            Home::Endpoint(id) => Some(id),
            Home::Space(_) => None,
        };
        let sub = Sub::new(self.unit.next_id(), endpoint, Vec::new(), self.unit.this.clone());
        let mut subscription = Subscription {
            iommu: self.clone(),
            sub: sub.clone(),
            interest,
            cache: None,
            filling: Completion::ready(),
            open: true,
        };
        if in_callback() {
            // Only what has no answer to give can wait: a cache is asked for its fills through its subscription.
            let unit = self.unit.clone();
            if matches!(subscriber, Subscriber::Cache(_)) {
                subscription.open = false;
                return Err(SubscribeError::Invalid("a cache cannot be subscribed inside a callback"));
            }
            after_the_step(move || {
                let _scope = StepScope::enter();
                let mut filling = Completion::ready();
                if let Err(why) = unit.seat(home, &sub, subscriber, interest, &mut filling) {
                    unit.totals.alarm(&Incident::SubscriptionRefused { subscription: sub.id(), why });
                }
            });
            return Ok(subscription);
        }
        let _scope = StepScope::enter();
        let mut filling = Completion::ready();
        match self.unit.seat(home, &sub, subscriber, interest, &mut filling) {
            Ok(cache) => {
                subscription.cache = cache;
                subscription.filling = filling;
            }
            Err(error) => {
                subscription.open = false;
                return Err(error);
            }
        }
        Ok(subscription)
    }
}

impl Unit {
    /// Gives a subscriber its place, and fills it if it is a mirror.
    fn seat(
        &self,
        home: Home,
        sub: &Arc<Sub>,
        subscriber: Subscriber,
        interest: Interest,
        done: &mut Completion,
    ) -> Result<Option<Arc<CacheSeat>>, SubscribeError> {
        let mut control = lock(&self.control);
        let outcome = self.seat_unsettled(&mut control, home, sub, subscriber, interest, done);
        if let Some(domain) = domain_of(&control, home).filter(|_| outcome.is_err()) {
            self.settle_wanted(&domain);
        }
        outcome
    }

    fn seat_unsettled(
        &self,
        control: &mut Control,
        home: Home,
        sub: &Arc<Sub>,
        subscriber: Subscriber,
        interest: Interest,
        done: &mut Completion,
    ) -> Result<Option<Arc<CacheSeat>>, SubscribeError> {
        if control.homes.len() >= self.config.subscriptions {
            return Err(SubscribeError::Cap(Cap::Subscriptions));
        }
        let (domain, shared, regions) = place(control, home)?;
        if let Some(domain) = &domain {
            let space = domain.space;
            self.check_produced(domain, interest.kinds).map_err(|why| SubscribeError::NotProduced {
                space,
                kinds: interest.kinds,
                why,
            })?;
        }
        let mut seats = Seats::default();
        let mut cache_seat = None;
        let holds = !matches!(subscriber, Subscriber::Observer(_));
        match subscriber {
            Subscriber::Mirror(mirror) => {
                let seat = MirrorSeat::new(sub.clone(), interest, mirror);
                if let Some(domain) = &domain {
                    fits(domain, &seat.lens, &regions)
                        .map_err(|(why, range)| SubscribeError::Unreachable { why, range })?;
                }
                seats.mirrors.push(seat);
            }
            Subscriber::Cache(cache) => {
                let own = shared
                    .is_none()
                    .then(|| EndpointShared::new(None, control.sight(None, &regions, None, domain.clone())));
                let label = format!("cache {}", sub.id());
                let Some(sees) = shared.as_ref().or(own.as_ref()) else { return Err(SubscribeError::Gone) };
                let reader = Reader::new(sees, &label);
                let seat = CacheSeat::new(sub.clone(), interest, own, cache, reader);
                cache_seat = Some(seat.clone());
                seats.caches.push(seat);
            }
            Subscriber::Observer(observer) => {
                let counts = Counts::default();
                seats.observers.push(ObserverSeat { sub: sub.clone(), interest, observer, counts });
            }
        }
        let set = sub.endpoint().and_then(|id| control.endpoints.get(&id)).and_then(|member| member.set);
        let together = control
            .endpoints
            .iter()
            .filter(|(id, m)| Some(**id) == sub.endpoint() || (set.is_some() && m.set == set));
        together.for_each(|(_, member)| sub.serve(&member.shared));
        match (&domain, home) {
            (Some(domain), _) => {
                let endpoint = sub.endpoint();
                if let Err((_, error)) = join(domain, seats, endpoint, &regions, done) {
                    return Err(match error {
                        ReplayError::Refused(refused) => SubscribeError::Refused(refused),
                        ReplayError::Fenced(why) => SubscribeError::Fenced(why),
                    });
                }
            }
            (None, Home::Endpoint(id)) => {
                if let Some(member) = control.endpoints.get_mut(&id) {
                    member.parked.append(seats);
                }
            }
            (None, Home::Space(_)) => return Err(SubscribeError::Gone),
        }
        control.homes.insert(sub.id(), home);
        if let (true, Home::Endpoint(id)) = (holds, home) {
            unfence(control, id);
        }
        Ok(cache_seat)
    }

    /// Ends a subscription.
    fn unseat(&self, id: u64) -> Completion {
        let mut control = lock(&self.control);
        let mut done = Completion::ready();
        let Some(home) = control.homes.remove(&id) else { return done };
        let mut seats = Seats::default();
        let domain = domain_of(&control, home);
        if let Some(domain) = &domain {
            seats = leave_one(domain, id, &mut done);
            self.settle_wanted(domain);
        } else if let Home::Endpoint(endpoint) = home
            && let Some(member) = control.endpoints.get_mut(&endpoint)
        {
            seats = member.parked.take(id);
        }
        drop(control);
        done.let_go(core::mem::take(&mut seats.mirrors));
        let _callback = CallbackScope::enter();
        drop(seats);
        done
    }

    /// Lets `binding` switch an endpoint from now on.
    fn bind(
        &self,
        control: &mut Control,
        id: EndpointId,
        binding: u64,
    ) -> Result<Completion, SubscribeError> {
        let Some(member) = control.endpoints.get_mut(&id) else { return Err(SubscribeError::Gone) };
        let before = member.binding;
        match before {
            Some(other) if other != binding => {
                return Err(SubscribeError::Invalid("another binding switches the endpoint"));
            }
            Some(_) if !member.shared.sight().1.fenced => return Ok(Completion::ready()),
            _ => member.binding = Some(binding),
        }
        let view =
            control.endpoints.get(&id).map(|m| control.view_of(m)).unwrap_or(crate::endpoint::View::Blocked);
        let target = control.space_of(view).map_err(|_| SubscribeError::Gone)?;
        let mut done = Completion::ready();
        let outcome = self.rebind(control, binding, id, None, target.as_ref(), &mut done);
        if let Some(target) = &target {
            self.settle_wanted(target);
        }
        if let Err(refused) = outcome {
            if let Some(member) = control.endpoints.get_mut(&id) {
                member.binding = before;
            }
            return Err(SubscribeError::Refused(refused));
        }
        unfence(control, id);
        Ok(done)
    }
}

/// The address space, the endpoint and the regions of a place to sit.
type Place = (Option<Arc<DomainInner>>, Option<Arc<EndpointShared>>, Arc<[Region]>);

fn place(control: &Control, home: Home) -> Result<Place, SubscribeError> {
    match home {
        Home::Endpoint(id) => {
            let member = control.endpoints.get(&id).ok_or(SubscribeError::Gone)?;
            let domain = control.space_of(control.view_of(member)).map_err(|_| SubscribeError::Gone)?;
            Ok((domain, Some(member.shared.clone()), member.regions.clone()))
        }
        Home::Space(space) => {
            let domain = control.domain_at(space).ok_or(SubscribeError::Gone)?;
            Ok((Some(domain.clone()), None, Arc::from([])))
        }
    }
}

fn domain_of(control: &Control, home: Home) -> Option<Arc<DomainInner>> {
    place(control, home).ok().and_then(|(domain, ..)| domain)
}

/// Gives a fenced endpoint its view back, once nothing that was fenced hangs on it any more.
fn unfence(control: &Control, id: EndpointId) {
    let Some(member) = control.endpoints.get(&id) else { return };
    if !member.shared.sight().1.fenced {
        return;
    }
    let domain = domain_of(control, Home::Endpoint(id));
    let fenced = |seats: &Seats| {
        let mirrors = seats.mirrors.iter().map(|s| &s.sub);
        let caches = seats.caches.iter().map(|s| &s.sub);
        mirrors.chain(caches).any(|sub| (sub.endpoint() == Some(id) || sub.serves(id)) && sub.is_fenced())
    };
    let still = domain.as_ref().map_or_else(|| fenced(&member.parked), |d| fenced(&lock(&d.state).seats));
    if !still {
        member.shared.publish(|sight| Sight { fenced: false, domain, ..sight.copy() });
    }
}

impl Subscription {
    /// Its number, unique in the unit.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.sub.id()
    }

    /// What it asked for.
    #[must_use]
    pub fn interest(&self) -> Interest {
        self.interest
    }

    /// What filling the mirror at subscribe still has under way, once: its acks. Resolves when the mirror is complete; an
    /// ack that fails has it fenced. Ready for a mirror that acknowledges at once, and for everybody else.
    pub fn filled(&mut self) -> Completion {
        core::mem::replace(&mut self.filling, Completion::ready())
    }

    /// Whether it has been cut off.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.sub.is_fenced()
    }

    /// Ends it: a mirror is emptied, a cache told to drop everything. Resolves when the subscriber has acknowledged.
    /// Waits for a running callback of another thread; inside a callback it takes effect after the step.
    pub fn leave(mut self) -> Completion {
        self.close()
    }

    fn close(&mut self) -> Completion {
        if !core::mem::take(&mut self.open) {
            return Completion::ready();
        }
        let (unit, id) = (self.iommu.unit.clone(), self.sub.id());
        if in_callback() {
            after_the_step(move || drop(unit.unseat(id)));
            return Completion::ready();
        }
        let _scope = StepScope::enter();
        unit.unseat(id)
    }

    /// Translates an address of the peer's and installs the answer in the cache, as one act against every step: a
    /// later removal finds it. The entry is the extent around the address as far as one lookup tells, with its true
    /// permission, in the peer's addresses.
    ///
    /// # Errors
    /// Nothing is installed: the fault, if there is nothing to install for such an access; it is for the caller to log
    /// or report. [`FillError::InCallback`], [`FillError::NotACache`].
    pub fn fill(&self, iova: Iova, access: Access) -> Result<Mapping, FillError> {
        let _scope = StepScope::enter().map_err(|_| FillError::InCallback)?;
        let cache = self.cache.as_ref().ok_or(FillError::NotACache)?;
        if self.sub.is_fenced() {
            let (endpoint, reason) = (self.sub.endpoint(), FaultReason::Fenced);
            return Err(FillError::Fault(Fault { endpoint, iova, access, reason }));
        }
        cache.fill(iova, access).map_err(FillError::Fault)
    }

    /// Calls that it has had, and what it holds.
    #[must_use]
    pub fn counts(&self) -> Counts {
        if let Some(cache) = &self.cache {
            return cache.counts();
        }
        self.look(|_, seats, _| {
            let id = self.id();
            let mirror = seats.mirrors.iter().find(|s| s.sub.id() == id).map(|s| s.counts);
            mirror.or_else(|| seats.observers.iter().find(|s| s.sub.id() == id).map(|s| s.counts))
        })
        .flatten()
        .unwrap_or_default()
    }

    fn look<R>(&self, f: impl FnOnce(Option<&DomainInner>, &Seats, Option<&DomainState>) -> R) -> Option<R> {
        let control = lock(&self.iommu.unit.control);
        let home = *control.homes.get(&self.id())?;
        match (domain_of(&control, home), home) {
            (Some(domain), _) => {
                let state = lock(&domain.state);
                Some(f(Some(&domain), &state.seats, Some(&state)))
            }
            (None, Home::Endpoint(id)) => Some(f(None, &control.endpoints.get(&id)?.parked, None)),
            (None, Home::Space(_)) => None,
        }
    }

    /// Compares what the subscriber says it holds with record and backing. A mirror must hold exactly what its lens
    /// shows of them, a cache nothing that they do not say. `None` when it does not tell what it holds, is fenced, or
    /// is gone. Takes the domain's lock.
    #[must_use]
    pub fn audit(&self) -> Option<Audit> {
        if self.is_fenced() {
            return None;
        }
        self.look(|domain, seats, state| {
            let id = self.id();
            if let Some(seat) = seats.mirrors.iter().find(|s| s.sub.id() == id) {
                let mut due = Vec::new();
                if let Some(state) = state {
                    state.writer.for_each(IovaRange::ALL, &mut |m| {
                        if seat.cursor().is_none_or(|cursor| m.range.start() < cursor) {
                            let lens = &seat.lens;
                            backed(&state.backing, &m, &mut |piece| lens.extents(piece, &mut due));
                        }
                        ControlFlow::Continue(())
                    });
                }
                return Some(compare(due, seat.held(), true));
            }
            let cache = seats.caches.iter().find(|s| s.sub.id() == id)?;
            let held = cache.held()?;
            let mut due = Vec::new();
            if let Some(state) = state {
                let mut due_of = |m: &Mapping| {
                    backed(&state.backing, m, &mut |piece| {
                        let inside = piece.clip(self.interest.window);
                        due.extend(inside.map(|m| Mapping { range: self.interest.outward(m.range), ..m }));
                    });
                };
                match domain.and_then(|d| d.walker.as_ref()) {
                    // The guest's tables may be newer than what was announced: what they say now counts.
                    Some(walker) => {
                        let starts = held.iter().filter_map(|m| self.interest.inward(m.range));
                        let walked: Vec<_> = starts.filter_map(|range| walker.walk(range.start())).collect();
                        walked.iter().for_each(&mut due_of);
                    }
                    None => state.writer.for_each(self.interest.window, &mut |m| {
                        due_of(&m);
                        ControlFlow::Continue(())
                    }),
                }
            }
            Some(compare(due, held, false))
        })
        .flatten()
    }

    /// Tells the core that the host can do less, or more, than it said. What is mapped and can no longer be held makes
    /// the mirror fenced, or is left out, as the new reach says.
    ///
    /// # Errors
    /// [`SubscribeError::Invalid`], [`SubscribeError::Gone`]: nothing has changed. [`SubscribeError::Fenced`].
    pub fn reach_changed(&self, reach: Reach) -> Result<Completion, SubscribeError> {
        let _scope = StepScope::enter().map_err(|_| SubscribeError::Invalid("inside a callback"))?;
        check_reach(&reach)?;
        let mut control = lock(&self.iommu.unit.control);
        let home = *control.homes.get(&self.id()).ok_or(SubscribeError::Gone)?;
        let (domain, _, regions) = place(&control, home)?;
        let mut done = Completion::ready();
        let Some(domain) = domain else {
            // Blocked: it holds nothing, and is looked at with the new reach when it comes somewhere.
            let members = control.endpoints.values_mut();
            let seat = members.flat_map(|m| &mut m.parked.mirrors).find(|s| s.sub.id() == self.id());
            seat.ok_or(SubscribeError::Invalid("not a mirror"))?.lens.set_reach(reach);
            return Ok(done);
        };
        // Emptied with the old reach, filled with the new one: the simple way, for a rare event.
        let mut seats = leave_one(&domain, self.id(), &mut done);
        let [seat] = seats.mirrors.as_mut_slice() else {
            lock(&domain.state).seats.append(seats);
            return Err(SubscribeError::Invalid("not a mirror"));
        };
        seat.lens.set_reach(reach);
        let refused = fits(&domain, &seat.lens, &regions).err();
        if let Some((why, range)) = refused {
            let why = format!("{range} cannot be held any more: {why}");
            domain.fence_seat(seat, &why, &mut done);
            lock(&domain.state).seats.append(seats);
            return Err(SubscribeError::Fenced(why));
        }
        if let Err((mut seats, error)) = join(&domain, seats, self.sub.endpoint(), &regions, &mut done) {
            let why = format!("{error:?}");
            seats.mirrors.iter_mut().for_each(|seat| domain.fence_seat(seat, &why, &mut done));
            lock(&domain.state).seats.append(seats);
            return Err(SubscribeError::Fenced(why));
        }
        Ok(done)
    }

    /// Takes away all that the mirror holds and delivers it anew, to this one subscriber alone: for a host that lost its
    /// state. For a cache: tells it to drop everything.
    ///
    /// # Errors
    /// [`SubscribeError::Gone`], [`SubscribeError::Refused`] (the mirror is fenced then).
    pub fn replay(&self) -> Result<Completion, SubscribeError> {
        let _scope = StepScope::enter().map_err(|_| SubscribeError::Invalid("inside a callback"))?;
        let control = lock(&self.iommu.unit.control);
        let home = *control.homes.get(&self.id()).ok_or(SubscribeError::Gone)?;
        let mut done = Completion::ready();
        let Some(domain) = domain_of(&control, home) else { return Ok(done) };
        if let Some(cache) = &self.cache {
            let _callback = CallbackScope::enter();
            cache.invalidate(IovaRange::ALL, &mut done);
            return Ok(done);
        }
        {
            let mut state = lock(&domain.state);
            let mut seats = state.seats.take(self.id());
            seats.mirrors.iter_mut().for_each(|seat| empty(&domain, &mut state, seat, &mut done));
            state.seats.append(seats);
        }
        match replay(&domain, self.id(), &mut done) {
            Ok(()) => Ok(done),
            Err(ReplayError::Fenced(why)) => Err(SubscribeError::Fenced(why)),
            Err(ReplayError::Refused(refused)) => {
                let mut state = lock(&domain.state);
                let id = self.id();
                for seat in state.seats.mirrors.iter_mut().filter(|s| s.sub.id() == id) {
                    domain.fence_seat(seat, &refused.to_string(), &mut done);
                }
                Err(SubscribeError::Refused(refused))
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // What its subscriber still has to acknowledge is awaited by nobody: counted if it matters.
        drop(self.close());
    }
}

/// Why a cache was not filled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FillError {
    /// There is nothing to fill it with.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// Called inside a subscriber's callback.
    #[error("a fill inside a subscriber's callback")]
    InCallback,
    /// The subscription is not a cache's.
    #[error("only a cache is filled")]
    NotACache,
}

impl Iommu {
    /// The identity view as an address space: what bypassed endpoints see.
    #[must_use]
    pub fn identity(&self) -> Domain {
        Domain(lock(&self.unit.control).identity.clone())
    }
}
