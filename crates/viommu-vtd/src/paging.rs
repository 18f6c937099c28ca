//! Page tables: what an entry says, and the way from an address to its leaf.

use viommu::{Access, Gpa, Iova, IovaRange, Mapping};

use crate::memory::{TableMemory, WORD, word};
use crate::spec::fault::Reason;
use crate::spec::table::{ADDRESS, second};

/// Bits of an address inside the smallest page.
pub(crate) const PAGE_BITS: u32 = 12;
/// Bits of an address that a table resolves.
const TABLE_BITS: u32 = 9;
/// Entries of a table.
pub(crate) const ENTRIES: u64 = 512;
/// The most levels of tables.
pub(crate) const LEVELS: u32 = 5;

/// Where writes are interrupts: no request there is translated, whatever the tables say.
pub(crate) const INTERRUPTS: (Iova, Iova) = (Iova(0xfee0_0000), Iova(0xfeef_ffff));

/// One set of page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Paging {
    pub(crate) root: Gpa,
    /// 3, 4 or 5.
    pub(crate) levels: u32,
}

/// What of an entry is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Bits of a guest physical address.
    pub(crate) host_bits: u32,
    /// Bits of an address that a device may use.
    pub(crate) guest_bits: u32,
    /// Whether there are device TLBs.
    pub(crate) device_tlb: bool,
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Absent,
    Reserved,
    Table(Gpa, Access),
    Page(Gpa, Access),
}

/// Why there is no leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The address is beyond the tables.
    Beyond,
    Unreadable,
    Reserved,
    /// Not present, or without any access.
    Absent,
}

/// Bits of an address below what an entry of `level` resolves; level 1 has the smallest pages.
pub(crate) fn shift(level: u32) -> u32 {
    PAGE_BITS.saturating_add(TABLE_BITS.saturating_mul(level.saturating_sub(1)))
}

/// The last bytes of what an entry of `level` covers, as a mask.
pub(crate) fn mask(level: u32) -> u64 {
    1_u64.checked_shl(shift(level)).map_or(u64::MAX, |bytes| bytes.saturating_sub(1))
}

/// Which entry of its table of `level` an address has.
pub(crate) fn index(iova: Iova, level: u32) -> u64 {
    iova.0.checked_shr(shift(level)).unwrap_or(0) & ENTRIES.saturating_sub(1)
}

/// Where an entry is.
pub(crate) fn place(table: Gpa, index: u64) -> Option<u64> {
    table.0.checked_add(index.checked_mul(WORD)?)
}

fn ones(bits: u32) -> u64 {
    1_u64.checked_shl(bits).map_or(u64::MAX, |bytes| bytes.saturating_sub(1))
}

impl Rules {
    /// What an entry of `level` says.
    pub(crate) fn decode(&self, level: u32, raw: u64) -> Entry {
        let mut access = Access::empty();
        access.set(Access::READ, raw & second::READ != 0);
        access.set(Access::WRITE, raw & second::WRITE != 0);
        if access.is_empty() {
            return Entry::Absent;
        }
        let leaf = self.is_leaf(level, raw);
        if raw & self.reserved(level, leaf) != 0 {
            return Entry::Reserved;
        }
        let address = raw & ADDRESS & ones(self.host_bits);
        if leaf {
            Entry::Page(Gpa(address & !mask(level)), access)
        } else {
            Entry::Table(Gpa(address), access)
        }
    }

    fn is_leaf(&self, level: u32, raw: u64) -> bool {
        level == 1 || level <= 3 && raw & second::LARGE != 0
    }

    fn reserved(&self, level: u32, leaf: bool) -> u64 {
        let beyond = ADDRESS & !ones(self.host_bits);
        match leaf {
            true => {
                let inside = mask(level) & !ones(PAGE_BITS);
                let transient = if self.device_tlb { 0 } else { second::TRANSIENT };
                beyond | inside | transient
            }
            false => {
                let large = if level > 3 { second::LARGE } else { 0 };
                beyond | second::SNOOP | second::TRANSIENT | large
            }
        }
    }

    /// Whether an address is one that `paging` can resolve.
    pub(crate) fn reaches(&self, paging: Paging, iova: Iova) -> bool {
        iova <= self.last(paging)
    }

    /// The last address that `paging` resolves.
    pub(crate) fn last(&self, paging: Paging) -> Iova {
        Iova(mask(paging.levels.saturating_add(1)) & ones(self.guest_bits))
    }

    /// The whole leaf that holds `iova`, less the interrupts.
    pub(crate) fn leaf(
        &self,
        memory: &dyn TableMemory,
        paging: Paging,
        iova: Iova,
    ) -> Result<Mapping, Missing> {
        let mut missing = Missing::Absent;
        let leaf = self.descend(memory, paging, iova, |_, raw, entry| match (raw, entry) {
            (None, _) => missing = Missing::Unreadable,
            (_, Entry::Reserved) => missing = Missing::Reserved,
            _ => {}
        });
        if !self.reaches(paging, iova) {
            return Err(Missing::Beyond);
        }
        let (level, gpa, access) = leaf.ok_or(missing)?;
        page(iova, level, gpa, access).and_then(|m| clear_of_interrupts(m, iova)).ok_or(Missing::Absent)
    }

    /// Why a request is blocked; `None` when the tables let it pass now. The first entry on the way that does not allow
    /// it decides.
    pub(crate) fn blocks(
        &self,
        memory: &dyn TableMemory,
        paging: Paging,
        iova: Iova,
        access: Access,
    ) -> Option<Reason> {
        if !self.reaches(paging, iova) {
            return Some(Reason::BEYOND_WIDTH);
        }
        let write = access.contains(Access::WRITE);
        let needs = if write { second::WRITE } else { second::READ };
        let denied = if write { Reason::WRITE } else { Reason::READ };
        let mut reason = None;
        self.descend(memory, paging, iova, |_, raw, entry| {
            let found = match (raw, entry) {
                (None, _) => Some(Reason::PAGING_UNREADABLE),
                (Some(raw), _) if raw & needs == 0 => Some(denied),
                (_, Entry::Reserved) => Some(Reason::PAGING_RESERVED),
                _ => None,
            };
            reason = reason.or(found);
        });
        reason
    }

    /// From the root down to the leaf; `seen` gets each entry that is read. Gives the leaf's level, its target and what
    /// all entries on the way allow.
    fn descend(
        &self,
        memory: &dyn TableMemory,
        paging: Paging,
        iova: Iova,
        mut seen: impl FnMut(u32, Option<u64>, Entry),
    ) -> Option<(u32, Gpa, Access)> {
        let (mut table, mut allowed) = (paging.root, Access::RW);
        for level in (1..=paging.levels.min(LEVELS)).rev() {
            let raw = word(memory, place(table, index(iova, level)));
            let entry = raw.map_or(Entry::Absent, |raw| self.decode(level, raw));
            seen(level, raw, entry);
            match entry {
                Entry::Absent | Entry::Reserved => return None,
                Entry::Table(next, access) => (table, allowed) = (next, allowed & access),
                Entry::Page(gpa, access) => {
                    let access = allowed & access;
                    return (!access.is_empty()).then_some((level, gpa, access));
                }
            }
        }
        None
    }
}

/// The whole page of `level` that holds `iova`.
pub(crate) fn page(iova: Iova, level: u32, gpa: Gpa, access: Access) -> Option<Mapping> {
    let range = IovaRange::new(Iova(iova.0 & !mask(level)), Iova(iova.0 | mask(level)))?;
    Mapping::over(range, gpa, access)
}

/// The part of a page on the side of the interrupts on which `iova` is; none for an address among them. A page may lie
/// over them, and the rest of it is translated.
pub(crate) fn clear_of_interrupts(page: Mapping, iova: Iova) -> Option<Mapping> {
    let (first, last) = INTERRUPTS;
    if page.range.last() < first || page.range.start() > last {
        return Some(page);
    }
    let side = match iova {
        iova if iova < first => IovaRange::new(page.range.start(), Iova(first.0.saturating_sub(1))),
        iova if iova > last => IovaRange::new(Iova(last.0.saturating_add(1)), page.range.last()),
        _ => None,
    };
    page.clip(side?)
}
