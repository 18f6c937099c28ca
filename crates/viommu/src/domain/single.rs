//! Steps of one mapping, as nearly all are, where every mirror that hears of it is told just that: looked up once, and
//! with nothing to put together. All other steps, and what goes wrong here, are `apply`'s.

use crate::addr::IovaRange;
use crate::deliver::mirror::Way;
use crate::domain::apply::Plan;
use crate::domain::inner::{DomainInner, DomainState};
use crate::error::StepErrorKind;
use crate::mapping::{Mapping, Target};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::CallbackScope;
use crate::subscribe::{RefusalKind, Refused};
use crate::table::PAGE;

impl DomainState {
    /// Whether `m`, whole, is what a mirror holds of it that has nothing to clip.
    #[inline(always)]
    fn is_of_one_piece(&self, m: &Mapping) -> bool {
        m.target == Target::Ram && !m.access.is_empty() && self.memory.is_ram_behind(m)
    }
}

impl DomainInner {
    /// Adds one mapping, and tells everyone.
    #[inline]
    pub(crate) fn add_one(
        &self,
        state: &mut DomainState,
        new: &Mapping,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        let is_simple = state.refusable
            && state.is_of_one_piece(new)
            && state.seats.mirrors.iter().all(|seat| seat.can_take_as_it_is(new));
        let vacancy = if is_simple { state.writer.vacancy(new.range) } else { None };
        let Some(vacancy) = vacancy else { return self.add_some(state, new, done) };
        self.claim(state, 1)?;
        let mut is_to_end = false;
        {
            let _callback = CallbackScope::enter();
            for (at, seat) in state.seats.mirrors.iter_mut().enumerate() {
                let outcome = match seat.way() {
                    Way::Direct => seat.map_one(new, done),
                    Way::InStep => {
                        is_to_end = true;
                        seat.map_in_step(new, done)
                    }
                    Way::Long => continue, // it hears nothing of this
                };
                if let Err(refused) = outcome {
                    if refused.kind == RefusalKind::Lost {
                        self.fence_seat(seat, &format!("{} is lost: {refused}", new.range), done);
                        continue;
                    }
                    return Err(self.take_back(state, new, at, *refused, done));
                }
            }
        }
        self.publish(|| state.writer.fill_vacancy(vacancy, new));
        if is_to_end {
            state.commit(done);
        }
        self.tell_observers(state, &[], core::slice::from_ref(new));
        Ok(())
    }

    #[inline(never)]
    fn add_some(
        &self,
        state: &mut DomainState,
        new: &Mapping,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        if state.writer.is_taken_in(new.range) {
            return Err(state.overlap(new));
        }
        self.apply(state, &Plan { added: core::slice::from_ref(new), ..Plan::default() }, true, done)
    }

    /// The mirror at `at` has refused what those before it have got.
    #[cold]
    fn take_back(
        &self,
        state: &mut DomainState,
        new: &Mapping,
        at: usize,
        refused: Refused,
        done: &mut Completion,
    ) -> StepErrorKind {
        let added = core::slice::from_ref(new);
        self.totals.give_back(1);
        self.undo(state, &Plan { added, ..Plan::default() }, added, (at, 0), done);
        state.commit(done);
        let subscription = state.seats.mirrors.get(at).map_or(0, |seat| seat.sub.id());
        StepErrorKind::Refused { subscription, refused }
    }

    /// Removes what is mapped in one page, and tells everyone.
    #[inline]
    pub(crate) fn remove_one(
        &self,
        state: &mut DomainState,
        page: IovaRange,
        lazy: bool,
        done: &mut Completion,
    ) -> Result<usize, StepErrorKind> {
        debug_assert_eq!(page.bytes(), PAGE.into());
        let gone = match self.publish(|| state.writer.remove_page(page)) {
            Ok(Some(gone)) => gone,
            Ok(None) => return Ok(0),
            Err(_) => return Err(state.cut(page)),
        };
        self.totals.give_back(1);
        if state.is_of_one_piece(&gone) {
            if !state.seats.caches.is_empty() {
                self.tell_caches(state, &[page], done);
            }
            let DomainState { seats, dirty, .. } = state;
            let pieces = [gone];
            let _callback = CallbackScope::enter();
            for seat in &mut seats.mirrors {
                let outcome = if seat.way() == Way::Direct {
                    seat.unmap_one(page, &pieces, done, dirty)
                } else if seat.hears_in(page) {
                    seat.remove_in_step(&pieces, done, dirty)
                } else {
                    continue;
                };
                if let Err(failure) = outcome {
                    self.fence_seat(seat, &failure, done);
                }
            }
        } else {
            let plan = Plan { removed: &[gone], spans: &[page], ..Plan::default() };
            self.deliver_removals(state, &plan, done);
            state.commit(done);
        }
        self.note_removal(&mut state.gone, &[page], lazy, done);
        self.tell_observers(state, &[gone], &[]);
        Ok(1)
    }
}
