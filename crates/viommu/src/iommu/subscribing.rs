//! Subscriptions: made, looked at, ended.

use core::fmt;

use crate::addr::{Iova, IovaRange};
use crate::deliver::{CacheSeat, Counts, MirrorSeat, ObserverSeat, Seats, Sub};
use crate::domain::Domain;
use crate::domain::inner::DomainInner;
use crate::endpoint::{EndpointId, EndpointShared, Region, Sight};
use crate::error::{Cap, Incident, StepError, StepErrorKind, SubscribeError};
use crate::iommu::seating::{ReplayError, fits, join, leave_one};
use crate::iommu::unit::{Control, Home, Unit};
use crate::iommu::{Endpoint, Iommu};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::{CallbackScope, StepScope, after_the_step, in_callback};
use crate::reader::{Fault, Reader};
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

pub(super) fn check_reach(reach: &Reach) -> Result<(), SubscribeError> {
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
    pub(super) iommu: Iommu,
    pub(super) sub: Arc<Sub>,
    pub(super) interest: Interest,
    pub(super) cache: Option<Arc<CacheSeat>>,
    /// What the replay still has under way.
    pub(super) filling: Completion,
    pub(super) open: bool,
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
                cache.invalidate(range, &domain.readers, &mut done);
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
        let sub = Sub::new(&self.unit, endpoint);
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
    pub(super) fn unseat(&self, id: u64) -> Completion {
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
        done.let_go(seats);
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
pub(super) type Place = (Option<Arc<DomainInner>>, Option<Arc<EndpointShared>>, Arc<[Region]>);

pub(super) fn place(control: &Control, home: Home) -> Result<Place, SubscribeError> {
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

pub(super) fn domain_of(control: &Control, home: Home) -> Option<Arc<DomainInner>> {
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
