//! A real device by its VFIO file: what it writes arrives where the record says, until it is detached for real.

use std::{
    error::Error,
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use viommu::{Access, Iova};
use viommu_vfio::iommufd::Iommufd;
use vm_memory::GuestMemoryMmap;

use super::{
    say,
    world::{World, open},
};
use crate::{
    type1::{
        edu::Edu,
        world::{SOURCE, SOURCE_AT, STEP, landed, load, mapping, memory, over, pages, plugged, rw, target},
    },
    vfio::Device,
};

pub(super) fn run(bdf: &str) -> Result<(), Box<dyn Error>> {
    for by_files in [false, true] {
        moves(bdf, by_files)?;
    }
    fence(bdf)
}

/// The device, and a world in which it alone is.
fn start(bdf: &str, by_files: bool) -> Result<(Device, World), Box<dyn Error>> {
    let entry =
        fs::read_dir(format!("/sys/bus/pci/devices/{bdf}/vfio-dev"))?.next().ok_or("no vfio-dev")??;
    let path = format!("/dev/vfio/devices/{}", entry.file_name().display());
    let iommufd = Iommufd::open(open("/dev/iommu")?)?;
    let device = Device::of_file(open(&path)?);
    let bound = iommufd.bind(device.duplicate()?).map_err(|errno| format!("{path}: {errno}"))?;
    let iommufd = if by_files { iommufd.by_files() } else { iommufd };
    let memory = if by_files { crate::type1::world::memory_of_files()? } else { memory()? };
    let world = World::new(iommufd, vec![Box::new(bound)], memory)?;
    over(world.domains[0].map(rw(SOURCE_AT, SOURCE_AT, SOURCE)?)?)?;
    Ok((device, world))
}

/// Has the device write to a page, and looks where it arrives.
fn probe(world: &World, edu: Edu<'_>, page: u64, what: &str) -> Result<(), Box<dyn Error>> {
    let mut reader = world.endpoints[0].reader("probe").ok_or("no such endpoint")?;
    let found = reader.enter().probe(Iova(target(page)), Access::WRITE);
    let expected = found.ok().map(|translation| translation.gpa.0 / STEP);
    edu.store(target(page))?;
    let landed = landed(&world.memory)?;
    if landed != Vec::from_iter(expected) {
        return Err(format!(
            "{what}: a write to page {page:#x} arrived at the pages {landed:x?} of memory, not at {expected:x?}"
        )
        .into());
    }
    Ok(())
}

/// After each kind of step.
fn moves(bdf: &str, by_files: bool) -> Result<(), Box<dyn Error>> {
    let (device, world) = start(bdf, by_files)?;
    let edu = Edu::start(&device)?;
    edu.load(load())?;
    let [domain, other] = &world.domains;
    let endpoint = &world.endpoints[0];
    probe(&world, edu, 16, "nothing mapped")?;
    over(domain.map(rw(16, 19, 8)?)?)?;
    probe(&world, edu, 17, "mapped")?;
    over(domain.replace(rw(16, 19, 100)?)?)?;
    probe(&world, edu, 17, "replaced in place")?;
    over(domain.replace(mapping(16, 19, 100, Access::READ)?)?)?;
    probe(&world, edu, 17, "made read-only")?;
    over(domain.replace(rw(17, 17, 200)?)?)?;
    probe(&world, edu, 17, "one page of four exchanged")?;
    probe(&world, edu, 18, "its neighbour, still read-only")?;
    over(domain.unmap(pages(16, 19)?)?)?;
    probe(&world, edu, 17, "unmapped")?;
    // Over the border of two regions, which lie anywhere in this process.
    over(domain.map(rw(32, 39, 252)?)?)?;
    probe(&world, edu, 35, "before the border of two regions")?;
    probe(&world, edu, 36, "behind it")?;
    over(other.map(rw(35, 35, 60)?)?)?;
    over(endpoint.attach(2)?)?;
    probe(&world, edu, 35, "in another domain")?;
    probe(&world, edu, 36, "where that has nothing")?;
    over(endpoint.attach(1)?)?;
    probe(&world, edu, 35, "back in the first domain")?;
    over(endpoint.detach()?)?;
    probe(&world, edu, 35, "detached")?;
    over(endpoint.attach_identity()?)?;
    probe(&world, edu, 300, "identity")?;
    over(world.iommu.remove_backing(plugged()?.range)?)?;
    probe(&world, edu, 4100, "memory that was taken away")?;
    over(world.iommu.add_backing(plugged()?)?)?;
    probe(&world, edu, 4100, "memory that came back")?;
    world.unhurt()?;
    world.end()?;
    let how = if by_files { "mapped by its files" } else { "mapped by its addresses" };
    say("dma", &format!("arrives where the record says, in memory {how}"));
    Ok(())
}

/// A device that goes on writing while it is detached from what it writes to.
fn fence(bdf: &str) -> Result<(), Box<dyn Error>> {
    let (device, world) = start(bdf, false)?;
    let edu = Edu::start(&device)?;
    edu.load(load())?;
    over(world.domains[0].map(rw(16, 16, 8)?)?)?;
    let stop = AtomicBool::new(false);
    let writes = thread::scope(|scope| -> Result<u64, Box<dyn Error>> {
        let writer = scope.spawn(|| -> Result<u64, String> {
            let mut writes = 0;
            while !stop.load(Ordering::Relaxed) {
                edu.store(target(16)).map_err(|error| error.to_string())?;
                writes += 1;
            }
            Ok(writes)
        });
        let outcome = amid_writes(&world);
        stop.store(true, Ordering::Relaxed);
        let writes = writer.join().map_err(|_| "the writer panicked")??;
        outcome.map(|()| writes)
    })?;
    if writes < 4 {
        return Err(format!("the device has written {writes} times: nothing was shown").into());
    }
    world.unhurt()?;
    world.end()?;
    say("fence", "detached amid its writes: none of those begun after it arrived");
    Ok(())
}

/// Waits for a write, has the device blocked, and looks for half a second whether anything is written.
fn amid_writes(world: &World) -> Result<(), Box<dyn Error>> {
    let written = |memory: &GuestMemoryMmap<()>| landed(memory).map(|pages| !pages.is_empty());
    let until = Instant::now() + Duration::from_secs(10);
    while !written(&world.memory)? {
        if Instant::now() > until {
            return Err("the device does not write".into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    over(world.endpoints[0].block()?)?;
    // What was written until here; nothing from here on.
    written(&world.memory)?;
    for _ in 0..100 {
        thread::sleep(Duration::from_millis(5));
        if written(&world.memory)? {
            return Err("a device that was detached has written".into());
        }
    }
    Ok(())
}
