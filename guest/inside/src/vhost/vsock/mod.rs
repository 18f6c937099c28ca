//! The cache on a kernel's own vhost-vsock, which writes the packets of this guest's own sockets into buffers of ours.

mod socket;
mod steps;
mod world;

use std::{error::Error, time::Instant};

use viommu::Access;
use viommu_vhost::kernel::{Writes, fence};

use super::{
    LONG, SHORT, say,
    sys::{RX, TX},
    world::{Outcome, over, page, pages},
};
use socket::Socket;
use world::{FRESH, OUT, Packet, REQUEST, RESPONSE, RST, RW, TAKEN, World};

/// Runs all; each part says what it has seen.
///
/// # Errors
///
/// The first thing that is not as it must be.
pub(crate) fn run(seed: &str, steps: &str) -> Result<(), Box<dyn Error>> {
    let (seed, steps) = (seed.parse()?, steps.parse()?);
    packets()?;
    fenced()?;
    for (writes, cid) in [(Writes::InStep, 102), (Writes::ByWorker, 103)] {
        steps::run(writes, cid, steps, seed)?;
    }
    Ok(())
}

impl World {
    /// The next packet arrives in that page of memory; it is what was sent.
    fn arrives(&mut self, what: &str, memory: u64, operation: u16, port: u32) -> Outcome<Packet> {
        let next = self.heard + 1;
        if !self.serve_until(LONG, |world| Ok(world.given_back()? == next))? {
            return Err(format!("{what}: nothing arrives: {:?}", self.handle.counts()).into());
        }
        let bytes = self.buffer(self.heard, memory)?;
        let packet = Packet::parse(&bytes, self.cid)
            .filter(|packet| packet.operation == operation && packet.ports.1 == port)
            .ok_or_else(|| format!("{what}: in page {memory} there is {bytes:x?}"))?;
        self.heard = next;
        Ok(packet)
    }

    /// Nothing is written; the device has asked for something that it may not have.
    fn nothing_arrives(&mut self, what: &str) -> Outcome<()> {
        let before = self.handle.counts().denied;
        if self.serve_until(SHORT, |world| Ok(world.given_back()? != world.heard))? {
            return Err(format!("{what}: a packet arrives").into());
        }
        if self.handle.counts().denied == before {
            return Err(
                format!("{what}: the device has asked for nothing: {:?}", self.handle.counts()).into()
            );
        }
        Ok(())
    }

    /// Nothing else than what was painted lies in that page.
    fn is_painted(&self, what: &str, memory: u64, byte: u8) -> Outcome<()> {
        if self.read(memory)?.iter().any(|found| *found != byte) {
            return Err(format!("{what}: page {memory} was written to").into());
        }
        Ok(())
    }

    /// The connection gets that answer.
    fn answered(&self, what: &str, socket: &Socket, answer: Result<(), i32>) -> Outcome<()> {
        // It is told once.
        let mut found = None;
        self.serve_until(LONG, |_| {
            found = socket.answer()?;
            Ok(found.is_some())
        })?;
        match found {
            Some(found) if found == answer => Ok(()),
            other => Err(format!("{what}: {other:?} instead of {answer:?}").into()),
        }
    }
}

/// The kernel writes and reads where the record lets it, and only there.
fn packets() -> Outcome<()> {
    let mut world = World::new(101, |device, _| Ok(device))?;
    for memory in [20, 21, 22, 300] {
        world.paint(memory, FRESH)?;
    }
    over(world.domain.map(page(40, 20, Access::WRITE)?)?)?;
    world.give(40)?;
    let first = Socket::connect(world.cid, 1)?;
    let first_packet = world.arrives("mapped", 20, REQUEST, 1)?;
    let counts = world.handle.counts();
    // Descriptors, available ring, buffer.
    if counts.misses < 3 {
        return Err(format!("a device with no entry has asked for {} only", counts.misses).into());
    }
    say("miss", &format!("{} misses until the first packet", counts.misses));

    over(world.domain.unmap(pages(40, 40)?)?)?;
    world.paint(20, TAKEN)?;
    world.give(40)?;
    let second = Socket::connect(world.cid, 2)?;
    world.nothing_arrives("unmapped")?;
    over(world.domain.map(page(40, 21, Access::RW)?)?)?;
    world.fill_and_kick(RX, 40)?;
    let second_packet = world.arrives("mapped elsewhere", 21, REQUEST, 2)?;

    over(world.domain.replace(page(40, 22, Access::READ)?)?)?;
    world.paint(21, TAKEN)?;
    world.give(40)?;
    let third = Socket::connect(world.cid, 3)?;
    world.nothing_arrives("may only be read")?;
    world.is_painted("may only be read", 22, FRESH)?;
    over(world.domain.replace(page(40, 300, Access::RW)?)?)?;
    world.fill_and_kick(RX, 40)?;
    world.arrives("may be written again", 300, REQUEST, 3)?;
    world.is_painted("may only be read", 22, FRESH)?;

    // What the kernel reads.
    world.answer(&second_packet, RESPONSE)?;
    world.nothing_arrives("an answer that is not mapped")?;
    if let Some(answer) = second.answer()? {
        return Err(format!("an answer that is not mapped was read: {answer:?}").into());
    }
    over(world.domain.map(page(OUT.1, OUT.0, Access::READ)?)?)?;
    world.fill_and_kick(TX, OUT.1)?;
    world.answered("a response", &second, Ok(()))?;
    world.answer(&first_packet, RST)?;
    world.answered("a reset", &first, Err(libc::ECONNRESET))?;

    // Views: the ring's own pages too.
    over(world.endpoint.block()?)?;
    world.give(40)?;
    second.send(b"words")?;
    world.nothing_arrives("blocked")?;
    over(world.endpoint.attach(1)?)?;
    world.fill_and_kick(RX, 40)?;
    let packet = world.arrives("attached again", 300, RW, 2)?;
    if packet.body != b"words" {
        return Err(format!("{packet:?} instead of the words").into());
    }

    // Memory that goes.
    let extent = world.iommu.backing().pop().ok_or("no backing")?;
    over(world.iommu.remove_backing(extent.range)?)?;
    world.give(40)?;
    second.send(b"more")?;
    world.nothing_arrives("memory that was taken away")?;
    over(world.iommu.add_backing(extent)?)?;
    world.fill_and_kick(RX, 40)?;
    world.arrives("memory that came back", 300, RW, 2)?;

    for memory in [20, 21] {
        world.is_painted("taken", memory, TAKEN)?;
    }
    audit(&world)?;
    say("packets", &format!("{} arrived where the record says, 2 answers were read", world.heard));
    drop(third);
    Ok(())
}

fn audit(world: &World) -> Outcome<()> {
    match world.subscription.audit() {
        Some(audit) if audit.is_clean() => Ok(()),
        other => Err(format!("the audit: {other:?}").into()),
    }
}

/// A device that is not told of a removal in time is cut off: it writes nothing, though it has entries for all.
fn fenced() -> Outcome<()> {
    let mut world = World::new(104, |device, vhost| {
        Ok(device.writes(Writes::ByWorker).fence(fence::vsock(vhost.duplicate()?)))
    })?;
    world.paint(20, FRESH)?;
    over(world.domain.map(page(40, 20, Access::RW)?)?)?;
    over(world.domain.map(page(60, 21, Access::RW)?)?)?;
    world.give(40)?;
    let first = Socket::connect(world.cid, 1)?;
    world.arrives("mapped", 20, REQUEST, 1)?;
    world.subscription.fill(viommu::Iova(60 * super::world::PAGE), Access::RW)?;
    if world.handle.flush().waits {
        return Err("vhost-vsock takes no message".into());
    }
    // A request that waits for a buffer. Nobody serves the device from here on.
    let second = Socket::connect(world.cid, 2)?;
    let mut done = world.domain.unmap(pages(60, 60)?)?;
    if done.is_complete() {
        return Err("a removal that nobody wrote is over".into());
    }
    world.handle.expire(Instant::now() + LONG);
    over(done)?;
    if !world.handle.is_fenced() || !world.subscription.is_fenced() {
        return Err("the device was not cut off".into());
    }
    world.paint(20, TAKEN)?;
    world.give(40)?;
    // Linux 7.3 has no way to a device that does not run.
    let third = match Socket::connect(world.cid, 3) {
        Err(error) if error.raw_os_error() == Some(libc::EHOSTUNREACH) => None,
        other => Some(other?),
    };
    std::thread::sleep(SHORT);
    if world.given_back()? != world.heard {
        return Err("a device that was cut off gives a buffer back".into());
    }
    world.is_painted("cut off", 20, TAKEN)?;
    // It was the fence: all that the packet needs is there.
    world.vhost.set_running(true)?;
    let end = Instant::now() + LONG;
    while world.given_back()? == world.heard {
        if Instant::now() > end {
            return Err("a device that runs again gives no buffer back".into());
        }
        std::thread::yield_now();
    }
    let bytes = world.buffer(world.heard, 20)?;
    if Packet::parse(&bytes, world.cid).is_none_or(|packet| packet.ports.1 != 2) {
        return Err(format!("a device that runs again writes {bytes:x?}").into());
    }
    say("fence vsock", "nothing is written while a connection waits; started again, its request is");
    drop((first, second, third));
    Ok(())
}
