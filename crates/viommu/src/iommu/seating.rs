//! Subscribers come to an address space and leave it: replay, and its opposite.

use core::ops::ControlFlow;

use crate::addr::{Iova, IovaRange};
use crate::deliver::lens::Lens;
use crate::deliver::mirror::{AddError, MirrorSeat};
use crate::deliver::{Seats, backed};
use crate::domain::inner::{DomainInner, DomainState};
use crate::endpoint::{EndpointId, Region};
use crate::mapping::Mapping;
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::CallbackScope;
use crate::subscribe::{Refused, Unreachable};
use crate::sync::{Arc, lock};

/// Mappings delivered under one taking of the domain's lock, so that a replay does not stop the domain.
const SLICE: usize = 512;

/// Why a mirror could not be filled.
#[derive(Clone, Debug)]
pub(crate) enum ReplayError {
    /// It refused; what it had got is taken back.
    Refused(Refused),
    /// It failed to take back what it had got, and has been fenced.
    Fenced(String),
}

fn clip_to(domain: &DomainInner, lens: &Lens, regions: &[Region]) -> Option<Vec<IovaRange>> {
    domain.is_identity().then(|| lens.identity_clip(regions))
}

/// Whether a mirror with this lens could hold all that is mapped in `domain`.
pub(crate) fn fits(
    domain: &DomainInner,
    lens: &Lens,
    regions: &[Region],
) -> Result<(), (Unreachable, IovaRange)> {
    let mut lens = lens.clone();
    lens.set_clip(clip_to(domain, &lens, regions));
    if lens.plain {
        return Ok(());
    }
    let mut extents = Vec::new();
    let mut held = 0_u64;
    let mut at = Some(Iova(0));
    while let Some(range) = at.and_then(|at| IovaRange::new(at, Iova(u64::MAX))) {
        at = None;
        let state = lock(&domain.state);
        let backing = state.backing.clone();
        let mut count = 0_usize;
        state.writer.for_each(range, &mut |m| {
            if count == SLICE {
                at = Some(m.range.start());
                return ControlFlow::Break(());
            }
            count += 1;
            backed(&backing, &m, &mut |piece| lens.extents(piece, &mut extents));
            ControlFlow::Continue(())
        });
        drop(state);
        held = held.saturating_add(extents.len() as u64);
        if !domain.is_identity() {
            let refused = extents.iter().find_map(|e| Some((lens.reach.refuses(e)?, e.range)));
            refused.map_or(Ok(()), Err)?;
        }
        if let Some(last) = extents.last().filter(|_| lens.reach.entries.is_some_and(|max| held > max.into()))
        {
            return Err((Unreachable::Entries, last.range));
        }
        extents.clear();
    }
    Ok(())
}

/// Brings `seats` to `domain`, and fills the mirrors among them. On an error they are given back, empty.
pub(crate) fn join(
    domain: &Arc<DomainInner>,
    mut seats: Seats,
    endpoint: Option<EndpointId>,
    regions: &Arc<[Region]>,
    done: &mut Completion,
) -> Result<(), (Seats, ReplayError)> {
    let mirrors: Vec<u64> = seats.mirrors.iter().map(|seat| seat.sub.id()).collect();
    let everyone: Vec<u64> = (seats.mirrors.iter().map(|s| s.sub.id()))
        .chain(seats.caches.iter().map(|s| s.sub.id()))
        .chain(seats.observers.iter().map(|s| s.sub.id()))
        .collect();
    for seat in &mut seats.mirrors {
        seat.arrive(clip_to(domain, &seat.lens, regions));
    }
    {
        let mut state = lock(&domain.state);
        state.seats.append(seats);
        if let Some(endpoint) = endpoint {
            add_regions(&mut state, endpoint, regions);
        }
    }
    for id in mirrors {
        if let Err(error) = replay(domain, id, done) {
            let mut state = lock(&domain.state);
            if let Some(endpoint) = endpoint {
                state.regions.retain(|(whose, _)| *whose != endpoint);
            }
            let mut back = Seats::default();
            for id in everyone {
                let mut seats = state.seats.take(id);
                seats.mirrors.iter_mut().for_each(|seat| empty(domain, &mut state, seat, done));
                back.append(seats);
            }
            return Err((back, error));
        }
    }
    Ok(())
}

fn add_regions(state: &mut DomainState, endpoint: EndpointId, regions: &Arc<[Region]>) {
    state.regions.retain(|(whose, _)| *whose != endpoint);
    state.regions.extend(regions.iter().map(|region| (endpoint, *region)));
}

/// Delivers to one mirror, slice by slice, what lies ahead of its cursor (L7).
pub(crate) fn replay(domain: &DomainInner, id: u64, done: &mut Completion) -> Result<(), ReplayError> {
    loop {
        let mut state = lock(&domain.state);
        let state = &mut *state;
        let Some(seat) = state.seats.mirrors.iter_mut().find(|seat| seat.sub.id() == id) else {
            return Ok(());
        };
        let Some(cursor) = seat.cursor().filter(|_| seat.is_live()) else { return Ok(()) };
        let Some(ahead) = IovaRange::new(cursor, Iova(u64::MAX)) else { return Ok(()) };
        let _callback = CallbackScope::enter();
        let backing = state.backing.clone();
        let (mut count, mut failed, mut more) = (0_usize, None, false);
        state.writer.for_each(ahead, &mut |m| {
            if count == SLICE {
                more = true;
                return ControlFlow::Break(());
            }
            count += 1;
            seat.advance(m.range.next());
            failed = fill_one(seat, &backing, &m, done).err();
            if failed.is_some() {
                seat.advance(Some(m.range.start()));
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        seat.commit(done);
        match failed {
            None if more => {}
            None => {
                seat.advance(None);
                return Ok(());
            }
            Some(AddError::Refused(refused)) => return Err(ReplayError::Refused(refused)),
            Some(AddError::Fence(failure)) => {
                domain.fence_seat(seat, &failure, done);
                return Err(ReplayError::Fenced(failure));
            }
        }
    }
}

/// One mapping, all of its backed pieces or none.
fn fill_one(
    seat: &mut MirrorSeat,
    backing: &crate::backing::Backing,
    m: &Mapping,
    done: &mut Completion,
) -> Result<(), AddError> {
    let mut count = 0_usize;
    let mut outcome = Ok(());
    backed(backing, m, &mut |piece| {
        if outcome.is_ok() {
            outcome = seat.add(piece, done);
            count += usize::from(outcome.is_ok());
        }
    });
    if outcome.is_err() {
        let mut undone = Ok(());
        backed(backing, m, &mut |piece| {
            if count > 0 && undone.is_ok() {
                count -= 1;
                undone = seat.remove(core::slice::from_ref(piece), done, &mut None).map_err(AddError::Fence);
            }
        });
        undone?;
    }
    outcome
}

/// Takes away from a mirror all that it holds of `domain`; fences it if that fails.
pub(crate) fn empty(
    domain: &DomainInner,
    state: &mut DomainState,
    seat: &mut MirrorSeat,
    done: &mut Completion,
) {
    if !seat.is_live() {
        return;
    }
    let _callback = CallbackScope::enter();
    let mut pieces = Vec::new();
    let backing = state.backing.clone();
    state.writer.for_each(IovaRange::ALL, &mut |m| {
        backed(&backing, &m, &mut |piece| pieces.push(*piece));
        ControlFlow::Continue(())
    });
    if let Err(failure) = seat.remove(&pieces, done, &mut state.dirty) {
        domain.fence_seat(seat, &failure, done);
    }
    seat.commit(done);
    seat.advance(Some(Iova(0)));
}

/// Takes from `domain` all that follows `endpoint`: mirrors are emptied, caches told to drop everything.
pub(crate) fn leave(domain: &DomainInner, endpoint: EndpointId, done: &mut Completion) -> Seats {
    let mut state = lock(&domain.state);
    let mut seats = state.seats.take_of(endpoint);
    state.regions.retain(|(whose, _)| *whose != endpoint);
    dismiss(domain, &mut state, &mut seats, done);
    seats
}

/// As [`leave`], for one subscription.
pub(crate) fn leave_one(domain: &DomainInner, id: u64, done: &mut Completion) -> Seats {
    let mut state = lock(&domain.state);
    let mut seats = state.seats.take(id);
    dismiss(domain, &mut state, &mut seats, done);
    seats
}

fn dismiss(domain: &DomainInner, state: &mut DomainState, seats: &mut Seats, done: &mut Completion) {
    seats.mirrors.iter_mut().for_each(|seat| empty(domain, state, seat, done));
    let _callback = CallbackScope::enter();
    seats.caches.iter().for_each(|cache| cache.invalidate(IovaRange::ALL, done));
}
