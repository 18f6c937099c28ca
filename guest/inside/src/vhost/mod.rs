//! The cache on a kernel's own vhost-net: a ring in our memory whose packets come out at a tap.

mod steps;
mod sys;
pub(crate) mod vsock;
mod world;

use std::{
    error::Error,
    time::{Duration, Instant},
};

use viommu::{Access, subscribe::FenceFailed};
use viommu_vhost::kernel::{Counts, Device, Writes, fence};

use sys::Vhost;
use world::{Body, Outcome, Packet, World, over, page, pages};

/// How long something is waited for that must come, and that must not.
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(150);

/// Runs all; each part says what it has seen.
///
/// # Errors
///
/// The first thing that is not as it must be.
pub(crate) fn run(seed: &str, steps: &str) -> Result<(), Box<dyn Error>> {
    let (seed, steps) = (seed.parse()?, steps.parse()?);
    packets()?;
    fenced("net", |vhost| Ok(Box::new(fence::net(vhost.duplicate()?, 2))))?;
    fenced("owner", |vhost| Ok(Box::new(fence::reset_owner(vhost.duplicate()?))))?;
    for (writes, tap) in [(Writes::InStep, "step"), (Writes::ByWorker, "worker")] {
        steps::run(writes, tap, steps, seed)?;
    }
    Ok(())
}

fn say(part: &str, words: &str) {
    println!("@@VHOST {part}: {words}");
}

impl World {
    /// A page of memory that is about to be mapped for the device.
    fn marked(&self, at: u64, memory: u64, generation: u64) -> Outcome<Body> {
        let body = Body { taken: false, at, memory, generation };
        self.mark(body)?;
        Ok(body)
    }

    /// A packet from that page arrives, with what lies there now.
    fn arrives(&mut self, what: &str, expected: Body) -> Outcome<Counts> {
        let before = self.handle.counts();
        let number = self.heard;
        let arrived = self.serve_until_heard(LONG)?;
        if arrived != Some(Packet { number, page: expected.at, body: expected }) {
            let counts = self.handle.counts();
            return Err(format!("{what}: {arrived:?} instead of {expected:?}; {before:?}, {counts:?}").into());
        }
        Ok(self.handle.counts())
    }

    /// No packet arrives; the device has asked for something that it may not have.
    fn nothing_arrives(&mut self, what: &str) -> Outcome<()> {
        let before = self.handle.counts();
        if let Some(packet) = self.serve_until_heard(SHORT)? {
            return Err(format!("{what}: {packet:?}").into());
        }
        let counts = self.handle.counts();
        if counts.denied == before.denied {
            return Err(format!("{what}: the device has asked for nothing: {counts:?}").into());
        }
        Ok(())
    }
}

/// Packets go through where the record lets them, and only there.
fn packets() -> Outcome<()> {
    let mut world = World::new("packets", |device, _| Ok(device))?;
    // The device has nothing but the used ring.
    let first = world.marked(40, 20, 1)?;
    over(world.domain.map(page(40, 20, Access::READ)?)?)?;
    world.send(40)?;
    let counts = world.arrives("mapped", first)?;
    // Descriptors, available ring, head, body.
    if counts.misses < 4 {
        return Err(format!("a device with no entry has asked for {} only", counts.misses).into());
    }
    say("miss", &format!("{} misses until the first packet", counts.misses));
    world.send(40)?;
    let again = world.arrives("once more", first)?;
    if (again.misses, again.updates) != (counts.misses, counts.updates) {
        return Err(format!("the device asks for what it has: {again:?}").into());
    }

    let before = world.handle.counts().invalidations;
    over(world.domain.unmap(pages(40, 40)?)?)?;
    if world.handle.counts().invalidations != before + 1 {
        return Err("an unmap is not one INVALIDATE".into());
    }
    world.mark(Body { taken: true, ..first })?;
    world.send(40)?;
    world.nothing_arrives("unmapped")?;
    let second = world.marked(40, 21, 2)?;
    over(world.domain.map(page(40, 21, Access::RW)?)?)?;
    world.fill_and_kick(40)?;
    world.arrives("mapped elsewhere", second)?;

    let third = world.marked(40, 300, 3)?;
    over(world.domain.replace(page(40, 300, Access::READ)?)?)?;
    world.mark(Body { taken: true, ..second })?;
    world.send(40)?;
    world.arrives("replaced in place", third)?;
    over(world.domain.replace(page(40, 300, Access::WRITE)?)?)?;
    world.send(40)?;
    world.nothing_arrives("may only be written")?;
    over(world.domain.replace(page(40, 300, Access::RW)?)?)?;
    world.fill_and_kick(40)?;
    world.arrives("may be read again", third)?;

    // Views: the ring's own pages too.
    over(world.endpoint.block()?)?;
    world.send(40)?;
    world.nothing_arrives("blocked")?;
    over(world.endpoint.attach(1)?)?;
    world.fill_and_kick(40)?;
    world.arrives("attached again", third)?;

    // Memory that goes.
    let extent = world.iommu.backing().pop().ok_or("no backing")?;
    over(world.iommu.remove_backing(extent.range)?)?;
    world.send(40)?;
    world.nothing_arrives("memory that was taken away")?;
    over(world.iommu.add_backing(extent)?)?;
    world.fill_and_kick(40)?;
    world.arrives("memory that came back", third)?;

    audit(&world)?;
    cost(&mut world)?;
    say("packets", &format!("{} arrived where the record says: {:?}", world.heard, world.handle.counts()));
    Ok(())
}

/// What an answer and a removal take, with the kernel's part.
fn cost(world: &mut World) -> Outcome<()> {
    const TIMES: u32 = 200;
    let (mut fills, mut drops) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..TIMES {
        over(world.domain.map(page(60, 60, Access::RW)?)?)?;
        let begun = Instant::now();
        world.subscription.fill(viommu::Iova(60 * world::PAGE), Access::READ)?;
        fills += begun.elapsed();
        let begun = Instant::now();
        over(world.domain.unmap(pages(60, 60)?)?)?;
        drops += begun.elapsed();
    }
    say("cost", &format!("an answer {:?}, a removal {:?}", fills / TIMES, drops / TIMES));
    Ok(())
}

fn audit(world: &World) -> Outcome<()> {
    match world.subscription.audit() {
        Some(audit) if audit.is_clean() => Ok(()),
        other => Err(format!("the audit: {other:?}").into()),
    }
}

type Action = Box<dyn FnMut() -> Result<(), FenceFailed> + Send>;

/// A device that is not told of a removal in time is cut off: its ring stands still, whatever is mapped.
fn fenced(name: &str, action: impl FnOnce(&Vhost) -> Outcome<Action>) -> Outcome<()> {
    let mut world = World::new(name, |device, vhost| {
        Ok::<Device, _>(device.writes(Writes::ByWorker).fence(action(vhost)?))
    })?;
    let first = world.marked(40, 20, 1)?;
    over(world.domain.map(page(40, 20, Access::READ)?)?)?;
    world.send(40)?;
    world.arrives("mapped", first)?;
    // Nobody serves it from here on.
    let mut done = world.domain.unmap(pages(40, 40)?)?;
    if done.is_complete() {
        return Err("a removal that nobody wrote is over".into());
    }
    world.handle.expire(Instant::now() + LONG);
    over(done)?;
    if !world.handle.is_fenced() || !world.subscription.is_fenced() {
        return Err("the device was not cut off".into());
    }
    world.mark(Body { taken: true, ..first })?;
    world.send(40)?;
    std::thread::sleep(SHORT);
    if let Some(packet) = world.hear()? {
        return Err(format!("a device that was cut off sends {packet:?}").into());
    }
    say(&format!("fence {name}"), "the ring stands still");
    Ok(())
}
