//! The container: what is mapped, and the rules by which it changes.

use std::collections::BTreeMap;

use viommu::{Access, Iova, IovaRange};

use super::dirty::{Bitmap, DirtyScope, MAX_DIRTY_BITMAP_BYTES, Tracked};
use crate::errno::Errno;

/// Linux's default of the module parameter `dma_entry_limit`: mappings that one container can hold.
pub const DEFAULT_DMA_ENTRY_LIMIT: u32 = 65535;

bitflags::bitflags! {
    /// Flags of `MAP_DMA`, bit for bit. A bit not named here is EINVAL.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct MapFlags: u32 {
        /// The device may read.
        const READ = 1;
        /// The device may write.
        const WRITE = 2;
        /// Gives an invalidated mapping its new host address; excludes the other two.
        const VADDR = 4;
    }
}

bitflags::bitflags! {
    /// Flags of `UNMAP_DMA`, bit for bit. A bit not named here is EINVAL.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct UnmapFlags: u32 {
        /// Reports the dirty pages of what goes; excludes the other two.
        const GET_DIRTY_BITMAP = 1;
        /// Everything goes; address and size must be 0.
        const ALL = 2;
        /// The mappings stay, their host addresses become invalid.
        const VADDR = 4;
    }
}

impl From<Access> for MapFlags {
    fn from(access: Access) -> Self {
        let mut flags = Self::empty();
        flags.set(Self::READ, access.contains(Access::READ));
        flags.set(Self::WRITE, access.contains(Access::WRITE));
        flags
    }
}

/// The argument of `MAP_DMA`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MapDma {
    /// What the device may do, or VADDR.
    pub flags: MapFlags,
    /// The host's address of the first byte.
    pub vaddr: u64,
    /// The device's address of the first byte.
    pub iova: u64,
    /// Bytes. 2^64 of them cannot be said.
    pub size: u64,
}

/// The argument of `UNMAP_DMA`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct UnmapDma {
    /// What to do beyond, or instead of, removing.
    pub flags: UnmapFlags,
    /// The first byte.
    pub iova: u64,
    /// Bytes; the kernel rewrites it with what was removed, which is the call's result here.
    pub size: u64,
}

/// Host memory that the container can pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRange {
    /// The first byte.
    pub start: u64,
    /// The last byte, inclusive.
    pub last: u64,
    /// Whether it may be written.
    pub writable: bool,
}

/// Which kernel is followed, where two differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Release {
    /// Linux 6.12: ranges that pass 2^64 are EINVAL, and a dirty bitmap must end below 2^64-1.
    #[default]
    Linux6_12,
    /// Linux 7.3: ranges that pass 2^64 are EOVERFLOW, in `MAP_DMA` and `DIRTY_PAGES` whatever else
    /// is wrong with them.
    Linux7_3,
}

/// The host that the container stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bit n set: pages of 2^n bytes. Sizes below 4 KiB are shown as 4 KiB, as the kernel does.
    pub pgsizes: u64,
    /// Where mappings may lie; every one inside a single range. Empty: anywhere, as with mediated devices only.
    pub iova_ranges: Vec<IovaRange>,
    /// Mappings that can be held.
    pub dma_entry_limit: u32,
    /// Bytes that may be pinned (RLIMIT_MEMLOCK without CAP_IPC_LOCK); `None`: no limit.
    pub locked_limit: Option<u64>,
    /// The host memory that there is; `None`: every address, writable.
    pub memory: Option<Vec<HostRange>>,
    /// Which pages are reported dirty.
    pub dirty: DirtyScope,
    /// Whether a mediated device is in the container: its host addresses cannot be invalidated then.
    pub mediated: bool,
    /// Whose errors it gives.
    pub release: Release,
}

impl Default for Config {
    /// 4 KiB pages and all larger ones, every address, 65535 entries, no memory limit.
    fn default() -> Self {
        Self {
            pgsizes: !0xfff,
            iova_ranges: Vec::new(),
            dma_entry_limit: DEFAULT_DMA_ENTRY_LIMIT,
            locked_limit: None,
            memory: None,
            dirty: DirtyScope::AllPages,
            mediated: false,
            release: Release::default(),
        }
    }
}

impl Config {
    /// As an x86 host with 48 address bits shows itself: 4 KiB, 2 MiB and 1 GiB pages, a hole where interrupts go.
    #[must_use]
    pub fn x86_host() -> Self {
        let ranges = [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 48) - 1)];
        Self {
            pgsizes: 1 << 12 | 1 << 21 | 1 << 30,
            iova_ranges: ranges.iter().filter_map(|&(a, b)| IovaRange::new(Iova(a), Iova(b))).collect(),
            ..Self::default()
        }
    }
}

/// What `GET_INFO` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bit n set: pages of 2^n bytes.
    pub pgsizes: u64,
    /// The capability IOVA_RANGE; empty when it is missing.
    pub iova_ranges: Vec<IovaRange>,
    /// The capability DMA_AVAIL: mappings that can still be made.
    pub dma_avail: u32,
    /// The only page size of dirty bitmaps (capability MIGRATION).
    pub dirty_pgsize: u64,
    /// The largest dirty bitmap in bytes (capability MIGRATION).
    pub max_dirty_bitmap_size: u64,
}

/// One mapping that the container holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dma {
    /// The device's addresses.
    pub range: IovaRange,
    /// The host's address of the first byte.
    pub vaddr: u64,
    /// What the device may do.
    pub access: Access,
    /// Whether the host address was invalidated and not given anew.
    pub vaddr_invalid: bool,
}

/// What an access of the device meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// This host address.
    Host(u64),
    /// A mapping that does not allow it.
    Denied,
    /// No mapping, or a container that was detached.
    Nothing,
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) size: u64,
    pub(super) vaddr: u64,
    pub(super) access: Access,
    pub(super) vaddr_invalid: bool,
    pub(super) written: Tracked,
}

impl Entry {
    /// The last byte of an entry at `iova`.
    pub(super) fn last(&self, iova: u64) -> u64 {
        iova.saturating_add(self.size.saturating_sub(1)) // exact: MAP_DMA let nothing in that wraps
    }
}

/// A VFIO type1 v2 container. Its calls change nothing when they fail.
#[derive(Clone, Debug)]
pub struct Container {
    config: Config,
    pub(super) entries: BTreeMap<u64, Entry>,
    dma_avail: u32,
    locked: u64,
    pub(super) tracking: bool,
    detached: bool,
}

impl Container {
    /// An empty container of a host that is as `config` says.
    ///
    /// # Errors
    /// EINVAL without any page size, or with IOVA ranges that overlap.
    pub fn new(mut config: Config) -> Result<Self, Errno> {
        if config.pgsizes & 0xfff != 0 {
            config.pgsizes = config.pgsizes & !0xfff | 0x1000;
        }
        config.iova_ranges.sort();
        let disjoint = config.iova_ranges.windows(2).all(|w| !w[0].overlaps(w[1]));
        if config.pgsizes == 0 || !disjoint {
            return Err(Errno::EINVAL);
        }
        Ok(Self {
            dma_avail: config.dma_entry_limit,
            config,
            entries: BTreeMap::new(),
            locked: 0,
            tracking: false,
            detached: false,
        })
    }

    /// The smallest page, in bytes.
    #[must_use]
    pub fn pgsize(&self) -> u64 {
        1 << self.config.pgsizes.trailing_zeros().min(63)
    }

    /// The host that the container stands for.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// `GET_INFO`.
    ///
    /// # Errors
    /// EBADFD once detached.
    pub fn info(&self) -> Result<Info, Errno> {
        self.attached()?;
        Ok(Info {
            pgsizes: self.config.pgsizes,
            iova_ranges: self.config.iova_ranges.clone(),
            dma_avail: self.dma_avail,
            dirty_pgsize: self.pgsize(),
            max_dirty_bitmap_size: MAX_DIRTY_BITMAP_BYTES,
        })
    }

    /// `MAP_DMA`: holds one more mapping, or gives an invalidated one its new host address.
    ///
    /// # Errors
    /// The first that applies, in this order: EBADFD detached; EINVAL flags, size 0, alignment, wrap; with VADDR:
    /// ENOENT nothing there, EINVAL not exactly one invalidated mapping; EEXIST overlap; ENOSPC no entry left; EINVAL
    /// not inside one IOVA range; EFAULT no such host memory, ENOMEM too much locked (whichever page is first); EINVAL
    /// more pages than a dirty bitmap can have while tracking is on.
    pub fn map_dma(&mut self, map: MapDma) -> Result<(), Errno> {
        self.attached()?;
        let MapDma { flags, vaddr, iova, size } = map;
        let set_vaddr = flags.contains(MapFlags::VADDR);
        let access = access_of(flags);
        if !MapFlags::all().contains(flags) {
            return Err(Errno::EINVAL);
        }
        self.check_wrap(iova, size)?;
        self.check_wrap(vaddr, size)?;
        if set_vaddr != access.is_empty() || vaddr & (self.pgsize() - 1) != 0 {
            return Err(Errno::EINVAL);
        }
        let last = self.checked_last(iova, size)?;
        let there = self.entries.range_mut(..=last).next_back().filter(|(at, e)| e.last(**at) >= iova);
        if set_vaddr {
            let (at, entry) = there.ok_or(Errno::ENOENT)?;
            if !entry.vaddr_invalid || *at != iova || entry.size != size {
                return Err(Errno::EINVAL);
            }
            entry.vaddr = vaddr;
            entry.vaddr_invalid = false;
            return Ok(());
        }
        if there.is_some() {
            return Err(Errno::EEXIST);
        }
        if self.dma_avail == 0 {
            return Err(Errno::ENOSPC);
        }
        if !self.in_window(iova, last) {
            return Err(Errno::EINVAL);
        }
        self.pin(vaddr, size, access)?;
        if self.tracking && !self.fits_a_bitmap(size) {
            return Err(Errno::EINVAL);
        }
        self.dma_avail -= 1;
        self.locked = self.locked.saturating_add(size);
        self.entries
            .insert(iova, Entry { size, vaddr, access, vaddr_invalid: false, written: Tracked::default() });
        Ok(())
    }

    /// `UNMAP_DMA`: removes every mapping inside the range, or invalidates their host addresses. Gives the bytes that
    /// were removed or invalidated (modulo 2^64, as the kernel counts); none is no error.
    ///
    /// `bitmap` is looked at with GET_DIRTY_BITMAP only, which needs it.
    ///
    /// # Errors
    /// EBADFD detached; EBUSY for VADDR with mediated devices; else EINVAL: flags, alignment, size 0 or wrap (ALL: an
    /// address or size at all), a mapping that sticks out of the range, VADDR over what is invalid already, dirty
    /// pages with tracking off or a bitmap that does not fit.
    pub fn unmap_dma(&mut self, unmap: UnmapDma, bitmap: Option<&mut Bitmap>) -> Result<u64, Errno> {
        self.attached()?;
        let UnmapDma { flags, iova, size } = unmap;
        let (all, invalidate) = (flags.contains(UnmapFlags::ALL), flags.contains(UnmapFlags::VADDR));
        let get_dirty = flags.contains(UnmapFlags::GET_DIRTY_BITMAP);
        if !UnmapFlags::all().contains(flags) || get_dirty && (all || invalidate) {
            return Err(Errno::EINVAL);
        }
        let bitmap = match bitmap {
            _ if !get_dirty => None,
            Some(bitmap) if bitmap.holds(size) => Some(bitmap),
            Some(_) | None => return Err(Errno::EINVAL),
        };
        if invalidate && self.config.mediated {
            return Err(Errno::EBUSY);
        }
        let last = match all {
            true if iova == 0 && size == 0 => u64::MAX,
            true => return Err(Errno::EINVAL),
            false => self.checked_last(iova, size)?,
        };
        if let Some(bitmap) = &bitmap
            && (!self.tracking || bitmap.pgsize != self.pgsize())
        {
            return Err(Errno::EINVAL);
        }
        if !all && self.cuts(iova, last) {
            return Err(Errno::EINVAL);
        }
        if invalidate {
            return self.invalidate_vaddr(iova, last);
        }
        if let Some(bitmap) = bitmap {
            self.report(iova, last, bitmap);
        }
        let mut removed = 0_u64;
        while let Some((&at, entry)) = self.entries.range(iova..=last).next() {
            removed = removed.wrapping_add(entry.size);
            self.locked = self.locked.saturating_sub(entry.size);
            self.dma_avail = self.dma_avail.saturating_add(1);
            self.entries.remove(&at);
        }
        Ok(removed)
    }

    /// What an access of the device at `iova` meets. WRITE without READ is taken at its word, though hardware may
    /// allow the read as well.
    #[must_use]
    pub fn lookup(&self, iova: Iova, access: Access) -> Reached {
        let entry = self.entries.range(..=iova.0).next_back();
        match entry.filter(|(at, e)| iova.0 <= e.last(**at)) {
            None => Reached::Nothing,
            Some((_, e)) if !e.access.contains(access) => Reached::Denied,
            Some((at, e)) => Reached::Host(e.vaddr.wrapping_add(iova.0 - at)),
        }
    }

    /// Every mapping, in the order of the device's addresses.
    pub fn iter(&self) -> impl Iterator<Item = Dma> + '_ {
        self.entries.iter().filter_map(|(&at, entry)| dma(at, entry))
    }

    /// Every mapping that shares an address with `range`, in order.
    pub fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = Dma> + '_ {
        let (start, last) = (range.start().0, range.last().0);
        let before = self.entries.range(..start).next_back().filter(|(at, e)| e.last(**at) >= start);
        before.into_iter().chain(self.entries.range(start..=last)).filter_map(|(&at, entry)| dma(at, entry))
    }

    /// Mappings held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Mappings that can still be made.
    #[must_use]
    pub fn dma_avail(&self) -> u32 {
        self.dma_avail
    }

    /// Takes the container from its device, as closing the group does: every mapping goes, the device reaches
    /// nothing, and every later call is EBADFD.
    pub fn detach(&mut self) {
        self.reset();
        self.detached = true;
    }

    /// A fresh, empty container for the same host, attached.
    pub fn reset(&mut self) {
        self.entries.clear();
        self.dma_avail = self.config.dma_entry_limit;
        self.locked = 0;
        self.tracking = false;
        self.detached = false;
    }

    /// Whether it was detached.
    #[must_use]
    pub fn is_detached(&self) -> bool {
        self.detached
    }

    pub(super) fn attached(&self) -> Result<(), Errno> {
        if self.detached { Err(Errno::EBADFD) } else { Ok(()) }
    }

    /// Whether `size` bytes at `start` pass 2^64; none do not.
    pub(super) fn check_wrap(&self, start: u64, size: u64) -> Result<(), Errno> {
        if start.checked_add(size.saturating_sub(1)).is_some() {
            return Ok(());
        }
        Err(match self.config.release {
            Release::Linux6_12 => Errno::EINVAL,
            Release::Linux7_3 => Errno::EOVERFLOW,
        })
    }

    /// The last byte of `size` bytes at `iova`; a wrap is an error, EINVAL are none and a bad alignment.
    pub(super) fn checked_last(&self, iova: u64, size: u64) -> Result<u64, Errno> {
        let misaligned = (iova | size) & (self.pgsize() - 1) != 0;
        let more = size.checked_sub(1).filter(|_| !misaligned).ok_or(Errno::EINVAL)?;
        self.check_wrap(iova, size)?;
        Ok(iova.saturating_add(more)) // exact: just looked at
    }

    /// Whether the first or the last byte falls inside a mapping that sticks out.
    pub(super) fn cuts(&self, start: u64, last: u64) -> bool {
        let reaches_in = self.entries.range(..start).next_back().is_some_and(|(at, e)| e.last(*at) >= start);
        let reaches_out = self.entries.range(..=last).next_back().is_some_and(|(at, e)| e.last(*at) > last);
        reaches_in || reaches_out
    }

    fn in_window(&self, start: u64, last: u64) -> bool {
        let ranges = &self.config.iova_ranges;
        ranges.is_empty() || ranges.iter().any(|r| r.start().0 <= start && last <= r.last().0)
    }

    /// Pins page after page: what is met first, the end of the memory or that of the allowance, is the error.
    fn pin(&self, vaddr: u64, size: u64, access: Access) -> Result<(), Errno> {
        let there = self.config.memory.as_ref().map_or(size, |memory| backed(memory, vaddr, size, access));
        let allowed = self.config.locked_limit.map_or(size, |limit| limit.saturating_sub(self.locked));
        let allowed = allowed & !(self.pgsize() - 1);
        if allowed < size && allowed < there {
            return Err(Errno::ENOMEM);
        }
        if there < size { Err(Errno::EFAULT) } else { Ok(()) }
    }

    fn invalidate_vaddr(&mut self, iova: u64, last: u64) -> Result<u64, Errno> {
        if self.entries.range(iova..=last).any(|(_, e)| e.vaddr_invalid) {
            return Err(Errno::EINVAL);
        }
        let mut bytes = 0_u64;
        for (_, entry) in self.entries.range_mut(iova..=last) {
            entry.vaddr_invalid = true;
            bytes = bytes.wrapping_add(entry.size);
        }
        Ok(bytes)
    }
}

fn access_of(flags: MapFlags) -> Access {
    let mut access = Access::empty();
    access.set(Access::READ, flags.contains(MapFlags::READ));
    access.set(Access::WRITE, flags.contains(MapFlags::WRITE));
    access
}

fn dma(at: u64, entry: &Entry) -> Option<Dma> {
    let Entry { vaddr, access, vaddr_invalid, .. } = *entry;
    let range = IovaRange::from_len(Iova(at), entry.size)?;
    Some(Dma { range, vaddr, access, vaddr_invalid })
}

/// How many of the `size` bytes at `vaddr` are memory that `access` can have, up to the first that is not.
fn backed(memory: &[HostRange], vaddr: u64, size: u64, access: Access) -> u64 {
    let mut there = 0;
    while there < size {
        let at = vaddr.saturating_add(there);
        let fits =
            |r: &&HostRange| r.start <= at && at <= r.last && (r.writable || !access.contains(Access::WRITE));
        let Some(range) = memory.iter().find(fits) else { break };
        there = there.saturating_add(range.last - at).saturating_add(1);
    }
    there.min(size)
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
