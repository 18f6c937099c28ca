//! The vhost-vDPA mirror on a kernel's own simulators: a disk that keeps what it is told, and a network card with two
//! address spaces.

mod disk;
mod netlink;

use std::{
    error::Error,
    fs::{self, File},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use viommu::{
    Access, Completion, Domain, Endpoint, EndpointConfig, Incident, Interest, Iommu, IovaRange, StepError,
    Subscription, Tables,
};
use viommu_vhost::{
    spec::backend,
    vdpa::{DEFAULT_ENTRIES, Device, Handle, OpenError},
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::type1::{
    random::Random,
    world::{STEP, backing, mapping, memory_of_files, over, pages, plugged, refusal, rw},
};
use disk::{Disk, Outcome, RINGS, Ring};

/// Steps that look random.
const STEPS: u64 = 3000;

/// The ring: behind all that the steps are about.
const RING: Ring = Ring { at: 4096, page: 4096 + 56 };

/// Bytes of a request.
const BYTES: u32 = 512;

/// Runs all; each part says what it has seen.
///
/// # Errors
///
/// The first thing that is not as it must be.
pub(crate) fn run(seed: &str) -> Result<(), Box<dyn Error>> {
    let disk = device("vdpasim_blk", "disk")?;
    let card = device("vdpasim_net", "card")?;
    let world = World::new(&disk, 0)?;
    data(&world, &disk)?;
    steps(&world, &disk, seed.parse()?)?;
    limit(&world)?;
    full(world, &disk)?;
    spaces(&card)?;
    fence(&card)
}

/// Makes a device of a simulator, for another program.
///
/// # Errors
///
/// If there is no such simulator.
pub(crate) fn add(kind: &str) -> Result<(), Box<dyn Error>> {
    device(kind, "added").map(drop)
}

fn say(part: &str, words: &str) {
    println!("@@VDPA {part}: {words}");
}

/// A device of a simulator, by its vhost-vDPA file.
fn device(kind: &str, name: &str) -> Result<File, Box<dyn Error>> {
    netlink::add(kind, name).map_err(|error| format!("{kind}: {error}"))?;
    let folder = format!("/sys/bus/vdpa/devices/{name}");
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        for entry in fs::read_dir(&folder)? {
            let file = entry?.file_name();
            let file = file.to_string_lossy();
            let path = format!("/dev/{file}");
            if file.starts_with("vhost-vdpa-") && fs::exists(&path)? {
                return disk::open(&path);
            }
        }
        if Instant::now() > until {
            return Err(format!("{folder} has no vhost-vdpa device").into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

struct World {
    iommu: Iommu,
    domain: Domain,
    endpoint: Endpoint,
    subscription: Subscription,
    handle: Handle,
    incidents: Arc<Mutex<Vec<Incident>>>,
    memory: GuestMemoryMmap<()>,
}

impl World {
    /// Over an address space of a device; the device sees its ring.
    fn new(file: &File, asid: u32) -> Result<World, Box<dyn Error>> {
        let device = Device::open(file.try_clone()?.into(), 0)?;
        let info = *device.info();
        say("info", &format!("{info:x?}"));
        if !info.batches || !info.persists {
            return Err(
                format!("the simulator takes no batches, or keeps nothing over a reset: {info:?}").into()
            );
        }
        World::over(&device, asid, memory_of_files()?)
    }

    fn over(device: &Device, asid: u32, memory: GuestMemoryMmap<()>) -> Result<World, Box<dyn Error>> {
        let incidents = Arc::new(Mutex::new(Vec::new()));
        let alarm = incidents.clone();
        let builder = Iommu::builder().table_bytes(32 << 20).alarm(move |incident| {
            if let Ok(mut incidents) = alarm.lock() {
                incidents.push(incident.clone());
            }
        });
        let iommu =
            backing()?.into_iter().fold(builder, |builder, extent| builder.backing(extent)).build()?;
        let endpoint = iommu.add_endpoint(32, EndpointConfig::default())?;
        let domain = iommu.create_domain(1, Tables::Owned)?;
        over(endpoint.attach(1)?)?;
        let (mirror, handle) = device.mirror(asid, Arc::new(memory.clone()))?;
        let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR)?;
        over(domain.map(rw(RING.at, RING.at + RINGS - 1, RING.page)?)?)?;
        Ok(World { iommu, domain, endpoint, subscription, handle, incidents, memory })
    }

    /// Where an access of the device's to `page` must arrive: a page of memory, or nowhere.
    fn expected(&self, page: u64, access: Access) -> Result<Option<u64>, Box<dyn Error>> {
        let mut reader = self.endpoint.reader("probe").ok_or("no such endpoint")?;
        let found = reader.enter().probe(viommu::Iova(page * STEP), access);
        Ok(found.ok().map(|translation| translation.gpa.0 / STEP))
    }

    fn unhurt(&self) -> Result<(), Box<dyn Error>> {
        match &self.incidents.lock().map_err(|_| "poisoned")?[..] {
            [] => Ok(()),
            incidents => Err(format!("unforeseen: {incidents:?}").into()),
        }
    }

    /// Has the disk store what lies at `page`, and load it there again: both reach the memory that the record says, or none.
    /// The disk is started anew where it could not.
    fn probe(&self, file: &File, disk: &mut Disk, page: u64, what: &str) -> Result<bool, Box<dyn Error>> {
        // What the disk holds from before.
        let old = self.stored(disk)?;
        let mut new = old.clone();
        new.iter_mut().for_each(|byte| *byte = byte.wrapping_add(7));
        let readable = self.expected(page, Access::READ)?;
        if let Some(target) = readable {
            self.memory.write_slice(&new, GuestAddress(target * STEP))?;
        }
        let outcome = disk.ask(true, page * STEP, BYTES)?;
        if (outcome == Outcome::Status(0)) != readable.is_some() {
            return Err(format!(
                "{what}: a write of page {page:#x}, which lies at {readable:x?}: {outcome:?}"
            )
            .into());
        }
        if outcome == Outcome::Silence {
            *disk = Disk::start(file, &self.memory, RING)?;
        }
        let held = self.stored(disk)?;
        if held != if readable.is_some() { new } else { old } {
            return Err(
                format!("{what}: the disk holds something else than what lay at {readable:x?}").into()
            );
        }
        let writable = self.expected(page, Access::WRITE)?;
        if let Some(target) = writable {
            self.memory.write_slice(&[0; BYTES as usize], GuestAddress(target * STEP))?;
        }
        let outcome = disk.ask(false, page * STEP, BYTES)?;
        if (outcome == Outcome::Status(0)) != writable.is_some() {
            return Err(format!(
                "{what}: a read to page {page:#x}, which lies at {writable:x?}: {outcome:?}"
            )
            .into());
        }
        if outcome != Outcome::Status(0) {
            *disk = Disk::start(file, &self.memory, RING)?;
        }
        if let Some(target) = writable {
            let mut seen = vec![0; BYTES as usize];
            self.memory.read_slice(&mut seen, GuestAddress(target * STEP))?;
            if seen != held {
                return Err(format!("{what}: what was read did not arrive at {target:#x}").into());
            }
        }
        Ok(readable.is_some() || writable.is_some())
    }

    /// What the disk holds, read into the last of the ring's pages.
    fn stored(&self, disk: &mut Disk) -> Result<Vec<u8>, Box<dyn Error>> {
        let at = RINGS - 1;
        match disk.ask(false, (RING.at + at) * STEP + 1024, BYTES)? {
            Outcome::Status(0) => {}
            outcome => {
                return Err(format!("the disk does not read to its own ring's page: {outcome:?}").into());
            }
        }
        let mut bytes = vec![0; BYTES as usize];
        self.memory.read_slice(&mut bytes, GuestAddress((RING.page + at) * STEP + 1024))?;
        Ok(bytes)
    }
}

/// What the disk moves arrives where the record says, after each kind of step.
fn data(world: &World, file: &File) -> Result<(), Box<dyn Error>> {
    let mut disk = Disk::start(file, &world.memory, RING)?;
    let mut probe = |page, what| world.probe(file, &mut disk, page, what);
    let domain = &world.domain;
    probe(16, "nothing mapped")?;
    over(domain.map(rw(16, 19, 8)?)?)?;
    probe(17, "mapped")?;
    over(domain.replace(rw(16, 19, 100)?)?)?;
    probe(17, "replaced in place")?;
    over(domain.replace(mapping(16, 19, 100, Access::READ)?)?)?;
    probe(17, "made read-only")?;
    over(domain.replace(rw(17, 17, 200)?)?)?;
    probe(17, "one page of four exchanged")?;
    probe(18, "its neighbour, still read-only")?;
    over(domain.unmap(pages(16, 19)?)?)?;
    probe(17, "unmapped")?;
    over(domain.map(rw(32, 39, 252)?)?)?;
    probe(35, "before the border of two regions")?;
    probe(36, "behind it")?;
    over(world.iommu.remove_backing(plugged()?.range)?)?;
    // The ring is in that memory.
    over(world.iommu.add_backing(plugged()?)?)?;
    probe(35, "after memory was taken away and came back")?;
    over(world.subscription.replay()?)?;
    probe(36, "after a replay")?;
    over(domain.unmap(pages(32, 39)?)?)?;
    probe(35, "unmapped")?;
    world.unhurt()?;
    say("data", "arrives where the record says");
    Ok(())
}

/// Random steps, with the disk moving data between them.
fn steps(world: &World, file: &File, seed: u64) -> Result<(), Box<dyn Error>> {
    let mut disk = Disk::start(file, &world.memory, RING)?;
    let mut random = Random(seed);
    let (mut refused, mut reached, mut probes) = (0, 0, 0);
    let settled = |outcome: Result<Completion, StepError>| -> Result<u64, Box<dyn Error>> {
        match outcome {
            Ok(done) => over(done).map(|()| 0),
            Err(error) => over(error.completion).map(|()| 1),
        }
    };
    for done in 0..STEPS {
        let first = random.below(96);
        let last = first + random.of(&[0, 0, 0, 1, 3, 7, 20]);
        let target = random.of(&[random.0 % 200, random.0 % 200, 250, 255, 8000]) + random.below(6);
        let access = random.of(&[Access::RW, Access::RW, Access::RW, Access::READ, Access::WRITE]);
        let new = mapping(first, last, target, access)?;
        let domain = &world.domain;
        refused += settled(match random.below(64) {
            0..8 => domain.batch().unmap(pages(first, last + random.below(8))?).map(new).commit(),
            8..22 => domain.replace(new),
            22..42 => domain.unmap(pages(first, last)?),
            _ => domain.map(new),
        })?;
        if done % 30 == 0 {
            let what = format!("step {done} of seed {seed}");
            reached += u64::from(world.probe(file, &mut disk, random.below(96), &what)?);
            probes += 1;
        }
    }
    let audit = world.subscription.audit().ok_or("the mirror is cut off")?;
    if !audit.is_clean() {
        return Err(format!("the mirror differs from the record: {audit:?}").into());
    }
    over(world.domain.unmap(pages(0, 200)?)?)?;
    world.unhurt()?;
    say(
        "steps",
        &format!(
            "{STEPS}, {refused} refused; {probes} times data was moved, {reached} times to what was mapped"
        ),
    );
    Ok(())
}

/// As many entries as the kernel has, and not one more.
fn limit(world: &World) -> Result<(), Box<dyn Error>> {
    let taken = world.handle.entries();
    let left = u64::from(DEFAULT_ENTRIES) - taken;
    for at in 0..left {
        // No two touch: the kernel has one entry each.
        over(world.domain.map(rw(0x1_0000 + 2 * at, 0x1_0000 + 2 * at, 2 * (at % 100))?)?)?;
    }
    let words = refusal(world.domain.map(rw(0x8_0000, 0x8_0000, 0)?))?;
    if !words.contains("more extents than the host can hold") {
        return Err(format!("one more than there is room for: {words}").into());
    }
    let begun = Instant::now();
    over(world.domain.unmap(pages(0x1_0000, 0x8_0000)?)?)?;
    let emptied = begun.elapsed();
    if world.handle.entries() != taken {
        return Err(format!("{} entries instead of {taken}", world.handle.entries()).into());
    }
    world.unhurt()?;
    say("limit", &format!("{DEFAULT_ENTRIES} entries; {left} are taken away in {emptied:.1?}"));
    Ok(())
}

/// What the record does not know of is refused by the kernel, and the guest hears of it.
fn full(world: World, file: &File) -> Result<(), Box<dyn Error>> {
    let World { subscription, .. } = world;
    over(subscription.leave())?;
    let device = Device::open(file.try_clone()?.into(), 0)?.entries(None);
    let world = World::over(&device, 0, memory_of_files()?)?;
    let mut disk = Disk::start(file, &world.memory, RING)?;
    over(world.domain.map(rw(16, 16, 8)?)?)?;
    world.probe(file, &mut disk, 16, "with a new mirror")?;
    let mut held = 0;
    let words = loop {
        match world.domain.map(rw(0x1_0000 + 2 * held, 0x1_0000 + 2 * held, 2 * (held % 100))?) {
            Ok(done) => over(done)?,
            Err(error) => {
                let words = error.to_string();
                over(error.completion)?;
                break words;
            }
        }
        held += 1;
        if held > 5000 {
            return Err("the kernel has no limit".into());
        }
    };
    if !words.contains("UPDATE: ") || held + 2 != u64::from(DEFAULT_ENTRIES) {
        return Err(format!("the kernel refused the mapping after {held}: {words}").into());
    }
    world.probe(file, &mut disk, 16, "with all entries taken")?;
    world.unhurt()?;
    say("refused", &format!("{words}, for the mapping after {held} others"));
    Ok(())
}

/// A device that cannot follow is reset.
fn fence(file: &File) -> Result<(), Box<dyn Error>> {
    let device = Device::open(file.try_clone()?.into(), 0)?;
    let world = World::over(&device, 0, memory_of_files()?)?;
    over(world.domain.map(rw(16, 17, 8)?)?)?;
    disk::acknowledge(file)?;
    // Somebody begins a batch of the other address space: the kernel takes no message of this one then.
    disk::begin_batch(file, 1)?;
    over(world.domain.unmap(pages(16, 17)?)?)?;
    {
        let incidents = world.incidents.lock().map_err(|_| "poisoned")?;
        match &incidents[..] {
            [Incident::Fenced { why, .. }] if why.contains("INVALIDATE") => {}
            other => return Err(format!("expected one mirror cut off, seen {other:?}").into()),
        }
    }
    let status = disk::status(file)?;
    if !world.endpoint.is_fenced() || !world.handle.is_closed() || status != 0 {
        return Err(format!("a device whose mirror cannot follow has the status {status:#x}").into());
    }
    say("fence", "reset");
    Ok(())
}

/// Two address spaces of one device.
fn spaces(file: &File) -> Result<(), Box<dyn Error>> {
    let device = Device::open(file.try_clone()?.into(), 0)?;
    let count = device.info().address_spaces;
    if count < 2 {
        return Err(format!("the card has {count} address spaces").into());
    }
    let memory = memory_of_files()?;
    match device.mirror(count, Arc::new(memory.clone())) {
        Err(OpenError::NoAddressSpace { .. }) => {}
        other => return Err(format!("an address space that is not there: {other:?}").into()),
    }
    let worlds = [World::over(&device, 0, memory.clone())?, World::over(&device, 1, memory)?];
    // The same address in both, with other contents; the kernel refuses a second one in either.
    for (at, world) in (0..).zip(&worlds) {
        over(world.domain.map(rw(16, 17, 8 + 10 * at)?)?)?;
    }
    for world in &worlds {
        over(world.domain.replace(rw(16, 17, 100)?)?)?;
        over(world.domain.unmap(IovaRange::ALL)?)?;
        over(world.domain.map(rw(16, 16, 3)?)?)?;
        world.unhurt()?;
        if world.handle.entries() != 1 {
            return Err(
                format!("{} entries in an address space, instead of one", world.handle.entries()).into()
            );
        }
    }
    match Device::open(file.try_clone()?.into(), backend::RESUME | 1 << 63) {
        Err(OpenError::NoFeatures(_)) => {}
        other => return Err(format!("features that are not there: {other:?}").into()),
    }
    say("spaces", &format!("{count}, each with the same addresses"));
    Ok(())
}
