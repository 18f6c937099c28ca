//! A device that goes on writing while it is cut off.

use std::{
    error::Error,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use viommu::{Incident, subscribe::FenceFailed};
use viommu_vfio::{
    software::{UnmapDma, UnmapFlags},
    type1::Container,
};

use super::{
    Place,
    edu::Edu,
    raw::Raw,
    say,
    world::{STEP, World, over, pages, rw},
};
use crate::vfio::Device;

/// The page that the device writes to, over and over.
const PAGE: u64 = 16;

pub(super) fn run(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    unmapped(place)?;
    closed(place)
}

/// Somebody removes a mapping behind the mirror's back: the next step that meets it finds out.
fn betray(raw: &Raw) -> Result<(), Box<dyn Error>> {
    let unmap = UnmapDma { flags: UnmapFlags::empty(), iova: 32 * STEP, size: STEP };
    match raw.unmap(&unmap, None)? {
        STEP => Ok(()),
        other => Err(format!("{other} bytes were removed behind the mirror's back").into()),
    }
}

fn fenced(world: &World) -> Result<(), Box<dyn Error>> {
    let incidents = world.incidents.lock().map_err(|_| "poisoned")?;
    match &incidents[..] {
        [Incident::Fenced { why, .. }] if why.contains("removed 0 bytes where 4096 were held") => Ok(()),
        other => Err(format!("expected one mirror cut off, seen {other:?}").into()),
    }
}

/// Without an action: everything is unmapped. The device writes before, amid and after.
fn unmapped(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    let device = place.open()?;
    let raw = Raw(device.container()?);
    let world = World::new(Container::open(device.container()?)?)?;
    let edu = Edu::start(&device)?;
    world.load(edu)?;
    over(world.domain.map(rw(PAGE, PAGE, 8)?)?)?;
    over(world.domain.map(rw(32, 32, 9)?)?)?;
    let stop = AtomicBool::new(false);
    let (before, after) = thread::scope(|scope| -> Result<_, Box<dyn Error>> {
        let writer = scope.spawn(|| -> Result<u64, String> {
            let mut writes = 0;
            while !stop.load(Ordering::Relaxed) {
                edu.store(World::target(PAGE)).map_err(|error| error.to_string())?;
                writes += 1;
            }
            Ok(writes)
        });
        let outcome = amid_writes(&world, &raw);
        stop.store(true, Ordering::Relaxed);
        let writes = writer.join().map_err(|_| "the writer panicked")??;
        Ok((writes, outcome?))
    })?;
    fenced(&world)?;
    if after < 2 {
        return Err("the device has not written after it was cut off: nothing was shown".into());
    }
    say(
        "fence",
        &format!("everything unmapped: of {before} writes, none of the {after} or so after it arrived"),
    );
    // The way back: a new mirror, after a reset of the device, which opening it anew does.
    drop((world, raw, device));
    let device = place.open()?;
    let world = World::new(Container::open(device.container()?)?)?;
    let edu = Edu::start(&device)?;
    world.load(edu)?;
    over(world.domain.map(rw(PAGE, PAGE, 8)?)?)?;
    world.probe(edu, PAGE, "after the way back")
}

/// Waits for a write, has the device cut off, and looks for half a second whether anything is written. Gives how many
/// writes there was time for.
fn amid_writes(world: &World, raw: &Raw) -> Result<u64, Box<dyn Error>> {
    let until = Instant::now() + Duration::from_secs(10);
    while world.landed()?.is_empty() {
        if Instant::now() > until {
            return Err("the device does not write".into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    betray(raw)?;
    over(world.domain.unmap(pages(32, 32)?)?)?;
    if !world.subscription.is_fenced() || !world.endpoint.is_fenced() {
        return Err("a mirror that has lost a mapping was not cut off".into());
    }
    // What was written until here; nothing from here on.
    world.landed()?;
    let mut looks = 0;
    while looks < 100 {
        thread::sleep(Duration::from_millis(5));
        let landed = world.landed()?;
        if !landed.is_empty() {
            return Err(format!("a device that was cut off has written to {landed:x?}").into());
        }
        looks += 1;
    }
    Ok(looks * 5 / 120)
}

/// With an action that closes the device and its group.
fn closed(place: Place<'_>) -> Result<(), Box<dyn Error>> {
    let device = place.open()?;
    let raw = Raw(device.container()?);
    let container = device.container()?;
    let device = Arc::new(Mutex::new(Some(device)));
    let closing = device.clone();
    let container = Container::open(container)?.fence(move || {
        let closed: Option<Device> = closing.lock().map_err(|_| FenceFailed("poisoned".into()))?.take();
        drop(closed);
        Ok(())
    });
    let world = World::new(container)?;
    {
        let device = device.lock().map_err(|_| "poisoned")?;
        let edu = Edu::start(device.as_ref().ok_or("closed already")?)?;
        world.load(edu)?;
        over(world.domain.map(rw(PAGE, PAGE, 8)?)?)?;
        over(world.domain.map(rw(32, 32, 9)?)?)?;
        world.probe(edu, PAGE, "before it is closed")?;
        // Under way when the device is closed.
        edu.begin_store(World::target(PAGE))?;
    }
    betray(&raw)?;
    over(world.domain.unmap(pages(32, 32)?)?)?;
    fenced(&world)?;
    thread::sleep(Duration::from_millis(300));
    let landed = world.landed()?;
    if !landed.is_empty() || device.lock().map_err(|_| "poisoned")?.is_some() {
        return Err(format!("a device that was closed has written to {landed:x?}").into());
    }
    if raw.track(super::raw::START).is_ok() {
        return Err("the container still has an IOMMU after its group was closed".into());
    }
    say("fence", "closed: what was under way did not arrive, and the container has no IOMMU any more");
    Ok(())
}
