//! Subscribers come to an address space and leave it: replay, and its opposite.

use core::ops::ControlFlow;

use crate::addr::{Iova, IovaRange};
use crate::backing::Memory;
use crate::deliver::lens::Lens;
use crate::deliver::mirror::{AddError, Added, MirrorSeat};
use crate::deliver::{Seats, backed};
use crate::domain::inner::{DomainInner, DomainState};
use crate::endpoint::{EndpointId, Region};
use crate::mapping::Mapping;
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::CallbackScope;
use crate::subscribe::{RefusalKind, Refused, Unreachable};
use crate::sync::{Arc, lock};

/// Mappings delivered under one taking of the domain's lock, so that a replay does not stop the domain.
const SLICE: usize = if cfg!(shuttle) { 1 } else { 512 };

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
    lens.set_space(clip_to(domain, &lens, regions), domain.is_refusable());
    if lens.plain {
        // Even if each mapping lay across everything there is.
        let state = lock(&domain.state);
        let most = (state.writer.len() as u64).saturating_mul(state.memory.extents().len() as u64);
        if lens.reach.entries.is_none_or(|limit| most <= u64::from(limit)) {
            return Ok(());
        }
    }
    let mut extents = Vec::new();
    let mut held = 0_u64;
    let mut at = Some(Iova(0));
    while let Some(range) = at.and_then(|at| IovaRange::new(at, Iova(u64::MAX))) {
        at = None;
        let state = lock(&domain.state);
        let memory = state.memory.clone();
        let mut count = 0_usize;
        state.writer.for_each(range, &mut |m| {
            if count == SLICE {
                at = Some(m.range.start());
                return ControlFlow::Break(());
            }
            count += 1;
            backed(&memory, &m, &mut |piece| lens.extents(piece, &mut extents));
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
) -> Result<(), (Box<Seats>, ReplayError)> {
    let mirrors: Vec<u64> = seats.mirrors.iter().map(|seat| seat.sub.id()).collect();
    let everyone: Vec<u64> = (seats.mirrors.iter().map(|s| s.sub.id()))
        .chain(seats.caches.iter().map(|s| s.sub.id()))
        .chain(seats.observers.iter().map(|s| s.sub.id()))
        .collect();
    for seat in &mut seats.mirrors {
        seat.arrive(&domain.readers, clip_to(domain, &seat.lens, regions), domain.is_refusable());
    }
    let was_here = {
        let mut state = lock(&domain.state);
        // A mirror may come to an endpoint that is here already.
        let was_here = endpoint.is_some_and(|id| state.regions.iter().any(|(whose, _)| *whose == id));
        // Looked at before the attach began; the domain may have changed since.
        let meets = |r: &Region| state.writer.next(r.range.start()).filter(|m| m.range.overlaps(r.range));
        let met = if domain.is_identity() { None } else { regions.iter().find_map(meets) };
        if let Some(m) = met.filter(|_| endpoint.is_some()) {
            let why = format!("the mapping at {} meets a region", m.range);
            return Err((seats.into(), ReplayError::Refused(Refused::new(RefusalKind::Range, why))));
        }
        state.seats.append(seats);
        if let Some(endpoint) = endpoint {
            add_regions(&mut state, endpoint, regions);
        }
        was_here
    };
    for id in mirrors {
        if let Err(error) = replay(domain, id, done) {
            let mut state = lock(&domain.state);
            if let Some(endpoint) = endpoint.filter(|_| !was_here) {
                state.regions.retain(|(whose, _)| *whose != endpoint);
            }
            let mut back = Seats::default();
            for id in everyone {
                let mut seats = state.seats.take(id);
                seats.mirrors.iter_mut().for_each(|seat| empty(domain, &mut state, seat, done));
                back.append(seats);
            }
            return Err((back.into(), error));
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
        let memory = state.memory.clone();
        let (mut count, mut failed, mut rest) = (0_usize, None, None);
        // Whatever comes now is to be held. Nobody sees where the slice has come to before it is over.
        seat.advance(None);
        state.writer.for_each(ahead, &mut |m| {
            if count < SLICE {
                count += 1;
                match fill_one(seat, &memory, &m, done) {
                    Ok(()) => return ControlFlow::Continue(()),
                    Err(error) => failed = Some(error),
                }
            }
            rest = Some(m.range.start());
            ControlFlow::Break(())
        });
        seat.commit(done);
        seat.advance(rest);
        match failed.map(|error| *error) {
            None if rest.is_some() => {}
            None => return Ok(()),
            Some(AddError::Refused(refused)) => return Err(ReplayError::Refused(*refused)),
            Some(AddError::Fence(failure)) => {
                domain.fence_seat(seat, &failure, done);
                return Err(ReplayError::Fenced(failure.into()));
            }
        }
    }
}

/// One mapping, all of its backed pieces or none.
#[inline(always)]
fn fill_one(seat: &mut MirrorSeat, memory: &Memory, m: &Mapping, done: &mut Completion) -> Added {
    if !m.access.is_empty() && memory.is_ram_behind(m) {
        return seat.add(m, done);
    }
    fill_pieces(seat, memory, m, done)
}

#[inline(never)]
fn fill_pieces(seat: &mut MirrorSeat, memory: &Memory, m: &Mapping, done: &mut Completion) -> Added {
    let mut count = 0_usize;
    let mut outcome = Ok(());
    backed(memory, m, &mut |piece| {
        if outcome.is_ok() {
            outcome = seat.add(piece, done);
            count += usize::from(outcome.is_ok());
        }
    });
    if outcome.is_err() {
        let mut undone = Ok(());
        backed(memory, m, &mut |piece| {
            if count > 0 && undone.is_ok() {
                count -= 1;
                undone = seat.remove(core::slice::from_ref(piece), done, &mut None);
            }
        });
        undone.map_err(AddError::Fence)?;
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
    let memory = state.memory.clone();
    state.writer.for_each(IovaRange::ALL, &mut |m| {
        backed(&memory, &m, &mut |piece| pieces.push(*piece));
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

/// Empties the mirrors of those who have been taken from `domain`, and tells the caches to drop everything.
pub(crate) fn dismiss(
    domain: &DomainInner,
    state: &mut DomainState,
    seats: &mut Seats,
    done: &mut Completion,
) {
    seats.mirrors.iter_mut().for_each(|seat| empty(domain, state, seat, done));
    let _callback = CallbackScope::enter();
    seats.caches.iter().for_each(|cache| cache.invalidate(IovaRange::ALL, &domain.readers, done));
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::ack::Ack;
    use crate::addr::Gpa;
    use crate::domain::Tables;
    use crate::iommu::Iommu;
    use crate::mapping::Access;
    use crate::subscribe::{FenceFailed, Interest, Mirror, Reach, RefusalKind, Unmapped};
    use std::sync::Mutex;

    /// Holds what it is told, and refuses one map if told so.
    struct Holder(Arc<Mutex<(Vec<Mapping>, bool)>>);

    impl Mirror for Holder {
        fn reach(&self) -> Reach {
            Reach::default()
        }
        fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
            let mut held = self.0.lock().unwrap();
            if core::mem::take(&mut held.1) {
                return Err(Refused::new(RefusalKind::Resources, "told to refuse"));
            }
            assert!(!held.0.iter().any(|m| m.range.overlaps(extent.range)), "I3: {extent:?}");
            held.0.push(*extent);
            Ok(Ack::Done)
        }
        fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
            let mut held = self.0.lock().unwrap();
            let gone: Vec<_> = held.0.extract_if(.., |m| m.range.overlaps(range)).collect();
            Ok(Unmapped::done(gone.iter().map(|m| m.range.bytes()).sum()))
        }
        fn fence(&mut self) -> Result<(), FenceFailed> {
            Ok(())
        }
        fn held(&self) -> Vec<Mapping> {
            self.0.lock().unwrap().0.clone()
        }
    }

    #[test]
    fn replay_after_a_refused_step_across_its_cursor_delivers_nothing_twice() {
        let iommu = Iommu::builder().ram(0, 1 << 20).build().unwrap();
        let domain = iommu.create_domain(1, Tables::OwnedCut).unwrap();
        let map = |first: u64, count: u64, gpa: u64| {
            Mapping::new(Iova(first << 12), count << 12, Gpa(gpa << 12), Access::RW).unwrap()
        };
        domain.map(map(0, 5, 0)).unwrap().wait().unwrap();
        domain.map(map(5, 5, 5)).unwrap().wait().unwrap();
        // One that is in the middle of its replay, behind the first mapping; one that refuses.
        let held = Arc::new(Mutex::new((vec![map(0, 5, 0)], false)));
        let sub = crate::deliver::Sub::new(&iommu.unit, None);
        let id = sub.id();
        let mut seat = MirrorSeat::new(sub, Interest::MIRROR, Box::new(Holder(held.clone())));
        seat.advance(Some(Iova(5 << 12)));
        seat.counts.held = 1;
        lock(&domain.0.state).seats.append(Seats::new(vec![seat], Vec::new(), Vec::new()));
        let refuser = Arc::new(Mutex::new((Vec::new(), false)));
        let space = crate::subscribe::Space::Domain(1);
        let _s = iommu.subscribe_mirror(space, Box::new(Holder(refuser.clone())), Interest::MIRROR).unwrap();
        refuser.lock().unwrap().1 = true;
        domain.replace(map(3, 4, 100)).unwrap_err();
        let mut done = Completion::ready();
        replay(&domain.0, id, &mut done).unwrap();
        let mut now = held.lock().unwrap().0.clone();
        now.sort();
        assert_eq!(now, [map(0, 5, 0), map(5, 5, 5)]);
    }
}
