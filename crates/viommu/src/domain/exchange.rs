//! Mirrors that replace in place: one call for an old mapping and its successor over the same range.

use crate::backing::Backing;
use crate::deliver::backed;
use crate::deliver::mirror::{AddError, Failure, MirrorSeat};
use crate::domain::apply::Plan;
use crate::domain::dirty::{DirtyLog, note_dirty};
use crate::mapping::Mapping;
use crate::quiesce::completion::Completion;

fn pieces_of(backing: &Backing, mapping: &Mapping) -> Vec<Mapping> {
    let mut pieces = Vec::new();
    backed(backing, mapping, &mut |piece| pieces.push(*piece));
    pieces
}

fn over<'a>(list: &'a [Mapping], mapping: &Mapping) -> Option<&'a Mapping> {
    let at = list.binary_search_by_key(&mapping.range, |m| m.range).ok()?;
    list.get(at)
}

/// Takes away those of `removed` that have no successor over the same range; the others stay for [`add_all`].
pub(crate) fn remove_unpaired(
    seat: &mut MirrorSeat,
    backing: &Backing,
    plan: &Plan<'_>,
    removed: &[Mapping],
    done: &mut Completion,
    dirty: &mut Option<DirtyLog>,
) -> Result<(), Failure> {
    for old in removed {
        let pieces = pieces_of(backing, old);
        let one = |pieces: &[Mapping]| pieces.len() == 1;
        let paired = over(plan.added, old).is_some_and(|new| one(&pieces) && one(&pieces_of(backing, new)));
        if paired && seat.is_complete() {
            seat.swap.kept.push(*old);
        } else {
            seat.remove(&pieces, done, dirty)?;
        }
    }
    Ok(())
}

/// Adds what the plan adds, in place where the old mapping was kept.
pub(crate) fn add_all(
    seat: &mut MirrorSeat,
    backing: &Backing,
    plan: &Plan<'_>,
    done: &mut Completion,
    dirty: &mut Option<DirtyLog>,
) -> Result<(), AddError> {
    for new in plan.added {
        let pieces = pieces_of(backing, new);
        let kept = seat.swap.kept.iter().find(|old| old.range == new.range).copied();
        let old_piece = kept.and_then(|old| pieces_of(backing, &old).first().copied());
        if let (Some(old), Some(old_piece), Some(new_piece)) = (kept, old_piece, pieces.first()) {
            match seat.replace(&old_piece, new_piece, done) {
                Some(Ok(())) => {
                    // Nobody says what was written through the old one.
                    note_dirty(dirty, &[old_piece], None);
                    seat.swap.exchanged.push((old_piece, *new_piece));
                    continue;
                }
                Some(Err(refused)) => return Err(AddError::Refused(refused)),
                // Not one extent for one here (a window, a hole): unmap and map after all.
                None => {
                    seat.swap.kept.retain(|m| *m != old);
                    seat.remove(&[old_piece], done, dirty).map_err(AddError::Fence)?;
                }
            }
        }
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
    backing: &Backing,
    plan: &Plan<'_>,
    done: &mut Completion,
    dirty: &mut Option<DirtyLog>,
) -> Result<(), Failure> {
    let mut kept = core::mem::take(&mut seat.swap.kept);
    for old in kept.extract_if(.., |old| over(plan.fallback, old) != Some(old)) {
        seat.remove(&pieces_of(backing, &old), done, dirty)?;
    }
    seat.swap.kept = kept;
    Ok(())
}

/// Takes back what [`add_all`] did: afterwards the mirror holds every old mapping that was kept.
pub(crate) fn undo(
    seat: &mut MirrorSeat,
    backing: &Backing,
    done: &mut Completion,
    dirty: &mut Option<DirtyLog>,
) -> Result<(), Failure> {
    if !seat.is_live() {
        return Ok(());
    }
    for new in core::mem::take(&mut seat.swap.added) {
        for piece in pieces_of(backing, &new) {
            seat.remove(&[piece], done, dirty)?;
        }
    }
    for (old, new) in core::mem::take(&mut seat.swap.exchanged) {
        match seat.replace(&new, &old, done) {
            Some(Ok(())) => {
                note_dirty(dirty, &[new], None);
            }
            Some(Err(refused)) => return Err(format!("could not put {} back: {refused}", old.range)),
            None => return Err(format!("could not put {} back", old.range)),
        }
    }
    Ok(())
}
