//! Random steps of the record, with the ring running: no packet is of a page that was taken from the device.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use viommu::{Access, Subscription};
use viommu_vhost::kernel::{Handle, Writes};

use super::{
    audit, say,
    sys::{event, wait},
    world::{Body, FIRST_BODY, Outcome, Packet, REGION, SLOTS, World, over, page, pages},
};
use crate::type1::random::Random;

/// Pages of the device's addresses that the steps are about, from this one on.
const FIRST: u64 = 100;
const PAGES: u64 = 24;

/// A packet under way.
struct Sent {
    page: u64,
    /// The oldest of what may lie in its page when it is looked at.
    oldest: u64,
}

/// What the guest knows.
struct Guest {
    world: World,
    random: Random,
    /// What lies in each mapped page, and whether the device may read it.
    mapped: BTreeMap<u64, (Body, bool)>,
    under_way: VecDeque<Sent>,
    generation: u64,
    /// Generations that the device may not read.
    unreadable: BTreeSet<u64>,
}

impl Guest {
    /// A page of memory that nothing is mapped to.
    fn free_memory(&mut self) -> u64 {
        loop {
            let memory = FIRST_BODY + self.random.below(2 * REGION - FIRST_BODY);
            if self.mapped.values().all(|(body, _)| body.memory != memory) {
                return memory;
            }
        }
    }

    /// Maps a page, in place of what is there, and marks what has lost its place as taken when that is over.
    fn map(&mut self, at: u64, access: Access) -> Outcome<()> {
        self.generation += 1;
        let body = Body { taken: false, at, memory: self.free_memory(), generation: self.generation };
        self.world.mark(body)?;
        let new = page(at, body.memory, access)?;
        if !access.contains(Access::READ) {
            self.unreadable.insert(self.generation);
        }
        let old = self.mapped.insert(at, (body, access.contains(Access::READ)));
        over(if old.is_some() { self.world.domain.replace(new)? } else { self.world.domain.map(new)? })?;
        self.taken(old)
    }

    fn unmap(&mut self, at: u64) -> Outcome<()> {
        over(self.world.domain.unmap(pages(at, at)?)?)?;
        let old = self.mapped.remove(&at);
        self.taken(old)
    }

    fn taken(&self, old: Option<(Body, bool)>) -> Outcome<()> {
        match old {
            Some((body, _)) => self.world.mark(Body { taken: true, ..body }),
            None => Ok(()),
        }
    }

    fn send(&mut self, page: u64) -> Outcome<()> {
        let oldest = self.mapped.get(&page).map_or(self.generation + 1, |(body, _)| body.generation);
        self.under_way.push_back(Sent { page, oldest });
        self.world.send(page)
    }

    /// Looks at what has arrived.
    fn hear(&mut self) -> Outcome<()> {
        while let Some(packet) = self.world.hear()? {
            let Packet { page, body, .. } = packet;
            let sent = self.under_way.pop_front().ok_or("a packet too many")?;
            let readable = !self.unreadable.contains(&body.generation);
            let of_page = page == sent.page && body.at == page && !body.taken && readable;
            let latest = self.mapped.get(&page).map_or(self.generation, |(body, _)| body.generation);
            if !of_page || body.generation < sent.oldest || body.generation > latest {
                let now = self.mapped.get(&page);
                return Err(format!("{packet:?} is of a page that was taken; there is {now:?}").into());
            }
        }
        Ok(())
    }

    /// The first packet that has not arrived is let through, and those behind it as far as they go.
    fn let_through(&mut self) -> Outcome<()> {
        let Some(first) = self.under_way.front() else { return Ok(()) };
        let page = first.page;
        if !self.mapped.get(&page).is_some_and(|(_, readable)| *readable) {
            self.map(page, Access::RW)?;
        }
        self.world.fill_and_kick(page)?;
        let before = self.world.heard;
        let end = Instant::now() + super::LONG;
        while self.world.heard == before {
            wait([self.world.tap.socket(); 2], 100)?;
            self.hear()?;
            if Instant::now() > end {
                let (counts, used) = (self.world.handle.counts(), self.world.under_way()?);
                return Err(format!("page {page} is mapped, and does not arrive: {counts:?}, {used}").into());
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Outcome<()> {
        let at = FIRST + self.random.below(PAGES);
        match self.random.below(16) {
            0..4 => self.map(at, self.access())?,
            4..7 if self.mapped.contains_key(&at) => self.unmap(at)?,
            7 => {
                // All at once, and back.
                if self.random.one_in(16) {
                    over(self.world.endpoint.block()?)?;
                    over(self.world.endpoint.attach(1)?)?;
                    self.world.kick()?;
                }
            }
            _ => {
                if self.under_way.len() < usize::from(SLOTS) - 2 {
                    self.send(at)?;
                }
            }
        }
        self.hear()?;
        if self.under_way.len() > usize::from(SLOTS) / 2 || self.random.one_in(12) {
            self.let_through()?;
        }
        Ok(())
    }

    fn access(&self) -> Access {
        match self.random.0 % 8 {
            0 => Access::WRITE,
            1..4 => Access::READ,
            _ => Access::RW,
        }
    }
}

/// A thread that serves the device, until it is told to end.
pub(super) struct Worker {
    end: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    thread: thread::JoinHandle<Result<(), String>>,
}

pub(super) fn wake(fd: &OwnedFd) {
    if let Ok(fd) = fd.try_clone() {
        // Full is as good as awake.
        let _ = std::fs::File::from(fd).write(&1_u64.to_ne_bytes());
    }
}

impl Worker {
    pub(super) fn start(
        handle: Handle,
        subscription: Arc<Subscription>,
        vhost: OwnedFd,
        wake: Arc<OwnedFd>,
    ) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (ended, woken) = (end.clone(), wake.clone());
        let thread = thread::spawn(move || {
            let mut word = [0; 8];
            while !ended.load(Ordering::Relaxed) {
                let turn = handle.serve(&subscription).map_err(|error| error.to_string())?;
                if !turn.more {
                    wait([vhost.as_raw_fd(), woken.as_raw_fd()], 1000).map_err(|error| error.to_string())?;
                    if let Ok(fd) = woken.try_clone() {
                        let _ = std::io::Read::read(&mut std::fs::File::from(fd), &mut word);
                    }
                }
            }
            Ok(())
        });
        Self { end, wake, thread }
    }

    pub(super) fn end(self) -> Outcome<()> {
        self.end.store(true, Ordering::Relaxed);
        wake(&self.wake);
        Ok(self.thread.join().map_err(|_| "the worker has panicked")??)
    }
}

/// Makes `steps` steps.
///
/// # Errors
///
/// If a packet is of a page that the device must not have seen, or none arrives that must.
pub(super) fn run(writes: Writes, tap: &str, steps: u64, seed: u64) -> Outcome<()> {
    let eventfd = Arc::new(event()?);
    let waking = eventfd.clone();
    let world = World::new(tap, |device, _| Ok(device.writes(writes).on_wait(move || wake(&waking))))?;
    let vhost = world.vhost.duplicate()?;
    let worker = Worker::start(world.handle.clone(), world.subscription.clone(), vhost, eventfd);
    let (mapped, under_way) = (BTreeMap::new(), VecDeque::new());
    let random = Random(seed);
    let mut guest = Guest { world, random, mapped, under_way, generation: 0, unreadable: BTreeSet::new() };
    let begun = Instant::now();
    let outcome = (0..steps)
        .try_for_each(|number| guest.step().map_err(|error| format!("step {number}: {error}")))
        .map_err(Into::into)
        .and_then(|()| {
            while !guest.under_way.is_empty() {
                guest.let_through()?;
            }
            Ok(())
        });
    let took = begun.elapsed();
    let ended = worker.end();
    outcome.and(ended)?;
    let Guest { world, .. } = guest;
    audit(&world)?;
    let counts = world.handle.counts();
    if counts.denied == 0 || counts.invalidations == 0 || world.heard < steps / 8 {
        return Err(format!("little has happened: {} packets, {counts:?}", world.heard).into());
    }
    world.vhost.unset_backend()?;
    world.handle.stop();
    let heard = world.heard;
    say(&format!("steps {writes:?}"), &format!("{steps} in {took:.1?}, {heard} packets: {counts:?}"));
    Ok(())
}
