//! What mirrors in this process keep: where each extent lies here, and what they hold.
//!
//! A mirror maps an extent of the record as its [`Pieces`], found by a [`Resolve`] at the time of the call, and remembers
//! them in its [`Holdings`]: what is unmapped later is what was mapped, whatever has become of the memory meanwhile.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use viommu::subscribe::{RefusalKind, Refused};
use viommu::{IovaRange, Mapping};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use crate::host::{HostError, HostPiece, host_piece, host_pieces};

/// A part of an extent that is linear in this process: one entry of a host's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the device sees it.
    pub range: IovaRange,
    /// Where its first byte lies.
    pub vaddr: u64,
}

/// What a host holds for an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pieces {
    /// Nothing: device registers that this process has not mapped.
    Absent,
    /// One entry over the whole extent, with the host's address of its first byte.
    Whole(u64),
    /// Several, ascending, which cover it.
    Several(Box<[Piece]>),
}

impl Pieces {
    /// The entries that they take.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Absent => 0,
            Self::Whole(_) => 1,
            Self::Several(pieces) => pieces.len(),
        }
    }

    /// Those of an extent over `range`.
    pub fn of(&self, range: IovaRange) -> impl Iterator<Item = Piece> + '_ {
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
pub type Resolve = Box<dyn Fn(&Mapping) -> Result<Pieces, HostError> + Send>;

/// As vm-memory has it.
pub fn resolve_in<A>(memory: A) -> Resolve
where
    A: GuestAddressSpace + Send + 'static,
    A::M: GuestMemoryBackend,
{
    Box::new(move |extent| {
        let memory = memory.memory();
        let piece = |found: &HostPiece| Piece { range: found.iova, vaddr: found.address.addr() as u64 };
        // Nearly always it is one.
        let first = piece(&host_piece(&*memory, extent, extent.range.start())?);
        if first.range == extent.range {
            return Ok(Pieces::Whole(first.vaddr));
        }
        let several = host_pieces(&*memory, extent)?;
        Ok(Pieces::Several(several.iter().map(piece).collect()))
    })
}

/// A piece could not be mapped, and those before it could not be taken back.
const LEFT_BEHIND: &str = "what was mapped before it could not be taken back";

/// Has `map` map each of `list`, all of them or none: where one is refused, those before it are taken back by `unmap`, which
/// gives the bytes that it has removed.
///
/// # Errors
/// The refusal; [`RefusalKind::Lost`] where the way back failed.
pub fn map_all<H>(
    host: &mut H,
    list: &[Piece],
    map: impl Fn(&mut H, Piece) -> Result<(), Refused>,
    unmap: impl FnOnce(&mut H, IovaRange) -> Result<u128, Refused>,
) -> Result<(), Refused> {
    for (at, piece) in list.iter().enumerate() {
        let Err(refused) = map(host, *piece) else { continue };
        let before = list.get(..at).unwrap_or_default();
        let (Some(first), Some(last)) = (before.first(), before.last()) else { return Err(refused) };
        let hull = first.range.hull(last.range);
        return Err(match unmap(host, hull) {
            Ok(bytes) if bytes == hull.bytes() => refused,
            Ok(_) | Err(_) => Refused::new(RefusalKind::Lost, format!("{refused}; {LEFT_BEHIND}")),
        });
    }
    Ok(())
}

/// One extent of the record's, and what the host has of it.
#[derive(Clone, Debug)]
pub struct Holding {
    /// As the record has it.
    pub mapping: Mapping,
    /// As the host was told.
    pub pieces: Pieces,
}

impl Holding {
    /// The host's entries.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.pieces.of(self.mapping.range)
    }
}

/// What lies in a range that is to be unmapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Bytes of all extents in it.
    pub bytes: u128,
    /// Bytes of those that the host has.
    pub present: u128,
    /// From the first to the last of those that the host has.
    pub hull: Option<IovaRange>,
}

impl Inside {
    fn add(&mut self, held: &Holding) {
        let mine = held.mapping.range;
        self.bytes = self.bytes.saturating_add(mine.bytes());
        if held.pieces != Pieces::Absent {
            self.present = self.present.saturating_add(mine.bytes());
            self.hull = Some(self.hull.map_or(mine, |hull| hull.hull(mine)));
        }
    }
}

/// All that a mirror holds.
#[derive(Clone, Debug, Default)]
pub struct Holdings {
    /// By the first address. In boxes: the less there is to walk through and to move, the more of it stays in caches.
    extents: BTreeMap<u64, Box<Holding>>,
    /// Entries of the host that they take.
    entries: u64,
}

impl Holdings {
    /// Entries of the host that they take.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// The host holds `mapping` now, which overlaps nothing here.
    pub fn insert(&mut self, mapping: Mapping, pieces: Pieces) {
        self.entries = self.entries.saturating_add(pieces.count() as u64);
        self.extents.insert(mapping.range.start().0, Box::new(Holding { mapping, pieces }));
    }

    /// Ascending.
    pub fn iter(&self) -> impl Iterator<Item = &Holding> + '_ {
        self.extents.values().map(|held| &**held)
    }

    /// Those that begin in `range`, ascending.
    pub fn inside(&self, range: IovaRange) -> impl Iterator<Item = &Holding> + '_ {
        self.extents.range(range.start().0..=range.last().0).map(|(_, held)| &**held)
    }

    /// Has `unmap` remove what lies in `range` from the host, and holds none of it then.
    ///
    /// # Errors
    /// The refusal of `unmap`, or [`RefusalKind::Range`] without asking it where an extent sticks out of `range`: all is
    /// held as before.
    pub fn unmap<R>(
        &mut self,
        range: IovaRange,
        unmap: impl FnOnce(Inside) -> Result<R, Refused>,
    ) -> Result<R, Refused> {
        // Most often it is exactly one extent, beside which nothing else can lie in it: found once then.
        if let Entry::Occupied(one) = self.extents.entry(range.start().0)
            && one.get().mapping.range == range
        {
            let mut inside = Inside::default();
            inside.add(one.get());
            let done = unmap(inside)?;
            self.entries = self.entries.saturating_sub(one.remove().pieces.count() as u64);
            return Ok(done);
        }
        let done = unmap(self.sum(range)?)?;
        self.remove(range);
        Ok(done)
    }

    /// What lies in `range`.
    ///
    /// # Errors
    /// [`RefusalKind::Range`] where an extent sticks out of it at either end.
    pub fn sum(&self, range: IovaRange) -> Result<Inside, Refused> {
        let cut = || Refused::new(RefusalKind::Range, format!("{range} would cut what is held"));
        let before = self.extents.range(..range.start().0).next_back();
        if before.is_some_and(|(_, held)| held.mapping.range.overlaps(range)) {
            return Err(cut());
        }
        let mut sum = Inside::default();
        for held in self.inside(range) {
            if !range.covers(held.mapping.range) {
                return Err(cut());
            }
            sum.add(held);
        }
        Ok(sum)
    }

    /// What begins in `range` is gone.
    pub fn remove(&mut self, range: IovaRange) {
        let gone: Vec<u64> = self.inside(range).map(|held| held.mapping.range.start().0).collect();
        for first in gone {
            let pieces = self.extents.remove(&first).map_or(0, |held| held.pieces.count());
            self.entries = self.entries.saturating_sub(pieces as u64);
        }
    }

    /// Nothing is held.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// As the record has them.
    #[must_use]
    pub fn mappings(&self) -> Vec<Mapping> {
        self.iter().map(|held| held.mapping).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use viommu::{Access, Gpa, Iova};

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(first << 12), Iova((last << 12) | 0xfff)).unwrap()
    }

    fn holdings() -> Holdings {
        let mut held = Holdings::default();
        let mapping = |first, last| Mapping::over(range(first, last), Gpa(0), Access::RW).unwrap();
        held.insert(mapping(1, 2), Pieces::Whole(0x7000));
        held.insert(mapping(4, 4), Pieces::Absent);
        let several = [Piece { range: range(6, 6), vaddr: 0 }, Piece { range: range(7, 9), vaddr: 0x9000 }];
        held.insert(mapping(6, 9), Pieces::Several(several.into()));
        held
    }

    #[test]
    fn a_range_that_cuts_what_sticks_out_at_either_end_is_refused() {
        let mut held = holdings();
        for (first, last, cuts) in
            [(0, 9, false), (2, 9, true), (1, 8, true), (3, 5, false), (7, 8, true), (10, 11, false)]
        {
            assert_eq!(held.sum(range(first, last)).is_err(), cuts, "{first} to {last}");
        }
        assert!(held.sum(IovaRange::ALL).is_ok());
        let refused = held.unmap(range(1, 1), |_| -> Result<(), Refused> { panic!("the host is asked") });
        assert_eq!(refused.unwrap_err().kind, RefusalKind::Range);
    }

    #[test]
    fn sum_leaves_out_what_the_host_has_not() {
        let held = holdings();
        let sum = held.sum(range(0, 5)).unwrap();
        assert_eq!((sum.bytes, sum.present, sum.hull), (0x3000, 0x2000, Some(range(1, 2))));
        let sum = held.sum(IovaRange::ALL).unwrap();
        assert_eq!((sum.bytes, sum.present, sum.hull), (0x7000, 0x6000, Some(range(1, 9))));
        assert_eq!(held.sum(range(4, 4)).unwrap(), Inside { bytes: 0x1000, present: 0, hull: None });
    }

    /// One call of a mirror's over pages 0 to 23, and whether the host refuses it.
    #[derive(Clone, Debug)]
    struct Call {
        maps: bool,
        range: IovaRange,
        pieces: Pieces,
        refuses: bool,
    }

    fn call() -> impl Strategy<Value = Call> {
        let pieces = prop_oneof![
            1 => Just(Pieces::Absent),
            3 => Just(Pieces::Whole(0x7000)),
            1 => Just(Pieces::Several(vec![Piece { range: range(0, 0), vaddr: 0 }; 3].into())),
        ];
        let whole = (any::<bool>(), 0_u64..20, 0_u64..4, pieces, prop::bool::weighted(0.2));
        whole.prop_map(|(maps, first, more, pieces, refuses)| Call {
            maps,
            range: range(first, first + more),
            pieces,
            refuses,
        })
    }

    /// What `unmap` does, said of a list.
    fn unmap_from(list: &mut Vec<Holding>, range: IovaRange) -> Option<Inside> {
        let touched = |held: &&Holding| held.mapping.range.overlaps(range);
        let inside: Vec<Holding> = list.iter().filter(touched).cloned().collect();
        if inside.iter().any(|held| !range.covers(held.mapping.range)) {
            return None;
        }
        list.retain(|held| !touched(&held));
        let present: Vec<_> = inside.iter().filter(|held| held.pieces != Pieces::Absent).collect();
        let bytes = |held: &Holding| held.mapping.range.bytes();
        let ends = present.iter().map(|held| held.mapping.range.start()).min();
        let ends = ends.zip(present.iter().map(|held| held.mapping.range.last()).max());
        Some(Inside {
            bytes: inside.iter().map(bytes).sum(),
            present: present.iter().map(|held| bytes(held)).sum(),
            hull: ends.map(|(start, last)| IovaRange::new(start, last).unwrap()),
        })
    }

    proptest! {
        #[test]
        fn what_is_held_is_what_a_list_holds(calls in prop::collection::vec(call(), 1..80)) {
            let (mut held, mut list) = (Holdings::default(), Vec::<Holding>::new());
            for Call { maps, range, pieces, refuses } in calls {
                if maps {
                    if list.iter().any(|held| held.mapping.range.overlaps(range)) {
                        continue;
                    }
                    let mapping = Mapping::over(range, Gpa(0), Access::RW).unwrap();
                    held.insert(mapping, pieces.clone());
                    list.push(Holding { mapping, pieces });
                } else {
                    let mut less = list.clone();
                    let expected = unmap_from(&mut less, range);
                    let mut asked = None;
                    let outcome = held.unmap(range, |inside| {
                        asked = Some(inside);
                        if refuses { Err(Refused::new(RefusalKind::Device, "no")) } else { Ok(()) }
                    });
                    prop_assert_eq!(asked, expected);
                    prop_assert_eq!(outcome.is_ok(), expected.is_some() && !refuses);
                    if outcome.is_ok() {
                        list = less;
                    }
                }
                list.sort_by_key(|held| held.mapping.range.start());
                let of = |held: &Holding| (held.mapping, held.pieces.clone());
                let same = held.iter().map(of).eq(list.iter().map(of));
                prop_assert!(same, "{:?} where it should be {:?}", held, list);
                let entries: usize = list.iter().map(|held| held.pieces.count()).sum();
                prop_assert_eq!(held.entries(), entries as u64);
            }
        }
    }

    #[test]
    fn entries_are_counted_by_pieces() {
        let mut held = holdings();
        assert_eq!(held.entries(), 3);
        held.remove(range(4, 9));
        assert_eq!((held.entries(), held.mappings().len()), (1, 1));
        held.clear();
        assert_eq!((held.entries(), held.iter().count()), (0, 0));
    }

    #[test]
    fn pieces_of_a_whole_extent_are_one_over_its_range() {
        let whole: Vec<Piece> = Pieces::Whole(0x5000).of(range(3, 4)).collect();
        assert_eq!(whole, [Piece { range: range(3, 4), vaddr: 0x5000 }]);
        assert_eq!(Pieces::Absent.of(range(3, 4)).count(), 0);
    }
}
