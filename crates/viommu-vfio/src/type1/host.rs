//! From guest physical addresses to this process's: what is mapped for an extent.

use viommu::{IovaRange, Mapping};
use viommu_memory::{HostError, host_pieces};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

/// A part of an extent that is linear in this process: one entry of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) range: IovaRange,
    /// Where its first byte lies.
    pub(crate) vaddr: u64,
}

/// What the container holds for an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Pieces {
    /// Nothing: device registers that this process has not mapped.
    Absent,
    /// One entry over the whole extent, with the host's address of its first byte.
    Whole(u64),
    /// Several, ascending, which cover it.
    Several(Box<[Piece]>),
}

impl Pieces {
    /// The entries that they take.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Absent => 0,
            Self::Whole(_) => 1,
            Self::Several(pieces) => pieces.len(),
        }
    }

    /// Those of an extent over `range`.
    pub(crate) fn of(&self, range: IovaRange) -> impl Iterator<Item = Piece> + '_ {
        let whole = match self {
            Self::Whole(vaddr) => Some(Piece { range, vaddr: *vaddr }),
            Self::Absent | Self::Several(_) => None,
        };
        let several = match self {
            Self::Several(pieces) => &pieces[..],
            Self::Absent | Self::Whole(_) => &[],
        };
        whole.into_iter().chain(several.iter().copied())
    }
}

/// Finds the pieces of an extent, in the memory that there is at the time of the call.
pub(crate) type Resolve = Box<dyn Fn(&Mapping) -> Result<Pieces, HostError> + Send>;

/// As vm-memory has it.
pub(crate) fn resolve_in<A>(memory: A) -> Resolve
where
    A: GuestAddressSpace + Send + 'static,
    A::M: GuestMemoryBackend,
{
    Box::new(move |extent| {
        let found = host_pieces(&*memory.memory(), extent)?;
        let piece = |found: &viommu_memory::HostPiece| Piece {
            range: found.iova,
            vaddr: found.address.addr() as u64,
        };
        Ok(match found.as_slice() {
            [one] => Pieces::Whole(piece(one).vaddr),
            several => Pieces::Several(several.iter().map(piece).collect()),
        })
    })
}
