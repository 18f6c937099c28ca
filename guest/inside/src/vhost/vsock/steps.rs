//! Random steps of the record, with the ring running: nothing is written to a page that was taken from the device.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Instant,
};

use viommu::Access;
use viommu_vhost::kernel::Writes;

use super::{
    super::{
        LONG, say,
        steps::{Worker, wake},
        sys::{RX, event},
        world::{Outcome, over, page, pages},
    },
    audit,
    socket::Socket,
    world::{FIRST_BUFFER, FRESH, MEMORY, OUT, Packet, REQUEST, RESPONSE, RW, SLOT, SLOTS, TAKEN, World},
};
use crate::type1::random::Random;

/// Pages of the device's addresses that the steps are about, from this one on.
const FIRST: u64 = 100;
const PAGES: u64 = 24;

/// What the guest knows.
struct Guest {
    world: World,
    random: Random,
    /// The page of memory behind each mapped page, and whether the device may write to it.
    mapped: BTreeMap<u64, (u64, bool)>,
    /// Pages of memory that were taken from the device.
    taken: BTreeSet<u64>,
    /// The pages of the buffers that the device has, by number, and of all that it ever had.
    under_way: VecDeque<u64>,
    given: Vec<u64>,
    /// Packets that were found in a page when it was taken.
    found: BTreeSet<u64>,
}

impl Guest {
    /// A page of memory that nothing is mapped to. If it was the device's once, nothing was written since.
    fn free_memory(&mut self) -> Outcome<u64> {
        loop {
            let memory = FIRST_BUFFER + self.random.below(MEMORY - FIRST_BUFFER);
            if self.mapped.values().all(|(other, _)| *other != memory) {
                if self.taken.remove(&memory) {
                    self.world.is_painted("taken", memory, TAKEN)?;
                }
                self.world.paint(memory, FRESH)?;
                return Ok(memory);
            }
        }
    }

    /// Maps a page, in place of what is there.
    fn map(&mut self, at: u64, access: Access) -> Outcome<()> {
        let memory = self.free_memory()?;
        let new = page(at, memory, access)?;
        let old = self.mapped.insert(at, (memory, access.contains(Access::WRITE)));
        over(if old.is_some() { self.world.domain.replace(new)? } else { self.world.domain.map(new)? })?;
        old.map_or(Ok(()), |old| self.take(at, old))
    }

    fn unmap(&mut self, at: u64) -> Outcome<()> {
        over(self.world.domain.unmap(pages(at, at)?)?)?;
        let old = self.mapped.remove(&at);
        old.map_or(Ok(()), |old| self.take(at, old))
    }

    /// The number of the packet that lies in a buffer, if something was written there.
    fn packet(&self, at: u64, bytes: &[u8]) -> Outcome<Option<u64>> {
        if bytes.iter().all(|byte| *byte == FRESH) {
            return Ok(None);
        }
        let number = Packet::parse(bytes, self.world.cid)
            .filter(|packet| packet.operation == RW)
            .and_then(|packet| Some(u64::from_ne_bytes(packet.body.try_into().ok()?)))
            .ok_or_else(|| format!("page {at} holds {bytes:x?}"))?;
        let given = usize::try_from(number).ok().and_then(|number| self.given.get(number));
        if given != Some(&at) {
            return Err(format!("packet {number} was for page {given:?}, and is in page {at}").into());
        }
        Ok(Some(number))
    }

    /// The device has lost that page: what was written until now was written in time, what is later is not.
    fn take(&mut self, at: u64, (memory, writable): (u64, bool)) -> Outcome<()> {
        for bytes in self.world.read(memory)?.chunks_exact(SLOT) {
            if let Some(number) = self.packet(at, bytes)? {
                if !writable {
                    return Err(format!("packet {number} was written to page {at}, which may be read").into());
                }
                self.found.insert(number);
            }
        }
        self.taken.insert(memory);
        self.world.paint(memory, TAKEN)
    }

    /// A buffer in that page, and a packet for it.
    fn send(&mut self, at: u64, socket: &Socket) -> Outcome<()> {
        let number = self.given.len() as u64;
        self.given.push(at);
        self.under_way.push_back(at);
        self.world.give(at)?;
        Ok(socket.send(&number.to_ne_bytes())?)
    }

    /// Looks at what has arrived: it lies, or lay, in the page that its buffer was in.
    fn hear(&mut self) -> Outcome<()> {
        let until = self.world.given_back()?;
        while self.world.heard < until {
            let at = self.under_way.pop_front().ok_or("a packet too many")?;
            // The first buffer was the request's.
            let number = self.world.heard;
            let mut there = None;
            if let Some(&(memory, true)) = self.mapped.get(&at) {
                there = self.packet(at, &self.world.buffer(number, memory)?)?;
            }
            if there != Some(number) && !self.found.contains(&number) {
                return Err(format!("packet {number} is not in page {at}; there is {there:?}").into());
            }
            self.world.heard += 1;
        }
        Ok(())
    }

    /// The first packet that has not arrived is let through, and those behind it as far as they go.
    fn let_through(&mut self) -> Outcome<()> {
        let Some(&at) = self.under_way.front() else { return Ok(()) };
        if !self.mapped.get(&at).is_some_and(|(_, writable)| *writable) {
            self.map(at, Access::RW)?;
        }
        self.world.fill_and_kick(RX, at)?;
        let before = self.world.heard;
        let end = Instant::now() + LONG;
        while self.world.heard == before {
            self.hear()?;
            if Instant::now() > end {
                let counts = self.world.handle.counts();
                return Err(format!("page {at} is mapped, and nothing arrives: {counts:?}").into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn step(&mut self, socket: &Socket) -> Outcome<()> {
        let at = FIRST + self.random.below(PAGES);
        match self.random.below(16) {
            0..4 => {
                let access = self.random.of(&[Access::READ, Access::WRITE, Access::RW, Access::RW]);
                self.map(at, access)?;
            }
            4..7 if self.mapped.contains_key(&at) => self.unmap(at)?,
            7 => {
                // All at once, and back.
                if self.random.one_in(16) {
                    over(self.world.endpoint.block()?)?;
                    over(self.world.endpoint.attach(1)?)?;
                }
            }
            _ => {
                if self.under_way.len() < usize::from(SLOTS) - 2 {
                    self.send(at, socket)?;
                }
            }
        }
        self.hear()?;
        if self.under_way.len() > usize::from(SLOTS) / 2 || self.random.one_in(12) {
            self.let_through()?;
        }
        Ok(())
    }
}

/// Makes `steps` steps.
///
/// # Errors
///
/// If something is written to a page that was taken from the device, or a packet does not arrive that must.
pub(super) fn run(writes: Writes, cid: u64, steps: u64, seed: u64) -> Outcome<()> {
    let eventfd = Arc::new(event()?);
    let waking = eventfd.clone();
    let mut world = World::new(cid, |device, _| Ok(device.writes(writes).on_wait(move || wake(&waking))))?;
    let vhost = world.vhost.duplicate()?;
    // A connection first, whose request has the ring's first buffer.
    world.paint(8, FRESH)?;
    over(world.domain.map(page(40, 8, Access::RW)?)?)?;
    over(world.domain.map(page(OUT.1, OUT.0, Access::READ)?)?)?;
    world.give(40)?;
    let socket = Socket::connect(cid, 1)?;
    let request = world.arrives("a request", 8, REQUEST, 1)?;
    world.answer(&request, RESPONSE)?;
    world.answered("a response", &socket, Ok(()))?;

    let worker = Worker::start(world.handle.clone(), world.subscription.clone(), vhost, eventfd);
    let mut guest = Guest {
        world,
        random: Random(seed),
        mapped: BTreeMap::new(),
        taken: BTreeSet::new(),
        under_way: VecDeque::new(),
        // The request's.
        given: vec![40],
        found: BTreeSet::new(),
    };
    let begun = Instant::now();
    let outcome = (0..steps)
        .try_for_each(|number| guest.step(&socket).map_err(|error| format!("step {number}: {error}")))
        .map_err(Into::into)
        .and_then(|()| {
            while !guest.under_way.is_empty() {
                guest.let_through()?;
            }
            guest.taken.iter().try_for_each(|memory| guest.world.is_painted("taken", *memory, TAKEN))
        });
    let took = begun.elapsed();
    let ended = worker.end();
    outcome.and(ended)?;
    let Guest { world, found, .. } = guest;
    audit(&world)?;
    let counts = world.handle.counts();
    if counts.denied == 0 || counts.invalidations == 0 || world.heard < steps / 8 || found.is_empty() {
        return Err(format!("little has happened: {} packets, {counts:?}", world.heard).into());
    }
    world.vhost.set_running(false)?;
    world.handle.stop();
    let (heard, found) = (world.heard, found.len());
    let part = format!("steps {writes:?}");
    say(
        &part,
        &format!("{steps} in {took:.1?}, {heard} packets, {found} of them in pages taken later: {counts:?}"),
    );
    Ok(())
}
