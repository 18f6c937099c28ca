//! From guest physical addresses to files: what is mapped for an extent.

use std::fs::File;
use std::sync::Arc;

use viommu::{Iova, IovaRange, Mapping};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

/// A part of an extent that is linear in one file: one window of the server's.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) range: IovaRange,
    pub(crate) file: Option<Arc<File>>,
    /// Where its first byte lies in the file.
    pub(crate) offset: u64,
}

impl PartialEq for Piece {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.file, &other.file) {
            (None, None) => true,
            (Some(ours), Some(theirs)) => Arc::ptr_eq(ours, theirs),
            _ => false,
        };
        same && (self.range, self.offset) == (other.range, other.offset)
    }
}

/// What an extent is made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Pieces {
    /// Ascending, disjoint.
    pub(crate) there: Vec<Piece>,
    /// Where there is no memory here, or none that has a file.
    pub(crate) lacks: Vec<IovaRange>,
}

/// Finds the pieces of an extent, in the memory that there is at the time of the call.
pub(crate) type Resolve = Box<dyn Fn(&Mapping) -> Pieces + Send>;

/// As vm-memory has it.
pub(crate) fn resolve_in<A>(memory: A) -> Resolve
where
    A: GuestAddressSpace + Send + 'static,
    A::M: GuestMemoryBackend,
{
    Box::new(move |extent| pieces_in(&*memory.memory(), extent))
}

fn pieces_in<M: GuestMemoryBackend>(memory: &M, extent: &Mapping) -> Pieces {
    let mut pieces = Pieces::default();
    let mut start = extent.range.start();
    let last_gpa = extent.gpa_last().0;
    loop {
        let gpa = extent.translate(start).0;
        let region = memory.find_region(GuestAddress(gpa));
        let end_gpa = match region {
            Some(region) => region.last_addr().0,
            // Up to the next region.
            None => {
                let above = memory.iter().map(|region| region.start_addr().0).filter(|start| *start > gpa);
                above.min().map_or(u64::MAX, |next| next.saturating_sub(1))
            }
        };
        let more = end_gpa.min(last_gpa).saturating_sub(gpa);
        let last = Iova(start.0.saturating_add(more));
        let Some(range) = IovaRange::new(start, last) else { return pieces };
        let file = region.and_then(|region| {
            let file = region.file_offset()?;
            let offset = file.start().checked_add(gpa.checked_sub(region.start_addr().0)?)?;
            Some(Piece { range, file: Some(file.arc().clone()), offset })
        });
        match file {
            Some(piece) => pieces.there.push(piece),
            None => match pieces.lacks.last_mut().filter(|lacks| lacks.next() == Some(start)) {
                Some(lacks) => *lacks = lacks.hull(range),
                None => pieces.lacks.push(range),
            },
        }
        if last >= extent.range.last() {
            return pieces;
        }
        start = Iova(last.0.saturating_add(1));
    }
}
