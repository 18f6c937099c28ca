//! From an access at I/O virtual addresses to slices of the embedder's memory.

use std::iter::FusedIterator;
use std::vec;

use viommu::{Access, Iova, IovaRange, Place, Translation, Translator};
use vm_memory::bitmap::MS;
use vm_memory::guest_memory::{GuestMemoryBackendSliceIterator, GuestMemorySliceIterator};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryResult, Permissions, VolatileSlice,
};

/// What must be allowed for slices that are asked for with `permissions`. Whoever states no use may use them in any
/// way, so both must be allowed.
pub(crate) fn access_of(permissions: Permissions) -> Access {
    match permissions {
        Permissions::Read => Access::READ,
        Permissions::Write => Access::WRITE,
        Permissions::No | Permissions::ReadWrite => Access::RW,
    }
}

/// `count` bytes from `addr` on; `None` for none.
fn range_of(addr: GuestAddress, count: usize) -> GuestMemoryResult<Option<IovaRange>> {
    if count == 0 {
        return Ok(None);
    }
    let range = u64::try_from(count).ok().and_then(|bytes| IovaRange::from_len(Iova(addr.0), bytes));
    range.map(Some).ok_or(GuestMemoryError::GuestAddressOverflow)
}

/// Bytes of `[at, last]`, which is a part of something that has a `usize` of them.
pub(crate) fn bytes(at: Iova, last: Iova) -> usize {
    usize::try_from(last.0.saturating_sub(at.0)).unwrap_or(usize::MAX).saturating_add(1)
}

pub(crate) fn is_memory(place: Place) -> bool {
    matches!(place, Place::Ram | Place::Rom)
}

fn invalid(iova: Iova) -> GuestMemoryError {
    GuestMemoryError::InvalidGuestAddress(GuestAddress(iova.0))
}

/// `check_range` of a guard: a question, so a "no" is no fault of the device's.
pub(crate) fn reaches<M: GuestMemoryBackend>(
    translator: &Translator,
    memory: &M,
    addr: GuestAddress,
    count: usize,
    permissions: Permissions,
) -> bool {
    let range = match range_of(addr, count) {
        Ok(Some(range)) => range,
        Ok(None) => return true,
        Err(_) => return false,
    };
    let access = access_of(permissions);
    let mut at = range.start();
    loop {
        let Ok(hit) = translator.probe(at, access) else { return false };
        let last = hit.last.min(range.last());
        let target = GuestAddress(hit.gpa.0);
        if !is_memory(hit.place) || !GuestMemoryBackend::check_range(memory, target, bytes(at, last)) {
            return false;
        }
        match last.checked_add(1) {
            Some(next) if last < range.last() => at = next,
            _ => return true,
        }
    }
}

/// `get_slices` of a guard: the whole range is translated, as one state of the address space, before the first slice
/// is given; an error says that nothing may be accessed.
///
/// The lifetime is that of the guard, since the memory is borrowed from it.
pub(crate) fn slices<'g, M: GuestMemoryBackend>(
    translator: &Translator,
    memory: &'g M,
    addr: GuestAddress,
    count: usize,
    permissions: Permissions,
) -> GuestMemoryResult<Slices<'g, M>> {
    let mut slices =
        Slices { memory, at: Iova(addr.0), first: None, rest: Vec::new().into_iter(), current: None };
    let Some(range) = range_of(addr, count)? else { return Ok(slices) };
    let access = access_of(permissions);
    let first = translator.translate(range.start(), access).map_err(|fault| invalid(fault.iova))?;
    if first.last >= range.last() {
        if !is_memory(first.place) {
            return Err(invalid(range.start()));
        }
        slices.first = Some(Translation { last: range.last(), ..first });
        return Ok(slices);
    }
    let mut pieces = Vec::new();
    translator.span(range, access, &mut pieces).map_err(|fault| invalid(fault.iova))?;
    let mut at = range.start();
    for piece in &pieces {
        if !is_memory(piece.place) {
            return Err(invalid(at));
        }
        at = Iova(piece.last.0.wrapping_add(1));
    }
    slices.rest = pieces.into_iter();
    Ok(slices)
}

/// The slices of one access, in order.
pub(crate) struct Slices<'g, M: GuestMemoryBackend> {
    memory: &'g M,
    /// Where the next piece starts.
    at: Iova,
    /// The only piece, where one is enough: no allocation then.
    first: Option<Translation>,
    rest: vec::IntoIter<Translation>,
    /// The piece being given out, and where it starts.
    current: Option<(GuestMemoryBackendSliceIterator<'g, M>, Iova, GuestAddress)>,
}

impl<'g, M: GuestMemoryBackend> Iterator for Slices<'g, M> {
    type Item = GuestMemoryResult<VolatileSlice<'g, MS<'g, M>>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((slices, iova, gpa)) = &mut self.current {
                match slices.next() {
                    Some(Ok(slice)) => return Some(Ok(slice)),
                    Some(Err(error)) => {
                        let error = match error {
                            // The device knows I/O virtual addresses only.
                            GuestMemoryError::InvalidGuestAddress(at) => {
                                invalid(Iova(iova.0.wrapping_add(at.0.wrapping_sub(gpa.0))))
                            }
                            other => other,
                        };
                        self.current = None;
                        self.first = None;
                        self.rest = Vec::new().into_iter();
                        return Some(Err(error));
                    }
                    None => self.current = None,
                }
            }
            let piece = self.first.take().or_else(|| self.rest.next())?;
            let (iova, gpa) = (self.at, GuestAddress(piece.gpa.0));
            self.at = Iova(piece.last.0.wrapping_add(1));
            let slices = GuestMemoryBackend::get_slices(self.memory, gpa, bytes(iova, piece.last));
            self.current = Some((slices, iova, gpa));
        }
    }
}

impl<M: GuestMemoryBackend> FusedIterator for Slices<'_, M> {}

impl<'g, M: GuestMemoryBackend> GuestMemorySliceIterator<'g, MS<'g, M>> for Slices<'g, M> {}
