//! Mirrors that replace in place: one call for an old mapping and its successor over the same range.

use crate::backing::Memory;
use crate::deliver::backed;
use crate::deliver::mirror::{AddError, Added, Failure, MirrorSeat};
use crate::domain::apply::Plan;
use crate::domain::dirty::{DirtyLog, note_dirty};
use crate::mapping::Mapping;
use crate::quiesce::completion::Completion;

fn pieces_of(memory: &Memory, mapping: &Mapping) -> Vec<Mapping> {
    let mut pieces = Vec::new();
    backed(memory, mapping, &mut |piece| pieces.push(*piece));
    pieces
}

fn over<'a>(list: &'a [Mapping], mapping: &Mapping) -> Option<&'a Mapping> {
    let at = list.binary_search_by_key(&mapping.range, |m| m.range).ok()?;
    list.get(at)
}

/// What is exchanged at this mirror when `new` follows `old`: one extent for one, over the same range.
fn pair(seat: &MirrorSeat, memory: &Memory, old: &Mapping, new: &Mapping) -> Option<(Mapping, Mapping)> {
    match (pieces_of(memory, old).as_slice(), pieces_of(memory, new).as_slice()) {
        ([old], [new]) => seat.exchange(old, new),
        _ => None,
    }
}

/// Takes away those of `removed` that have no successor over the same range; the others stay for [`add_all`].
pub(crate) fn remove_unpaired(
    seat: &mut MirrorSeat,
    memory: &Memory,
    plan: &Plan<'_>,
    removed: &[Mapping],
    done: &mut Completion,
    dirty: &mut Option<DirtyLog>,
) -> Result<(), Failure> {
    for old in removed {
        let new = over(plan.added, old).filter(|_| seat.is_complete());
        if new.is_some_and(|new| pair(seat, memory, old, new).is_some()) {
            seat.swap.kept.push(*old);
        } else {
            seat.remove(&pieces_of(memory, old), done, dirty)?;
        }
    }
    Ok(())
}

/// Adds what the plan adds, in place where the old mapping was kept.
pub(crate) fn add_all(
    seat: &mut MirrorSeat,
    memory: &Memory,
    plan: &Plan<'_>,
    done: &mut Completion,
    dirty: &mut Option<DirtyLog>,
) -> Added {
    for new in plan.added {
        let kept = seat.swap.kept.iter().find(|old| old.range == new.range).copied();
        if let Some((old, new)) = kept.and_then(|old| pair(seat, memory, &old, new)) {
            seat.replace((&old, &new), done)?;
            // Nobody says what was written through the old one.
            note_dirty(dirty, &[old], None);
            seat.swap.exchanged.push((old, new));
            continue;
        }
        let pieces = pieces_of(memory, new);
        for (at, piece) in pieces.iter().enumerate() {
            if let Err(error) = seat.add(piece, done) {
                for undo in pieces.get(..at).unwrap_or_default() {
                    seat.remove(core::slice::from_ref(undo), done, dirty).map_err(AddError::Fence)?;
                }
                return Err(error);
            }
        }
        seat.swap.added.push(*new);
    }
    Ok(())
}

/// Takes away what was kept for an exchange and is not to come back.
pub(crate) fn drop_kept(
    seat: &mut MirrorSeat,
    memory: &Memory,
    plan: &Plan<'_>,
    done: &mut Completion,
    dirty: &mut Option<DirtyLog>,
) -> Result<(), Failure> {
    let mut kept = core::mem::take(&mut seat.swap.kept);
    for old in kept.extract_if(.., |old| over(plan.fallback, old) != Some(old)) {
        seat.remove(&pieces_of(memory, &old), done, dirty)?;
    }
    seat.swap.kept = kept;
    Ok(())
}

/// Takes back what [`add_all`] did: afterwards the mirror holds every old mapping that was kept.
pub(crate) fn undo(
    seat: &mut MirrorSeat,
    memory: &Memory,
    done: &mut Completion,
    dirty: &mut Option<DirtyLog>,
) -> Result<(), Failure> {
    if !seat.is_live() {
        return Ok(());
    }
    for new in core::mem::take(&mut seat.swap.added) {
        for piece in pieces_of(memory, &new) {
            seat.remove(&[piece], done, dirty)?;
        }
    }
    for (old, new) in core::mem::take(&mut seat.swap.exchanged) {
        let back = seat.replace((&new, &old), done);
        back.map_err(|error| format!("could not put {} back: {error:?}", old.range).into_boxed_str())?;
        note_dirty(dirty, &[new], None);
    }
    Ok(())
}
