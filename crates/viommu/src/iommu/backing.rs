//! Backing comes and goes, as steps on every address space (L12).

use core::ops::ControlFlow;

use crate::addr::{GpaRange, Iova, IovaRange};
use crate::backing::{Backing, Extent, Medium, Memory};
use crate::deliver::backed;
use crate::domain::inner::DomainInner;
use crate::domain::plan::Op;
use crate::endpoint::{EndpointShared, Sight};
use crate::error::{StepError, StepErrorKind};
use crate::iommu::Iommu;
use crate::iommu::unit::Control;
use crate::mapping::{Access, Mapping, Target};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::{CallbackScope, StepScope};
use crate::sync::{Arc, lock};
use crate::table::PAGE;

impl Iommu {
    /// Says that there is something at guest physical addresses from now on. Mirrors get what is mapped to it already;
    /// one that cannot hold it is fenced, since no guest can be refused.
    ///
    /// # Errors
    /// [`StepErrorKind::Backing`] when it overlaps, or is not page-aligned; [`StepErrorKind::Cap`]. Nothing has changed.
    pub fn add_backing(&self, extent: Extent) -> Result<Completion, StepError> {
        let _scope = StepScope::enter().map_err(|_| StepErrorKind::InCallback)?;
        let mut control = lock(&self.unit.control);
        let mut backing = (*control.backing).clone();
        let refused = |why| StepErrorKind::Backing { range: extent.range, why };
        if !extent.range.is_aligned(PAGE) {
            return Err(refused("backing must be made of 4 KiB pages").into());
        }
        if !backing.add(extent) {
            return Err(refused("there is backing already").into());
        }
        let mut done = Completion::ready();
        let backing = Arc::new(backing);
        let identity = control.identity.clone();
        // Identity first: only there memory can run out, and then nothing has changed.
        let mapping = identity_of(extent);
        {
            let mut state = lock(&identity.state);
            let before = core::mem::replace(&mut state.memory, Memory::new(backing.clone()));
            if let Err(kind) = identity.run(&mut state, &[Op::Map(mapping)], false, &mut done) {
                state.memory = before;
                return Err(StepError { kind, completion: done });
            }
        }
        for domain in control.domains.values() {
            change_backing(domain, &backing, extent.range, &mut done);
        }
        publish(&mut control, &backing);
        Ok(done)
    }

    /// Says that there is nothing any more at exactly the extent `range`. Mirrors lose what is mapped to it, accesses in
    /// this process fault from now on, and the memory may go when the completion has resolved.
    ///
    /// # Errors
    /// [`StepErrorKind::Backing`] when there is no such extent. Nothing has changed.
    pub fn remove_backing(&self, range: GpaRange) -> Result<Completion, StepError> {
        let _scope = StepScope::enter().map_err(|_| StepErrorKind::InCallback)?;
        let mut control = lock(&self.unit.control);
        let mut backing = (*control.backing).clone();
        let Some(extent) = backing.remove(range) else {
            let why = "there is no backing with these bounds";
            return Err(StepErrorKind::Backing { range, why }.into());
        };
        let mut done = Completion::ready();
        let backing = Arc::new(backing);
        // Readers first: nobody begins to use it any more.
        publish(&mut control, &backing);
        for domain in control.domains.values() {
            change_backing(domain, &backing, range, &mut done);
        }
        let identity = control.identity.clone();
        let mut state = lock(&identity.state);
        let gone = identity.run(&mut state, &[Op::Unmap(identity_of(extent).range)], false, &mut done);
        state.memory = Memory::new(backing);
        {
            // Nobody but the core knows of this, so those that hear no steps are told too.
            let _callback = CallbackScope::enter();
            let deaf = state.seats.caches.iter().filter(|cache| !cache.hears_steps());
            deaf.for_each(|cache| cache.invalidate(identity_of(extent).range, &identity.readers, &mut done));
        }
        drop(state);
        // Whatever was mapped to it may be in use by anybody, also where it has been unmapped since.
        control.retired.retain(|readers| !readers.is_unused(&[IovaRange::ALL]));
        for readers in control.spaces().map(|domain| &domain.readers).chain(&control.retired) {
            done.add_removal(readers, None, &[IovaRange::ALL]);
        }
        match gone {
            Ok(()) => Ok(done),
            Err(kind) => Err(StepError { kind, completion: done }),
        }
    }

    /// What there is, ascending.
    #[must_use]
    pub fn backing(&self) -> Vec<Extent> {
        lock(&self.unit.control).backing.extents().to_vec()
    }
}

fn identity_of(extent: Extent) -> Mapping {
    let range = IovaRange::new(Iova(extent.range.start().0), Iova(extent.range.last().0));
    let target = if extent.medium == Medium::Mmio { Target::Mmio } else { Target::Ram };
    Mapping { range: range.unwrap_or(IovaRange::ALL), gpa: extent.range.start(), access: Access::RW, target }
}

fn publish(control: &mut Control, backing: &Arc<Backing>) {
    control.backing = backing.clone();
    let publish = |shared: &EndpointShared| {
        shared.publish(|sight| Sight { backing: backing.clone(), ..sight.copy() });
    };
    control.endpoints.values().for_each(|member| publish(&member.shared));
    for domain in control.spaces() {
        let state = lock(&domain.state);
        state.seats.caches.iter().filter_map(|cache| cache.own.as_deref()).for_each(publish);
    }
}

/// Mirrors get or lose what a domain maps to `gpas`; caches are told of it. The record stays as it is.
fn change_backing(domain: &DomainInner, backing: &Arc<Backing>, gpas: GpaRange, done: &mut Completion) {
    let mut state = lock(&domain.state);
    let state = &mut *state;
    let before = core::mem::replace(&mut state.memory, Memory::new(backing.clone()));
    let mut touched = Vec::new();
    state.writer.for_each(IovaRange::ALL, &mut |m| {
        let targets = GpaRange::new(m.gpa, m.gpa_last()).is_some_and(|t| t.overlaps(gpas));
        if targets && !m.access.is_empty() {
            touched.push(m);
        }
        ControlFlow::Continue(())
    });
    let _callback = CallbackScope::enter();
    if domain.walker.is_some() {
        // The record need not tell all that the guest maps there.
        state.seats.caches.iter().for_each(|cache| cache.invalidate(IovaRange::ALL, &domain.readers, done));
    }
    for m in touched {
        state.seats.caches.iter().for_each(|cache| cache.invalidate(m.range, &domain.readers, done));
        let (mut old, mut new) = (Vec::new(), Vec::new());
        backed(&before, &m, &mut |piece| old.push(*piece));
        backed(&state.memory, &m, &mut |piece| new.push(*piece));
        let gone: Vec<_> = old.iter().filter(|p| !new.contains(p)).copied().collect();
        let came: Vec<_> = new.iter().filter(|p| !old.contains(p)).copied().collect();
        for seat in state.seats.mirrors.iter_mut().filter(|seat| seat.is_live()) {
            // Piece by piece: the extents of neighbours stay (I13).
            let outcome = gone
                .iter()
                .try_for_each(|piece| seat.remove(core::slice::from_ref(piece), done, &mut state.dirty))
                .and_then(|()| {
                    seat.check(&came, 0)
                        .map_err(|(why, range)| format!("backing of {range}: {why}").into_boxed_str())?;
                    let added = came.iter().try_for_each(|piece| seat.add(piece, done));
                    added.map_err(|error| format!("backing of {}: {error:?}", m.range).into_boxed_str())
                });
            if let Err(why) = outcome {
                domain.fence_seat(seat, &why, done);
            }
        }
    }
    state.commit(done);
}
