//! The end of a unit: nobody has a handle any more.

use core::ops::Deref;

use crate::iommu::seating::dismiss;
use crate::iommu::unit::Unit;
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::{StepScope, after_the_step, in_step};
use crate::sync::{Arc, lock};

/// The unit as its handles have it. Endpoints, address spaces and whoever listens there refer to each other, so the unit
/// takes them apart when the last handle goes.
pub(crate) struct Owned(pub(crate) Arc<Unit>);

impl Deref for Owned {
    type Target = Unit;

    fn deref(&self) -> &Unit {
        &self.0
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if in_step() {
            // This thread may hold the locks that it takes.
            let unit = self.0.clone();
            after_the_step(move || unit.end());
        } else {
            self.0.end();
        }
    }
}

impl Unit {
    fn end(&self) {
        // With a record that cannot be trusted there is nothing to be done, and the panic has been loud.
        if !self.is_poisoned() {
            // What a subscriber still has to acknowledge is awaited by nobody, as where a subscription is dropped.
            drop(self.dissolve());
        }
    }

    fn is_poisoned(&self) -> bool {
        let Ok(control) = self.control.lock() else { return true };
        control.spaces().any(|domain| domain.state.lock().is_err())
    }

    /// Takes off whoever is left. No device keeps its reach through them: a mirror is emptied, or else fenced.
    fn dissolve(&self) -> Completion {
        let mut done = Completion::ready();
        let Ok(_scope) = StepScope::enter() else { return done };
        let bound: Vec<_> = {
            let control = lock(&self.control);
            control.endpoints.iter().filter(|(_, m)| m.binding.is_some()).map(|(id, _)| *id).collect()
        };
        for id in bound {
            if let Ok(completion) = self.remove_endpoint(id) {
                done.merge(completion);
            }
        }
        let mut control = lock(&self.control);
        for domain in control.spaces() {
            let mut state = lock(&domain.state);
            let mut seats = core::mem::take(&mut state.seats);
            dismiss(domain, &mut state, &mut seats, &mut done);
            drop(state);
            self.settle_wanted(domain);
            done.let_go(seats);
        }
        for member in control.endpoints.values_mut() {
            done.let_go(core::mem::take(&mut member.parked));
        }
        done
    }
}
