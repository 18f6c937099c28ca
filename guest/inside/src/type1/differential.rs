//! The same random calls, right and wrong ones, for the kernel's container and the one in software: the same errors, the
//! same numbers of bytes, the same bitmaps.

use std::{error::Error, fmt};

use viommu::{Access, Iova, IovaRange};
use viommu_vfio::{
    Errno,
    software::{
        Bitmap, Config, Container, HostRange, MapDma, MapFlags, Reached, Release, UnmapDma, UnmapFlags,
    },
    type1::Info,
};

use super::{
    PAGE,
    host::Guarded,
    random::Random,
    raw::{self, Raw},
};

/// How often each kind of call was made, and how often it failed.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) maps: [u64; 2],
    pub(super) unmaps: [u64; 2],
    pub(super) dirty: [u64; 2],
    pub(super) errors: std::collections::BTreeMap<i32, u64>,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [("maps", self.maps), ("unmaps", self.unmaps), ("on dirty pages", self.dirty)];
        for (name, [made, failed]) in kinds {
            write!(f, "{made} {name}, {failed} of them failed; ")?;
        }
        let errors = self.errors.iter();
        let errors: Vec<String> =
            errors.map(|(errno, count)| format!("{} {count} times", Errno::from_raw(*errno))).collect();
        f.write_str(&errors.join(", "))
    }
}

impl Tally {
    fn note<T>(&mut self, kind: fn(&mut Tally) -> &mut [u64; 2], outcome: &Result<T, Errno>) {
        kind(self)[0] += 1;
        if let Err(errno) = outcome {
            kind(self)[1] += 1;
            *self.errors.entry(errno.raw()).or_default() += 1;
        }
    }
}

/// Makes `steps` calls of both. `locked_limit`: bytes that this thread may have pinned, if there is a limit.
///
/// # Errors
///
/// The first call that the two answer differently.
pub(super) fn run(
    raw: &Raw,
    info: &Info,
    (steps, seed): (u64, u64),
    locked_limit: Option<u64>,
) -> Result<Tally, Box<dyn Error>> {
    let (memory, read_only) = (Guarded::new(64 * PAGE, true)?, Guarded::new(8 * PAGE, false)?);
    let entries = info.entries.ok_or("the kernel does not say how many entries are left")?;
    let range = |start: u64, pages: u64, writable| HostRange {
        start,
        last: start + (pages * PAGE as u64 - 1),
        writable,
    };
    let mut container = Container::new(Config {
        pgsizes: info.page_sizes,
        iova_ranges: info.apertures.clone(),
        dma_entry_limit: entries,
        locked_limit,
        memory: Some(vec![range(memory.address(), 64, true), range(read_only.address(), 8, false)]),
        release: release()?,
        ..Config::default()
    })?;
    let mut random = Random(seed);
    let places =
        Places { vaddrs: [memory.address(), read_only.address()], borders: borders(&info.apertures) };
    let mut tally = Tally::default();
    for step in 0..steps {
        let differ = |what: &str, kernel: &dyn fmt::Debug, ours: &dyn fmt::Debug| -> Box<dyn Error> {
            format!("call {step}, {what}: the kernel says {kernel:?}, the software container {ours:?}").into()
        };
        match random.below(16) {
            0..8 => {
                let map = places.map(&mut random);
                if is_lost(&container, map.iova, map.size) {
                    continue;
                }
                // SAFETY: the host's addresses are of memory that is there for devices, or nowhere.
                let kernel = unsafe { raw.map(&map) };
                let ours = container.map_dma(map);
                tally.note(|tally| &mut tally.maps, &kernel);
                if kernel != ours {
                    return Err(differ(&format!("{map:x?}"), &kernel, &ours));
                }
            }
            8..14 => {
                let (unmap, bitmap) = places.unmap(&mut random);
                if is_lost(&container, unmap.iova, unmap.size) {
                    continue;
                }
                let (mut theirs, mut mine) = (bitmap.clone(), bitmap);
                let mapped = theirs.as_ref().map(|bitmap| mapped(&container, unmap.iova, unmap.size, bitmap));
                let kernel = raw.unmap(&unmap, theirs.as_mut());
                let ours = container.unmap_dma(unmap, mine.as_mut());
                tally.note(|tally| &mut tally.unmaps, &kernel);
                if let (Some(mapped), Some(theirs)) = (mapped, &mut theirs) {
                    masked(theirs, &mapped);
                }
                if (&kernel, &theirs) != (&ours, &mine) {
                    return Err(differ(&format!("{unmap:x?}"), &(kernel, theirs), &(ours, mine)));
                }
            }
            kind => {
                let (kernel, ours) = match (kind, random.below(4)) {
                    (14, 0) => (raw.track(raw::STOP), container.dirty_stop()),
                    (14, _) => (raw.track(raw::START), container.dirty_start()),
                    _ => {
                        let (iova, size) = (places.iova(&mut random), places.size(&mut random));
                        let mut theirs = bitmap_for(&mut random, size);
                        let mut mine = theirs.clone();
                        let mapped = mapped(&container, iova, size, &theirs);
                        let kernel = raw.dirty(iova, size, &mut theirs);
                        let ours = container.dirty_bitmap(iova, size, &mut mine);
                        masked(&mut theirs, &mapped);
                        if theirs != mine {
                            return Err(differ("GET_BITMAP", &theirs, &mine));
                        }
                        (kernel, ours)
                    }
                };
                tally.note(|tally| &mut tally.dirty, &kernel);
                if kernel != ours {
                    return Err(differ("DIRTY_PAGES", &kernel, &ours));
                }
            }
        }
    }
    let everything = UnmapDma { flags: UnmapFlags::ALL, iova: 0, size: 0 };
    let (kernel, ours) = (raw.unmap(&everything, None), container.unmap_dma(everything, None));
    if kernel != ours {
        return Err(format!(
            "at the end: the kernel had {kernel:x?} bytes, the software container {ours:x?}"
        )
        .into());
    }
    let _ = (raw.track(raw::STOP), container.dirty_stop());
    Ok(tally)
}

/// Linux 6.12 does not find what it maps up to 2^64-1, and finds nothing in a range that ends there.
fn is_lost(container: &Container, iova: u64, size: u64) -> bool {
    let release = container.config().release;
    release == Release::Linux6_12 && size != 0 && iova.wrapping_add(size) == 0
}

/// A bit for each page of `size` bytes that is mapped.
fn mapped(container: &Container, iova: u64, size: u64, bitmap: &Bitmap) -> Vec<u64> {
    let is_mapped = |page: u64| {
        if page >= size / bitmap.pgsize {
            return false;
        }
        let at = Iova(iova.wrapping_add(page.wrapping_mul(bitmap.pgsize)));
        container.lookup(at, Access::empty()) != Reached::Nothing
    };
    let word = |at: u64| (0..64).filter(|bit| is_mapped(at * 64 + bit)).fold(0, |word, bit| word | 1 << bit);
    (0..bitmap.words.len() as u64).map(word).collect()
}

/// Leaves the bits of mapped pages. The kernel sets others too, behind a mapping in the word where it ends, if that
/// mapping was asked for before by a range that began elsewhere: it shifts the bits of its own and does not clear them
/// all.
fn masked(bitmap: &mut Bitmap, mapped: &[u64]) {
    bitmap.words.iter_mut().zip(mapped).for_each(|(word, mapped)| *word &= mapped);
}

/// The kernel that runs, as far as there are two kinds.
fn release() -> Result<Release, Box<dyn Error>> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let major: u32 = release.split('.').next().unwrap_or_default().parse()?;
    Ok(if major < 7 { Release::Linux6_12 } else { Release::Linux7_3 })
}

/// Where the windows begin and end.
fn borders(apertures: &[IovaRange]) -> Vec<u64> {
    apertures.iter().flat_map(|range| [range.start().0, range.last().0.wrapping_add(1)]).collect()
}

/// From where arguments are taken.
struct Places {
    vaddrs: [u64; 2],
    borders: Vec<u64>,
}

impl Places {
    fn iova(&self, random: &mut Random) -> u64 {
        let page = PAGE as u64;
        let at = match random.below(16) {
            0 => random.of(&self.borders).wrapping_sub(page * random.below(4)),
            1 => u64::MAX - (page * random.below(3) + (page - 1)),
            _ => page * random.below(160),
        };
        // Some are off.
        if random.one_in(24) { at.wrapping_add(random.of(&[1, 0x800])) } else { at }
    }

    fn size(&self, random: &mut Random) -> u64 {
        let page = PAGE as u64;
        match random.below(24) {
            0 => 0,
            1 => page / 2,
            2 => u64::MAX - (page - 1),
            3 => 1 << 40,
            4..8 => page * (1 + random.below(80)),
            _ => page * (1 + random.below(6)),
        }
    }

    fn map(&self, random: &mut Random) -> MapDma {
        let page = PAGE as u64;
        let flags = match random.below(16) {
            0 => MapFlags::empty(),
            1 => MapFlags::VADDR,
            2 => MapFlags::from_bits_retain(u32::try_from(random.below(16)).unwrap_or(0)),
            3..6 => MapFlags::READ,
            6 => MapFlags::WRITE,
            _ => MapFlags::READ | MapFlags::WRITE,
        };
        let vaddr = match random.below(16) {
            0 => 0,
            1 => u64::MAX - (page - 1),
            2 => self.vaddrs[1] + page * random.below(10),
            _ => self.vaddrs[0] + page * random.below(66),
        };
        let vaddr = if random.one_in(24) { vaddr.wrapping_add(8) } else { vaddr };
        MapDma { flags, vaddr, iova: self.iova(random), size: self.size(random) }
    }

    fn unmap(&self, random: &mut Random) -> (UnmapDma, Option<Bitmap>) {
        let flags = match random.below(20) {
            0 => UnmapFlags::ALL,
            1 => UnmapFlags::VADDR,
            2 => UnmapFlags::from_bits_retain(u32::try_from(random.below(16)).unwrap_or(0)),
            3..6 => UnmapFlags::GET_DIRTY_BITMAP,
            _ => UnmapFlags::empty(),
        };
        let everything = flags.contains(UnmapFlags::ALL) && !random.one_in(4);
        let (iova, size) = if everything { (0, 0) } else { (self.iova(random), self.size(random)) };
        let wants = flags.contains(UnmapFlags::GET_DIRTY_BITMAP);
        (UnmapDma { flags, iova, size }, wants.then(|| bitmap_for(random, size)))
    }
}

/// Room for the bits of `size` bytes, mostly.
fn bitmap_for(random: &mut Random, size: u64) -> Bitmap {
    let pages = (size / PAGE as u64).clamp(1, 4096);
    let words = usize::try_from(pages.div_ceil(64)).unwrap_or(1);
    let words = if random.one_in(8) { words.saturating_sub(1) } else { words };
    let pgsize = if random.one_in(12) { 1 << 21 } else { PAGE as u64 };
    Bitmap { pgsize, words: vec![0; words] }
}
