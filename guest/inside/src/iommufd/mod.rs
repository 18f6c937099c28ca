//! The iommufd binding on a kernel's own iommufd: with the IOMMU in software of its self-test, whose tables can be looked
//! into, and with a real device.

mod cost;
mod dma;
mod mock;
mod steps;
mod world;

use std::{error::Error, os::fd::AsFd as _};

use viommu::{Access, Incident, IovaRange};
use viommu_vfio::{
    Errno,
    iommufd::{Device, Iommufd},
};

use crate::type1::{
    host::with_little_locked,
    world::{mapping, over, pages, refusal, rw},
};
use mock::Mock;
use world::{BASE, World, at, open};

/// Steps that look random.
const STEPS: u64 = 10_000;

/// Runs all, with the device at `bdf`; each part says what it has seen.
///
/// # Errors
///
/// The first thing that is not as it must be.
pub(crate) fn run(bdf: &str, seed: &str) -> Result<(), Box<dyn Error>> {
    limits()?;
    errors()?;
    dirty()?;
    kinds()?;
    steps::run(STEPS, seed.parse()?)?;
    dma::run(bdf)?;
    cost::run()
}

fn say(part: &str, words: &str) {
    println!("@@IOMMUFD {part}: {words}");
}

/// An iommufd, and another way to it.
fn iommufd() -> Result<(Iommufd, Mock), Box<dyn Error>> {
    let fd = open("/dev/iommu")?;
    let mock = Mock::new(fd.as_fd().try_clone_to_owned()?);
    Ok((Iommufd::open(fd)?, mock))
}

/// What is out of reach is refused before the kernel is asked, and what is in reach is taken, to the last page.
fn limits() -> Result<(), Box<dyn Error>> {
    if Iommufd::open(open("/dev/null")?).is_ok() {
        return Err("/dev/null was taken for an iommufd".into());
    }
    let (iommufd, mock) = iommufd()?;
    let (device, table) = mock.device(true)?;
    let world = World::plain(iommufd, vec![Box::new(device)])?;
    let limits = world.handle.limits(world.endpoints[0].id()).ok_or("no limits")?;
    let [aperture] = limits.apertures[..] else { return Err(format!("{limits:?}").into()) };
    let (first, last) = (aperture.start().0 / 4096, aperture.last().0 / 4096);
    let domain = &world.domains[0];
    for page in [first, last] {
        over(domain.map(rw(page, page, 3)?)?)?;
        for (iova, address) in world.expected(&world.endpoints[0], pages(page, page)?) {
            if !mock.maps(table.load(std::sync::atomic::Ordering::Relaxed), iova, 4096, address)? {
                return Err(format!("the kernel does not map {iova:#x}").into());
            }
        }
    }
    for page in [first - 1, last + 1] {
        let words = refusal(domain.map(rw(page, page, 3)?))?;
        if !words.contains("aperture") {
            return Err(format!("out of reach: {words}").into());
        }
    }
    world.unhurt()?;
    say(
        "limits",
        &format!("{:#x} to {:#x}, pages of {}", aperture.start().0, aperture.last().0, limits.page_size),
    );
    Ok(())
}

/// The kernel's own errors, met where they come from.
fn errors() -> Result<(), Box<dyn Error>> {
    let (iommufd, mock) = iommufd()?;
    let (first, _) = mock.device(true)?;
    let (second, _) = mock.device(true)?;
    let world = World::plain(iommufd, vec![Box::new(first), Box::new(second)])?;
    let domain = &world.domains[0];
    over(domain.map(rw(BASE, BASE + 3, 8)?)?)?;

    // Pinned memory is bounded: of two pieces, the second does not fit, and neither is left.
    let words = with_little_locked(8 * 4096, || -> Result<String, String> {
        let refused = |step| refusal(step).map_err(|error| error.to_string());
        refused(domain.map(rw(BASE + 16, BASE + 47, 240)?))
    })??;
    if !words.contains("ENOMEM") || world.handle.entries() != 1 {
        return Err(format!("a limit on locked memory: {words}; {} entries", world.handle.entries()).into());
    }
    world.unhurt()?;

    // A mapping vanishes behind the binding's back: the removal that meets it is ENOENT, and cuts both devices off.
    let ioas = mock.betray(at(0));
    if ioas.is_some() {
        return Err("a part of a mapping was removed".into());
    }
    over(domain.map(rw(BASE + 100, BASE + 100, 9)?)?)?;
    let ioas = mock.betray(at(100)).ok_or("nothing to remove behind the binding's back")?;
    // Somebody takes a range away: the kernel refuses there, and the guest hears of it.
    mock.reserve(ioas, at(200), 4096)?;
    let words = refusal(domain.map(rw(BASE + 200, BASE + 200, 9)?))?;
    if !words.contains("IOAS_MAP: EINVAL") {
        return Err(format!("a reserved range: {words}").into());
    }
    over(domain.unmap(pages(BASE + 100, BASE + 100)?)?)?;
    {
        let incidents = world.incidents.lock().map_err(|_| "poisoned")?;
        match &incidents[..] {
            [Incident::Fenced { why, .. }] if why.contains("IOAS_UNMAP: ENOENT") => {}
            other => return Err(format!("expected one mirror cut off, seen {other:?}").into()),
        }
    }
    if !world.endpoints.iter().all(viommu::Endpoint::is_fenced) {
        return Err("both devices were in the domain, and are not both cut off".into());
    }
    // The way back: off the dead copy, all of them, and bound again.
    for endpoint in &world.endpoints {
        over(endpoint.detach()?)?;
        over(endpoint.bind_with(&world.binding)?)?;
    }
    for endpoint in &world.endpoints {
        over(endpoint.attach(1)?)?;
    }
    if world.handle.entries() != 1 || world.handle.spaces() != 1 {
        return Err(format!("after the way back: {:?}", world.handle).into());
    }
    say(
        "errors",
        "ENOMEM and EINVAL are refusals, ENOENT of a removal cuts off both devices, and there is a way back",
    );
    Ok(())
}

/// Dirty pages by table, of what is held and of what is gone.
fn dirty() -> Result<(), Box<dyn Error>> {
    let (iommufd, mock) = iommufd()?;
    let (first, table) = mock.device(true)?;
    let (second, _) = mock.device(true)?;
    let world = World::plain(iommufd, vec![Box::new(first), Box::new(second)])?;
    let domain = &world.domains[0];
    over(domain.map(rw(BASE, BASE + 63, 250)?)?)?;
    over(domain.map(mapping(BASE + 100, BASE + 103, 8, Access::READ)?)?)?;
    domain.dirty_start();
    world.handle.dirty_start()?;
    let mut random = crate::type1::random::Random(7);
    let mut told = 0;
    for round in 0..20 {
        let mut written: Vec<u64> = (0..round).map(|_| random.below(64)).collect();
        written.sort_unstable();
        written.dedup();
        let hwpt = table.load(std::sync::atomic::Ordering::Relaxed);
        for page in &written {
            mock.write(hwpt, at(*page))?;
        }
        let seen = world.handle.dirty()?;
        let seen: Vec<u64> =
            seen.iter().flat_map(|range| range.start().0 / 4096..=range.last().0 / 4096).collect();
        let expected: Vec<u64> = written.iter().map(|page| 250 + page).collect();
        // Where memory happens to lie in one piece, the table has larger pages, and a bit stands for all of one.
        let all_there = expected.iter().all(|page| seen.contains(page));
        if !all_there || (expected.is_empty() && !seen.is_empty()) {
            return Err(format!("round {round}: dirty pages {seen:?}, not {expected:?}").into());
        }
        let again = world.handle.dirty()?;
        if !again.is_empty() {
            return Err(format!("round {round}: {again:?} are dirty once more").into());
        }
        told += expected.len();
    }
    over(domain.unmap(IovaRange::ALL)?)?;
    let gone = domain.dirty_take().unwrap_or_default();
    if gone.iter().map(|range| range.bytes()).sum::<u128>() != 64 * 4096 {
        return Err(format!("of what is gone, all that could be written counts: {gone:?}").into());
    }
    world.handle.dirty_stop()?;
    if world.handle.dirty() != Err(Errno::EINVAL) {
        return Err("dirty pages are told after the end of tracking".into());
    }
    world.unhurt()?;
    say("dirty", &format!("{told} pages told in 20 rounds, each by its place in memory"));
    Ok(())
}

/// Devices that track pages and one that cannot share an IOAS, and the last of them decides.
fn kinds() -> Result<(), Box<dyn Error>> {
    let (iommufd, mock) = iommufd()?;
    let (first, _) = mock.device(true)?;
    let (second, table) = mock.device(false)?;
    let devices: Vec<Box<dyn Device>> = vec![Box::new(first), Box::new(second)];
    let world = World::plain(iommufd, devices)?;
    if world.handle.dirty_start() != Err(Errno::EOPNOTSUPP) {
        return Err("a device that cannot track is said to".into());
    }
    over(world.domains[0].map(rw(BASE, BASE + 3, 250)?)?)?;
    for (iova, address) in world.expected(&world.endpoints[1], pages(BASE, BASE + 3)?) {
        if !mock.maps(table.load(std::sync::atomic::Ordering::Relaxed), iova, 4096, address)? {
            return Err(format!("the second device does not reach {iova:#x}").into());
        }
    }
    world.unhurt()?;
    say("kinds", &format!("one IOAS with {} tables", world.handle.tables()));
    Ok(())
}
