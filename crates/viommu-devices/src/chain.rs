//! Where the parts of a request lie, as a driver said it. Nothing in it is trusted.

use core::ops::Range;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::ring::DESCRIPTORS;

/// The pieces of memory of all requests of a batch.
#[derive(Debug, Default)]
pub(crate) struct Places {
    list: Vec<(GuestAddress, u32)>,
    looked_at: usize,
}

/// Which of the [`Places`] are a request's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    /// What the driver wrote.
    pub(crate) readable: Range<usize>,
    /// What the device may write.
    pub(crate) writable: Range<usize>,
    /// Bytes of the first.
    pub(crate) readable_bytes: u64,
    /// Bytes of the second.
    pub(crate) writable_bytes: u64,
}

impl Places {
    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.list.clear();
        // What a hostile driver blew up is not kept.
        self.list.shrink_to(DESCRIPTORS);
        self.looked_at = 0;
    }

    /// Descriptors that were read, those of chains that are none too.
    pub(crate) fn looked_at(&self) -> usize {
        self.looked_at
    }

    /// Takes a chain apart; of more than `longest` descriptors, those of an indirect table too, it is none. Gives
    /// nothing for descriptors that end nowhere, run in a circle, are out of order, or cannot be read.
    pub(crate) fn take<M: GuestMemory>(
        &mut self,
        chain: DescriptorChain<&M>,
        longest: usize,
    ) -> Option<Layout> {
        let start = self.list.len();
        let (mut turn, mut readable_bytes, mut writable_bytes) = (None, 0_u64, 0_u64);
        // Also where the first descriptor is none.
        let mut ended = false;
        for descriptor in chain.take(longest) {
            ended = !descriptor.has_next();
            self.looked_at = self.looked_at.saturating_add(1);
            let bytes = u64::from(descriptor.len());
            if descriptor.is_write_only() {
                turn.get_or_insert(self.list.len());
                writable_bytes = writable_bytes.saturating_add(bytes);
            } else if turn.is_some() {
                ended = false;
                break;
            } else {
                readable_bytes = readable_bytes.saturating_add(bytes);
            }
            if bytes > 0 {
                self.list.push((descriptor.addr(), descriptor.len()));
            }
        }
        if !ended {
            self.list.truncate(start);
            return None;
        }
        let end = self.list.len();
        let turn = turn.unwrap_or(end);
        Some(Layout { readable: start..turn, writable: turn..end, readable_bytes, writable_bytes })
    }

    /// The pieces behind `[offset, offset + len)` of some places: address, and range of the caller's bytes. Ends early
    /// where they do.
    fn pieces(
        &self,
        places: &Range<usize>,
        offset: u64,
        len: usize,
    ) -> impl Iterator<Item = (GuestAddress, Range<usize>)> {
        let mut skip = offset;
        let mut done = 0_usize;
        self.list
            .get(places.clone())
            .unwrap_or_default()
            .iter()
            .map_while(move |(at, bytes)| {
                if done >= len {
                    return None;
                }
                let bytes = u64::from(*bytes);
                if skip >= bytes {
                    skip = skip.saturating_sub(bytes);
                    return Some(None);
                }
                let at = at.0.checked_add(skip).map(GuestAddress)?;
                let here = usize::try_from(bytes.saturating_sub(skip)).unwrap_or(usize::MAX);
                let end = done.saturating_add(here).min(len);
                let range = done..end;
                skip = 0;
                done = end;
                Some(Some((at, range)))
            })
            .flatten()
    }

    /// Fills `bytes` from `offset` of some places on, or says that this cannot be.
    pub(crate) fn read<M: GuestMemory>(
        &self,
        memory: &M,
        places: &Range<usize>,
        offset: u64,
        bytes: &mut [u8],
    ) -> bool {
        let mut done = 0_usize;
        for (at, range) in self.pieces(places, offset, bytes.len()) {
            done = range.end;
            if bytes.get_mut(range).is_none_or(|part| memory.read_slice(part, at).is_err()) {
                return false;
            }
        }
        done == bytes.len()
    }

    /// Writes `bytes` from `offset` of some places on, or says that this cannot be; a part may be written then.
    pub(crate) fn write<M: GuestMemory>(
        &self,
        memory: &M,
        places: &Range<usize>,
        offset: u64,
        bytes: &[u8],
    ) -> bool {
        let mut done = 0_usize;
        for (at, range) in self.pieces(places, offset, bytes.len()) {
            done = range.end;
            if bytes.get(range).is_none_or(|part| memory.write_slice(part, at).is_err()) {
                return false;
            }
        }
        done == bytes.len()
    }
}
