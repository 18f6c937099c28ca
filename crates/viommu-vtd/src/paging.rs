//! Page tables: what an entry says, and the way from an address to its leaf.

use viommu::{Access, Gpa, Iova, IovaRange, Mapping};

use crate::memory::{Marked, TableMemory, WORD, word};
use crate::spec::fault::Reason;
use crate::spec::table::{ADDRESS, first, second};

/// Bits of an address inside the smallest page.
pub(crate) const PAGE_BITS: u32 = 12;
/// Bits of an address that a table resolves.
const TABLE_BITS: u32 = 9;
/// Entries of a table.
pub(crate) const ENTRIES: u64 = 512;
/// The most levels of tables.
pub(crate) const LEVELS: u32 = 5;
/// How often a walk begins again, since the driver has changed what it was about to mark.
const TRIES: u32 = 8;

/// Where writes are interrupts: no request there is translated, whatever the tables say, and nothing is translated to it.
pub(crate) const INTERRUPTS: (Iova, Iova) = (Iova(0xfee0_0000), Iova(0xfeef_ffff));

/// What entries look like, and which reasons their faults have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Format {
    /// The second stage, named by a context entry of legacy mode.
    Legacy,
    /// The second stage, named by a PASID entry.
    Second,
    /// The first stage.
    First,
}

/// One set of page tables, as some requests see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Paging {
    pub(crate) root: Gpa,
    /// 3, 4 or 5.
    pub(crate) levels: u32,
    pub(crate) format: Format,
    /// The requests have a PASID: [`INTERRUPTS`] are ordinary addresses for them.
    pub(crate) has_pasid: bool,
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

/// An entry on the way to a leaf.
#[derive(Clone, Copy)]
struct Seen {
    at: Option<u64>,
    /// `None`: it cannot be read.
    raw: Option<u64>,
    entry: Entry,
    is_root: bool,
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

/// A mask of the lowest bits.
pub(crate) fn ones(bits: u32) -> u64 {
    1_u64.checked_shl(bits).map_or(u64::MAX, |bytes| bytes.saturating_sub(1))
}

impl Rules {
    /// What an entry of `level` says.
    pub(crate) fn decode(&self, format: Format, level: u32, raw: u64) -> Entry {
        let mut access = Access::empty();
        match format {
            Format::First => {
                if raw & first::PRESENT == 0 {
                    return Entry::Absent;
                }
                // Every request is a user's: what is the supervisors' is not for it.
                access.set(Access::READ, raw & first::USER != 0);
                access.set(Access::WRITE, raw & first::USER != 0 && raw & first::WRITE != 0);
            }
            Format::Legacy | Format::Second => {
                access.set(Access::READ, raw & second::READ != 0);
                access.set(Access::WRITE, raw & second::WRITE != 0);
                if access.is_empty() {
                    return Entry::Absent;
                }
            }
        }
        // The bit is in the same place in both.
        let is_leaf = level == 1 || level <= 3 && raw & second::LARGE != 0;
        if raw & self.reserved(format, level, is_leaf) != 0 {
            return Entry::Reserved;
        }
        let address = raw & ADDRESS & ones(self.host_bits);
        if is_leaf {
            Entry::Page(Gpa(address & !mask(level)), access)
        } else {
            Entry::Table(Gpa(address), access)
        }
    }

    fn reserved(&self, format: Format, level: u32, is_leaf: bool) -> u64 {
        let beyond = ADDRESS & !ones(self.host_bits);
        let inside = mask(level) & !ones(PAGE_BITS);
        let large = if level > 3 { second::LARGE } else { 0 };
        match (format, is_leaf) {
            // The bits above the address are the driver's, and execute-disable: nothing is executed.
            (Format::First, true) => beyond | inside & !first::LARGE_KIND,
            (Format::First, false) => beyond | large,
            (Format::Legacy | Format::Second, true) => {
                let transient = if self.device_tlb { 0 } else { second::TRANSIENT };
                beyond | inside | transient
            }
            (Format::Legacy | Format::Second, false) => beyond | second::SNOOP | second::TRANSIENT | large,
        }
    }

    /// Whether an address is one that `paging` can resolve.
    fn reaches(&self, paging: Paging, iova: Iova) -> bool {
        match paging.format {
            Format::Legacy | Format::Second => iova <= self.last(paging),
            Format::First => {
                // Canonical: all bits above are as the highest that is resolved.
                let highest = shift(paging.levels.saturating_add(1)).saturating_sub(1);
                let above = iova.0.checked_shr(highest).unwrap_or(0);
                above == 0 || above == u64::MAX.checked_shr(highest).unwrap_or(0)
            }
        }
    }

    /// The last address that a second stage resolves.
    pub(crate) fn last(&self, paging: Paging) -> Iova {
        Iova(mask(paging.levels.saturating_add(1)) & ones(self.guest_bits))
    }

    /// The part of the leaf that holds `iova` to which devices have access; a first-stage leaf, and what leads to it, is
    /// marked as used.
    pub(crate) fn leaf(&self, memory: &dyn TableMemory, paging: Paging, iova: Iova) -> Option<Mapping> {
        if !self.reaches(paging, iova) {
            return None;
        }
        for _ in 0..TRIES {
            let mut way = [None; 5];
            let mut next = way.iter_mut();
            let (level, gpa, access) = self.descend(memory, paging, iova, |seen| {
                if let Some(place) = next.next() {
                    *place = Some(seen);
                }
            })?;
            let whole = page(iova, level, gpa, access)?;
            let part = usable(whole, iova, paging.has_pasid).ok()?;
            if paging.format != Format::First {
                return Some(part);
            }
            match mark(memory, &way) {
                Marked::Done => return Some(part),
                Marked::Changed => {}
                Marked::Nowhere => return None,
            }
        }
        None
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
        let is_write = access.contains(Access::WRITE);
        let reasons = Reasons::of(paging.format);
        if !self.reaches(paging, iova) {
            return Some(reasons.beyond);
        }
        let mut reason = None;
        let leaf = self.descend(memory, paging, iova, |seen| {
            reason = reason.or_else(|| why(paging.format, is_write, &seen));
        });
        let to_interrupts = || {
            let (level, gpa, access) = leaf?;
            let whole = page(iova, level, gpa, access)?;
            usable(whole, iova, paging.has_pasid).err().map(|_| reasons.interrupts)
        };
        reason.or_else(to_interrupts)
    }

    /// What a request that is not permitted is recorded with.
    pub(crate) fn denied(format: Format, access: Access) -> Reason {
        let reasons = Reasons::of(format);
        if access.contains(Access::WRITE) { reasons.write } else { reasons.read }
    }

    /// From the root down to the leaf; `seen` gets each entry that is read. Gives the leaf's level, its target and what
    /// all entries on the way allow.
    fn descend(
        &self,
        memory: &dyn TableMemory,
        paging: Paging,
        iova: Iova,
        mut seen: impl FnMut(Seen),
    ) -> Option<(u32, Gpa, Access)> {
        let (mut table, mut allowed) = (paging.root, Access::RW);
        let levels = paging.levels.min(LEVELS);
        for level in (1..=levels).rev() {
            let at = place(table, index(iova, level));
            let raw = word(memory, at);
            let entry = raw.map_or(Entry::Absent, |raw| self.decode(paging.format, level, raw));
            seen(Seen { at, raw, entry, is_root: level == levels });
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

/// Sets the accessed bits of the entries on the way, and the dirty bit of a leaf that may be written through all of them:
/// before the translation is used, which may be for a write.
fn mark(memory: &dyn TableMemory, way: &[Option<Seen>; 5]) -> Marked {
    let entries = || way.iter().flatten();
    let may_write = entries().all(|seen| {
        matches!(seen.entry, Entry::Table(_, access) | Entry::Page(_, access) if access.contains(Access::WRITE))
    });
    for Seen { at, raw, entry, .. } in entries() {
        let (Some(at), Some(raw)) = (at, raw) else { return Marked::Nowhere };
        let is_dirty = may_write && matches!(entry, Entry::Page(..));
        let marked = raw | first::ACCESSED | if is_dirty { first::DIRTY } else { 0 };
        if marked == *raw {
            continue;
        }
        match memory.exchange(Gpa(*at), *raw, marked) {
            Marked::Done => {}
            other => return other,
        }
    }
    Marked::Done
}

/// Why an entry does not let a request pass.
fn why(format: Format, is_write: bool, seen: &Seen) -> Option<Reason> {
    let reasons = Reasons::of(format);
    let Some(raw) = seen.raw else {
        return Some(if seen.is_root { reasons.root_unreadable } else { reasons.unreadable });
    };
    let denied = if is_write { reasons.write } else { reasons.read };
    match format {
        Format::Legacy | Format::Second => {
            let needs = if is_write { second::WRITE } else { second::READ };
            if format == Format::Second && seen.entry == Entry::Absent {
                return Some(Reason::SECOND_ABSENT);
            }
            if raw & needs == 0 {
                return Some(denied);
            }
        }
        Format::First => {
            if raw & first::PRESENT == 0 {
                return Some(Reason::FIRST_ABSENT);
            }
            if raw & first::USER == 0 {
                return Some(Reason::SUPERVISOR);
            }
            if is_write && raw & first::WRITE == 0 {
                return Some(denied);
            }
        }
    }
    (seen.entry == Entry::Reserved).then_some(reasons.reserved)
}

/// The reasons that tables of a format have for the same thing.
struct Reasons {
    beyond: Reason,
    root_unreadable: Reason,
    unreadable: Reason,
    reserved: Reason,
    read: Reason,
    write: Reason,
    interrupts: Reason,
}

impl Reasons {
    fn of(format: Format) -> Self {
        match format {
            Format::Legacy => Self {
                beyond: Reason::BEYOND_WIDTH,
                // The context entry names it, and is wrong.
                root_unreadable: Reason::CONTEXT_INVALID,
                unreadable: Reason::PAGING_UNREADABLE,
                reserved: Reason::PAGING_RESERVED,
                read: Reason::READ,
                write: Reason::WRITE,
                interrupts: Reason::TARGET_INTERRUPTS,
            },
            Format::Second => Self {
                beyond: Reason::SCALABLE_BEYOND_WIDTH,
                root_unreadable: Reason::SECOND_ROOT_UNREADABLE,
                unreadable: Reason::SECOND_UNREADABLE,
                reserved: Reason::SECOND_RESERVED,
                read: Reason::SCALABLE_READ,
                write: Reason::SCALABLE_WRITE,
                interrupts: Reason::SCALABLE_TARGET_INTERRUPTS,
            },
            Format::First => Self {
                beyond: Reason::NOT_CANONICAL,
                root_unreadable: Reason::FIRST_ROOT_UNREADABLE,
                unreadable: Reason::FIRST_UNREADABLE,
                reserved: Reason::FIRST_RESERVED,
                read: Reason::SCALABLE_READ,
                write: Reason::SCALABLE_WRITE,
                interrupts: Reason::SCALABLE_TARGET_INTERRUPTS,
            },
        }
    }
}

/// The whole page of `level` that holds `iova`.
pub(crate) fn page(iova: Iova, level: u32, gpa: Gpa, access: Access) -> Option<Mapping> {
    let range = IovaRange::new(Iova(iova.0 & !mask(level)), Iova(iova.0 | mask(level)))?;
    Mapping::over(range, gpa, access)
}

/// The part of a page around `iova` that is translated: neither over the interrupts, unless the requests have a PASID, nor
/// to them. The error says up to where, inclusive, nothing is.
pub(crate) fn usable(page: Mapping, iova: Iova, has_pasid: bool) -> Result<Mapping, Iova> {
    let page = if has_pasid { page } else { cut(page, iova, INTERRUPTS)? };
    let (first, last) = INTERRUPTS;
    let bytes = page.range.last().0.saturating_sub(page.range.start().0);
    if page.gpa.0 > last.0 || page.gpa.0.saturating_add(bytes) < first.0 {
        return Ok(page);
    }
    let from = page.range.start().0.saturating_add(first.0.saturating_sub(page.gpa.0));
    let to = page.range.start().0.saturating_add(last.0.saturating_sub(page.gpa.0));
    cut(page, iova, (Iova(from), Iova(to)))
}

/// The part of a page on the side of `hole` (inclusive) on which `iova` is.
fn cut(page: Mapping, iova: Iova, hole: (Iova, Iova)) -> Result<Mapping, Iova> {
    let (first, last) = hole;
    if page.range.last() < first || page.range.start() > last {
        return Ok(page);
    }
    let side = match iova {
        iova if iova < first => IovaRange::new(page.range.start(), Iova(first.0.saturating_sub(1))),
        iova if iova > last => IovaRange::new(Iova(last.0.saturating_add(1)), page.range.last()),
        _ => None,
    };
    side.and_then(|side| page.clip(side)).ok_or_else(|| last.min(page.range.last()))
}
