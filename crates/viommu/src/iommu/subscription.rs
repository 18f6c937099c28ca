//! A subscription in its subscriber's hand: looked at, filled, audited, ended.

use core::ops::ControlFlow;

use super::subscribing::{FillError, Subscription, check_reach, domain_of, place};
use crate::addr::{Iova, IovaRange};
use crate::audit::{Audit, compare};
use crate::deliver::{Counts, Seats, backed};
use crate::domain::inner::{DomainInner, DomainState};
use crate::error::SubscribeError;
use crate::iommu::seating::{ReplayError, empty, fits, join, leave_one, replay};
use crate::iommu::unit::Home;
use crate::mapping::{Access, Mapping};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::{CallbackScope, StepScope, after_the_step, in_callback};
use crate::reader::{Fault, FaultReason};
use crate::subscribe::{Interest, Reach};
use crate::sync::lock;

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
    ///
    /// One that could not be fenced is fenced once more before it goes. If that fails too, what it may hold is in use for
    /// good.
    pub fn leave(mut self) -> Completion {
        self.close()
    }

    fn close(&mut self) -> Completion {
        if !core::mem::take(&mut self.open) {
            return Completion::ready();
        }
        let (unit, id) = (self.iommu.unit.clone(), self.sub.id());
        if in_callback() {
            after_the_step(move || {
                let _scope = StepScope::enter();
                drop(unit.unseat(id));
            });
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
                            backed(&state.memory, &m, &mut |piece| lens.extents(piece, &mut due));
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
                    backed(&state.memory, m, &mut |piece| {
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
            seat.ok_or(SubscribeError::Invalid("not a mirror"))?.set_reach(reach);
            return Ok(done);
        };
        // Emptied with the old reach, filled with the new one: the simple way, for a rare event.
        let mut seats = leave_one(&domain, self.id(), &mut done);
        let [seat] = seats.mirrors.as_mut_slice() else {
            lock(&domain.state).seats.append(seats);
            return Err(SubscribeError::Invalid("not a mirror"));
        };
        seat.set_reach(reach);
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
            lock(&domain.state).seats.append(*seats);
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
            cache.invalidate(IovaRange::ALL, &domain.readers, &mut done);
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
