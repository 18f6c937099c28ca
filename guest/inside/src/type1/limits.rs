//! Windows, entries and read-only memory, met with the kernel's own errors; dirty pages; what it all costs.

use std::{error::Error, fs, time::Instant};

use viommu::{Access, Iova, IovaRange, Mapping};
use viommu_vfio::{
    Errno,
    software::{MapDma, MapFlags},
    type1::Container,
};

use super::{
    PAGE, Place,
    host::Guarded,
    info,
    raw::Raw,
    say,
    world::{STEP, World, over, pages, refusal, rw},
};

/// Where the kernel has the number of entries of containers that are yet to be opened.
const LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

pub(super) fn run(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    windows(place)?;
    with_limit(100, || entries(place))?;
    dirty(place)?;
    replay(place)
}

/// Runs `then` while containers that are opened get so many entries.
///
/// # Errors
///
/// As `then`, or if the kernel does not let its limit be set.
pub(super) fn with_limit<T>(
    entries: u32,
    then: impl FnOnce() -> Result<T, Box<dyn Error>>,
) -> Result<T, Box<dyn Error>> {
    let before = fs::read_to_string(LIMIT)?;
    fs::write(LIMIT, entries.to_string())?;
    let outcome = then();
    fs::write(LIMIT, before.trim())?;
    outcome
}

fn expect(what: &str, seen: Result<(), Errno>, expected: Errno) -> Result<(), Box<dyn Error>> {
    if seen == Err(expected) { Ok(()) } else { Err(format!("{what}: {seen:?} and not {expected}").into()) }
}

/// A page of this program's, for the container itself.
fn bare(raw: &Raw, memory: &Guarded, iova: u64) -> Result<(), Errno> {
    let map = MapDma { flags: MapFlags::READ, vaddr: memory.address(), iova, size: STEP };
    // SAFETY: the memory is there for devices alone.
    unsafe { raw.map(&map) }
}

/// At each border of a window: the last page inside is mapped, the first outside is refused, as the kernel does.
fn windows(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    let device = place.open()?;
    let raw = Raw(device.container()?);
    let world = World::new(Container::open(device.container()?)?)?;
    let (memory, read_only) = (Guarded::new(PAGE, true)?, Guarded::new(PAGE, false)?);
    let apertures = info(&device)?.apertures;
    let mut borders = 0;
    // Not in reach, whatever the kernel says.
    let last = u64::MAX / STEP;
    let end = Mapping::over(pages(last, last)?, viommu::Gpa(0), Access::RW).ok_or("no such page")?;
    refusal(world.domain.map(end))?;
    for range in &apertures {
        let before = range.start().0.checked_sub(STEP);
        let behind = range.last().0.checked_add(1);
        for (inside, outside) in [(range.start().0, before), (range.last().0 - (STEP - 1), behind)] {
            let page =
                |iova| Mapping::new(Iova(iova), STEP, viommu::Gpa(0), Access::RW).ok_or("no such page");
            let Some(outside) = outside else { continue };
            over(world.domain.map(page(inside)?)?)?;
            let words = refusal(world.domain.map(page(outside)?))?;
            if !words.contains("outside the host's apertures") {
                return Err(format!("a page outside: {words}").into());
            }
            expect("the kernel, outside a window", bare(&raw, &memory, outside), Errno::EINVAL)?;
            expect("the kernel, a page mapped twice", bare(&raw, &memory, inside), Errno::EEXIST)?;
            // Half inside, half outside.
            let both = IovaRange::new(Iova(inside.min(outside)), Iova(inside.max(outside) + (STEP - 1)));
            let both = Mapping::over(both.ok_or("no such range")?, viommu::Gpa(0), Access::RW)
                .ok_or("no such range")?;
            over(world.domain.unmap(page(inside)?.range)?)?;
            refusal(world.domain.map(both))?;
            borders += 1;
        }
    }
    let map = |flags| MapDma { flags, vaddr: read_only.address(), iova: 0x1000_0000, size: STEP };
    // SAFETY: the memory is there for devices alone.
    let written = unsafe { raw.map(&map(MapFlags::READ | MapFlags::WRITE)) };
    expect("the kernel, memory that this program may only read", written, Errno::EFAULT)?;
    over(world.domain.unmap(IovaRange::ALL)?)?;
    say("windows", &format!("{} with {borders} borders", apertures.len()));
    Ok(())
}

/// With few entries: the record refuses before the kernel would; what takes entries beside it is met in the kernel.
fn entries(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    let device = place.open()?;
    let raw = Raw(device.container()?);
    let world = World::new(Container::open(device.container()?)?)?;
    let memory = Guarded::new(PAGE, true)?;
    let limit = info(&device)?.entries;
    if limit != Some(99) {
        return Err(format!("of 100 entries, one taken, {limit:?} are left").into());
    }
    // Each takes two: it lies over two regions.
    for at in 0..49 {
        over(world.domain.map(rw(4 * at, 4 * at + 1, 255)?)?)?;
    }
    let words = refusal(world.domain.map(rw(1000, 1001, 255)?))?;
    if !words.contains("2 entries are wanted beside 99 of 100") {
        return Err(format!("one entry for two pieces: {words}").into());
    }
    over(world.domain.map(rw(1000, 1000, 0)?)?)?;
    expect("the kernel, all entries taken", bare(&raw, &memory, 0x1000_0000), Errno::ENOSPC)?;
    world.audit(info(&device)?.entries, Some(100))?;
    over(world.domain.unmap(pages(1000, 1000)?)?)?;
    // Somebody else takes what the record believes to be left.
    bare(&raw, &memory, 0x1000_0000).map_err(|errno| format!("one entry for the embedder: {errno}"))?;
    let words = refusal(world.domain.map(rw(1000, 1000, 0)?))?;
    if !words.contains("MAP_DMA: ENOSPC") {
        return Err(format!("the kernel's refusal: {words}").into());
    }
    // Of two pieces, the second does not fit: neither is left.
    over(world.domain.unmap(pages(0, 1)?)?)?;
    bare(&raw, &memory, 0x1000_1000).map_err(|errno| format!("another entry for the embedder: {errno}"))?;
    let words = refusal(world.domain.map(rw(0, 1, 255)?))?;
    if !words.contains("MAP_DMA: ENOSPC") || info(&device)?.entries != Some(1) {
        return Err(
            format!("a half-way refusal: {words}; {:?} entries are left", info(&device)?.entries).into()
        );
    }
    world.audit(Some(3), Some(100))?;
    say("entries", "100: refused by the record, and by the kernel where the embedder takes some");
    Ok(())
}

/// An ordinary device cannot tell: all that it may write to is dirty, each time, and at the end.
fn dirty(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    let device = place.open()?;
    let container = Container::open(device.container()?)?;
    let Some(tracking) = container.info().dirty else {
        say("dirty", "SKIPPED: this kernel tracks no pages");
        return Ok(());
    };
    let world = World::new(container)?;
    over(world.domain.unmap(IovaRange::ALL)?)?;
    over(world.domain.map(rw(16, 19, 254)?)?)?;
    over(world.domain.map(super::world::mapping(32, 35, 8, Access::READ)?)?)?;
    world.domain.dirty_start();
    world.handle.dirty_start()?;
    over(world.domain.map(rw(48, 48, 100)?)?)?;
    let span = |first: u64, last: u64| format!("{:#x}-{:#x}", first * STEP, last * STEP + (STEP - 1));
    let words = |ranges: Vec<viommu::GpaRange>| {
        let words: Vec<String> =
            ranges.iter().map(|range| format!("{:#x}-{:#x}", range.start().0, range.last().0)).collect();
        words.join(" ")
    };
    for _ in 0..2 {
        let seen = words(world.handle.dirty()?);
        let expected = format!("{} {}", span(100, 100), span(254, 257));
        if seen != expected {
            return Err(format!("dirty pages {seen}, not {expected}").into());
        }
    }
    over(world.domain.unmap(pages(16, 35)?)?)?;
    let (held, gone) = (words(world.handle.dirty()?), words(world.domain.dirty_take().unwrap_or_default()));
    if (&held, &gone) != (&span(100, 100), &span(254, 257)) {
        return Err(format!("dirty pages after an unmap: {held} held, {gone} gone").into());
    }
    world.handle.dirty_stop()?;
    if world.handle.dirty() != Err(Errno::EINVAL) {
        return Err("dirty pages are told after the end of tracking".into());
    }
    say("dirty", &format!("pages of {:#x} bytes, by the record's addresses", tracking.page_size));
    Ok(())
}

/// What one event costs, beside its bare call; what it takes to fill a container.
fn replay(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    let (rounds, count) = (1000, if fs::exists("/sys/class/iommu/dmar0")? { 65_000 } else { 10_000 });
    let device = place.open()?;
    let raw = Raw(device.container()?);
    let world = World::new(Container::open(device.container()?)?)?;
    let memory = Guarded::new(PAGE, true)?;
    let unmap = |iova| viommu_vfio::software::UnmapDma {
        flags: viommu_vfio::software::UnmapFlags::empty(),
        iova,
        size: STEP,
    };
    let begun = Instant::now();
    for at in 0..rounds {
        bare(&raw, &memory, 0x1000_0000 + at * STEP)?;
        raw.unmap(&unmap(0x1000_0000 + at * STEP), None)?;
    }
    let bare = begun.elapsed();
    let begun = Instant::now();
    for at in 0..rounds {
        over(world.domain.map(rw(0x1_0000 + at, 0x1_0000 + at, 0)?)?)?;
        over(world.domain.unmap(pages(0x1_0000 + at, 0x1_0000 + at)?)?)?;
    }
    let through = begun.elapsed();
    over(world.endpoint.block()?)?;
    for at in 0..count {
        over(world.domain.map(rw(0x1_0000 + 2 * at, 0x1_0000 + 2 * at, at % 256)?)?)?;
    }
    let begun = Instant::now();
    over(world.endpoint.attach(1)?)?;
    let filled = begun.elapsed();
    if world.handle.entries() != count + 1 {
        return Err(format!("{} entries after a replay of {count}", world.handle.entries()).into());
    }
    let begun = Instant::now();
    over(world.endpoint.block()?)?;
    let emptied = begun.elapsed();
    say(
        "cost",
        &format!(
            "a map and an unmap take {:?}, the bare calls {:?}; {count} mappings are replayed in {filled:?} and taken away \
             in {emptied:?}",
            through / u32::try_from(rounds)?,
            bare / u32::try_from(rounds)?
        ),
    );
    Ok(())
}
