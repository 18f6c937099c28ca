//! The type1 mirror on a kernel's own VFIO, with a real device behind it.

mod differential;
mod edu;
mod fence;
mod host;
mod limits;
pub(crate) mod random;
mod raw;
mod steps;
mod world;

use std::{error::Error, fs, time::Instant};

use viommu_vfio::type1::{Container, Info, OpenError};

use crate::vfio::Device;
use edu::Edu;
use raw::Raw;
use world::{World, over, pages, rw};

/// Bytes.
const PAGE: usize = 4096;

/// Calls, and steps, that look random.
const CALLS: u64 = 10_000;

/// `VFIO_TYPE1_IOMMU`, the first version.
const TYPE1: u32 = 1;

/// The device under test: it is taken and given back several times.
#[derive(Clone, Copy)]
struct Place<'a> {
    bdf: &'a str,
    group: &'a str,
}

impl Place<'_> {
    fn open(self) -> Result<Device, Box<dyn Error>> {
        Ok(Device::open(self.bdf, self.group)?)
    }
}

/// What the container of a device can do now.
fn info(device: &Device) -> Result<Info, Box<dyn Error>> {
    Ok(Container::open(device.container()?)?.info().clone())
}

/// Runs all, with the device at `bdf`; each part says what it has seen.
///
/// # Errors
///
/// The first thing that is not as it must be.
pub(crate) fn run(bdf: &str, seed: &str) -> Result<(), Box<dyn Error>> {
    let seed: u64 = seed.parse()?;
    let link = fs::read_link(format!("/sys/bus/pci/devices/{bdf}/iommu_group"))?;
    let group = link.file_name().and_then(|name| name.to_str()).ok_or("the device has no group")?;
    let place = Place { bdf, group };

    first_version(place)?;
    // Few entries, so that they are used up now and then.
    limits::with_limit(8, || calls(place, seed))?;
    dma(place)?;
    limits::run(place)?;
    steps::run(place, CALLS, seed)?;
    fence::run(place)?;
    Ok(())
}

fn say(part: &str, words: &str) {
    println!("@@TYPE1 {part}: {words}");
}

/// A container of the first version is no host for a mirror.
fn first_version(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    let device = Device::open_as(place.bdf, place.group, TYPE1)?;
    match Container::open(device.container()?) {
        Err(OpenError::NotType1v2) => Ok(()),
        other => Err(format!("a container of type1 v1: {other:?}").into()),
    }
}

/// The kernel and the software container, call by call.
fn calls(place: Place<'_>, seed: u64) -> Result<(), Box<dyn Error>> {
    let device = place.open()?;
    let info = info(&device)?;
    say("info", &format!("{info:x?}"));
    let raw = Raw(device.container()?);
    let begun = Instant::now();
    let tally = differential::run(&raw, &info, (CALLS, seed), None)?;
    say("calls", &format!("{CALLS} answered alike in {:?}: {tally}", begun.elapsed()));
    // Again, where only so much may be pinned.
    let pages = 40;
    let tally = host::with_little_locked(pages * PAGE as u64, || {
        let run = differential::run(&raw, &info, (CALLS / 4, seed), Some(pages * PAGE as u64));
        run.map_err(|error| error.to_string())
    })??;
    if !tally.errors.contains_key(&libc::ENOMEM) {
        return Err("no call has met the limit of locked memory".into());
    }
    say("locked", &format!("{} answered alike: {tally}", CALLS / 4));
    Ok(())
}

/// What the device writes arrives where the record says, after each kind of step.
fn dma(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    let device = place.open()?;
    let world = World::new(Container::open(device.container()?)?)?;
    let edu = Edu::start(&device)?;
    world.load(edu)?;

    world.probe(edu, 16, "nothing mapped")?;
    over(world.domain.map(rw(16, 19, 8)?)?)?;
    world.probe(edu, 17, "mapped")?;
    over(world.domain.replace(rw(16, 19, 100)?)?)?;
    world.probe(edu, 17, "replaced in place")?;
    over(world.domain.replace(world::mapping(16, 19, 100, viommu::Access::READ)?)?)?;
    world.probe(edu, 17, "made read-only")?;
    over(world.domain.replace(rw(17, 17, 200)?)?)?;
    world.probe(edu, 17, "one page of four exchanged")?;
    world.probe(edu, 18, "its neighbour, still read-only")?;
    over(world.domain.unmap(pages(16, 19)?)?)?;
    world.probe(edu, 17, "unmapped")?;

    // Over the border of two regions, which lie anywhere in this process.
    over(world.domain.map(rw(32, 39, 252)?)?)?;
    world.probe(edu, 35, "before the border of two regions")?;
    world.probe(edu, 36, "behind it")?;
    if world.handle.entries() != 3 {
        return Err(format!("{} entries instead of three", world.handle.entries()).into());
    }
    world.iommu.create_domain(2, viommu::Tables::Owned)?;
    over(world.endpoint.attach(2)?)?;
    world.probe(edu, 35, "in an empty domain")?;
    over(world.endpoint.attach(1)?)?;
    world.probe(edu, 35, "back in the first domain")?;
    over(world.endpoint.detach()?)?;
    world.probe(edu, 35, "detached")?;
    over(world.endpoint.attach_identity()?)?;
    world.probe(edu, 300, "identity")?;
    over(world.iommu.remove_backing(world::plugged()?.range)?)?;
    world.probe(edu, 4100, "memory that was taken away")?;
    over(world.iommu.add_backing(world::plugged()?)?)?;
    world.probe(edu, 4100, "memory that came back")?;
    let World { subscription, memory, .. } = world;
    over(subscription.leave())?;
    edu.store(World::target(300))?;
    let landed = world::landed(&memory)?;
    if !landed.is_empty() {
        return Err(format!("the mirror has left, and the device writes to {landed:x?}").into());
    }
    say("dma", "arrives where the record says");
    Ok(())
}
