//! What the device may hold, what it has yet to be told, and the order of the two.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use viommu::ack::Resolver;
use viommu::reader::FaultSink;
use viommu::subscribe::FenceFailed;
use viommu::{Ack, IovaRange, Mapping};

use super::counts::Counts;
use super::host::Resolve;
use super::line::{Line, Shown};
use super::protocol::{Parcel, Protocol};
use crate::log;
use crate::software::Iotlb;
use crate::spec::kind;

/// Parcels that may wait. A guest that removes more than this while its device reads nothing has it cut off.
const MAX_JOBS: usize = 1024;

pub(crate) type Action = Box<dyn FnMut() -> Result<(), FenceFailed> + Send>;
pub(crate) type Wake = Box<dyn Fn() + Send + Sync>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The device has no IOTLB and works on no ring.
    Stopped,
    Running,
    /// It could not be told of a removal: the next one has it fenced.
    Failed,
    /// It has been cut off.
    Fenced,
}

/// A parcel that waits for the device.
struct Job {
    id: u64,
    parcel: Parcel,
    /// What waits for it, and since when.
    removal: Option<(Resolver, Instant)>,
}

/// Taken after [`Shared::writing`], but for [`Shared::send`], which only tries.
pub(crate) struct State {
    pub(crate) line: Option<Arc<dyn Line>>,
    pub(crate) phase: Phase,
    pub(crate) protocol: Protocol,
    pub(crate) memory: Resolve,
    pub(crate) action: Option<Action>,
    pub(crate) faults: Option<Arc<dyn FaultSink>>,
    /// At least what the device holds once it has read all that waits, with guest physical addresses. It never holds
    /// two entries over one address.
    pub(crate) held: Iotlb,
    /// Entries that `held` may have.
    pub(crate) room: usize,
    pub(crate) by_worker: bool,
    pub(crate) limit: Duration,
    pub(crate) counts: Counts,
    jobs: VecDeque<Job>,
    next_id: u64,
}

/// Settings of a [`State`] that a device's builder collects.
pub(crate) struct Settings {
    pub(crate) protocol: Protocol,
    pub(crate) action: Option<Action>,
    pub(crate) faults: Option<Arc<dyn FaultSink>>,
    pub(crate) room: usize,
    pub(crate) by_worker: bool,
    pub(crate) limit: Duration,
}

/// What the cache and the embedder's handle share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Held while messages are written, so that they are written in their order.
    writing: Mutex<()>,
    wake: Option<Wake>,
}

/// Acks to be resolved when no lock is held, since that wakes who waits.
#[derive(Default)]
pub(crate) struct Resolved(Vec<(Resolver, bool)>);

impl Drop for Resolved {
    fn drop(&mut self) {
        for (resolver, done) in self.0.drain(..) {
            if done {
                resolver.done();
            } else {
                resolver.failed();
            }
        }
    }
}

enum Stop {
    /// The device takes nothing now.
    Wait,
    /// It did not do what must be done.
    Failed,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes what is left of `parcel`. A refused entry is one that the device does not have; a refused removal is the end.
fn write(line: &dyn Line, parcel: &mut Parcel, counts: &mut Counts) -> Result<(), Stop> {
    while let Some(message) = parcel.rest().first() {
        let is = message.iotlb.kind;
        match line.write(message) {
            Ok(()) => match is {
                kind::UPDATE => counts.updates += 1,
                kind::INVALIDATE => counts.invalidations += 1,
                _ => {}
            },
            Err(Errno::AGAIN) => return Err(Stop::Wait),
            Err(errno) => {
                counts.refused += 1;
                log::refused(&message.iotlb, &Shown(errno));
                if is != kind::UPDATE {
                    return Err(Stop::Failed);
                }
            }
        }
        parcel.pass();
    }
    Ok(())
}

fn failed_ack() -> Ack {
    let (ack, resolver) = Ack::pending();
    resolver.failed();
    ack
}

impl State {
    fn fail(&mut self, resolved: &mut Resolved) {
        self.phase = Phase::Failed;
        self.end_jobs(false, resolved);
    }

    fn end_jobs(&mut self, done: bool, resolved: &mut Resolved) {
        let removals = self.jobs.drain(..).filter_map(|job| job.removal);
        resolved.0.extend(removals.map(|(resolver, _)| (resolver, done)));
    }

    /// When the oldest removal that waits is out of time.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let since = self.jobs.iter().find_map(|job| job.removal.as_ref().map(|(_, since)| *since))?;
        Some(since.checked_add(self.limit).unwrap_or(since))
    }

    pub(crate) fn waits(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Files an entry, and what must be dropped for it.
    fn file(&mut self, entry: &Mapping) -> Option<Parcel> {
        let Some((range, host)) = (self.memory)(entry) else {
            self.counts.no_memory += 1;
            log::no_memory(entry);
            return None;
        };
        let part = entry.clip(range)?;
        let mut parcel = Parcel::new();
        // An UPDATE over an entry would leave both, and use up room: the same page is asked for twice when two rings
        // miss it, or when the device has dropped it by itself.
        let displaced = self.held.invalidate(range);
        if displaced != 0 {
            self.counts.displaced += displaced as u64;
            parcel.drop_range(&self.protocol, range);
        }
        if self.held.len() >= self.room
            && let Some(oldest) = self.held.oldest().map(|entry| entry.range)
        {
            self.counts.evicted += self.held.invalidate(oldest) as u64;
            parcel.drop_range(&self.protocol, oldest);
        }
        // A range of a region's size is never everything, so this is one entry.
        let _ = self.held.update(&part);
        parcel.enter(&self.protocol, range, host, part.access);
        Some(parcel.closed(&self.protocol))
    }
}

impl Shared {
    pub(crate) fn new(line: Arc<dyn Line>, memory: Resolve, settings: Settings, wake: Option<Wake>) -> Self {
        let Settings { protocol, action, faults, room, by_worker, limit } = settings;
        let state = State {
            line: Some(line),
            phase: Phase::Stopped,
            protocol,
            memory,
            action,
            faults,
            held: Iotlb::new(0),
            room,
            by_worker,
            limit,
            counts: Counts::default(),
            jobs: VecDeque::new(),
            next_id: 0,
        };
        Self { state: Mutex::new(state), writing: Mutex::new(()), wake }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Tells the device of an entry.
    pub(crate) fn install(&self, entry: &Mapping) {
        let mut state = self.state();
        if state.phase != Phase::Running || entry.access.is_empty() || state.jobs.len() >= MAX_JOBS {
            return;
        }
        let Some(parcel) = state.file(entry) else { return };
        // Nobody waits for a fill but the device.
        let _ = self.send(state, parcel, false);
    }

    /// Tells the device to drop what it holds inside `range`.
    pub(crate) fn invalidate(&self, range: IovaRange) -> Ack {
        let mut state = self.state();
        match state.phase {
            Phase::Stopped | Phase::Fenced => return Ack::Done,
            Phase::Failed => return failed_ack(),
            Phase::Running => {}
        }
        // What waits may be of this range too: then it is not known to be over.
        if state.held.invalidate(range) == 0 && !state.waits() {
            state.counts.unheard += 1;
            return Ack::Done;
        }
        let mut parcel = Parcel::new();
        parcel.drop_range(&state.protocol, range);
        let parcel = parcel.closed(&state.protocol);
        self.send(state, parcel, true)
    }

    /// Writes a parcel now, or has it wait behind all others.
    fn send(&self, mut state: MutexGuard<'_, State>, mut parcel: Parcel, removal: bool) -> Ack {
        let mut resolved = Resolved::default();
        if !state.by_worker && !state.waits() {
            // Another thread that writes at this moment is a worker that has just found nothing more to write, or is at it:
            // it looks again when it is done.
            let writing = match self.writing.try_lock() {
                Ok(writing) => Some(writing),
                Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            };
            if writing.is_some()
                && let Some(line) = state.line.clone()
            {
                match write(&*line, &mut parcel, &mut state.counts) {
                    Ok(()) => return Ack::Done,
                    Err(Stop::Wait) => {}
                    Err(Stop::Failed) => {
                        state.fail(&mut resolved);
                        return if removal { failed_ack() } else { Ack::Done };
                    }
                }
            }
        }
        if state.jobs.len() >= MAX_JOBS {
            state.fail(&mut resolved);
            drop(state);
            return failed_ack();
        }
        let (ack, removal) = if removal {
            let (ack, resolver) = Ack::pending();
            (ack, Some((resolver, Instant::now())))
        } else {
            (Ack::Done, None)
        };
        let id = state.next_id;
        state.next_id = state.next_id.wrapping_add(1);
        state.counts.stalls += u64::from(!state.by_worker);
        state.jobs.push_back(Job { id, parcel, removal });
        drop(state);
        if let Some(wake) = &self.wake {
            wake();
        }
        ack
    }

    /// Writes what waits, as far as the device takes it.
    pub(crate) fn flush(&self) {
        let mut resolved = Resolved::default();
        loop {
            let writing = lock(&self.writing);
            loop {
                let (id, mut parcel, line) = {
                    let state = self.state();
                    let (Some(job), Some(line)) = (state.jobs.front(), &state.line) else { break };
                    (job.id, job.parcel.clone(), line.clone())
                };
                // Not under the lock that a step takes: a kernel may be long about it.
                let mut counts = Counts::default();
                let outcome = write(&*line, &mut parcel, &mut counts);
                let mut state = self.state();
                state.counts.updates += counts.updates;
                state.counts.invalidations += counts.invalidations;
                state.counts.refused += counts.refused;
                // What was given up meanwhile is not there any more.
                let Some(job) = state.jobs.front_mut().filter(|job| job.id == id) else { continue };
                match outcome {
                    Ok(()) => {
                        let job = state.jobs.pop_front();
                        let removal = job.and_then(|job| job.removal);
                        resolved.0.extend(removal.map(|(resolver, _)| (resolver, true)));
                    }
                    Err(Stop::Wait) => {
                        job.parcel = parcel;
                        drop((state, writing));
                        return;
                    }
                    Err(Stop::Failed) => state.fail(&mut resolved),
                }
            }
            drop(writing);
            // A step that found the writing taken has left its parcel here.
            if !self.state().waits() {
                return;
            }
        }
    }

    /// Gives up a device that has not read a removal for too long.
    pub(crate) fn expire(&self, now: Instant) {
        let mut resolved = Resolved::default();
        let mut state = self.state();
        if state.deadline().is_some_and(|deadline| deadline <= now) {
            log::too_late(state.limit);
            state.fail(&mut resolved);
        }
        drop(state);
    }

    /// There is an IOTLB. It is emptied, which shows that it is there.
    pub(crate) fn start(&self) -> Result<(), Errno> {
        let _writing = lock(&self.writing);
        let mut state = self.state();
        match state.phase {
            Phase::Running => return Ok(()),
            Phase::Fenced => return Err(Errno::BADF),
            Phase::Failed => return Err(Errno::BUSY),
            Phase::Stopped => {}
        }
        let line = state.line.clone().ok_or(Errno::BADF)?;
        let mut parcel = Parcel::new();
        parcel.drop_range(&state.protocol, IovaRange::ALL);
        for message in parcel.closed(&state.protocol).rest() {
            line.write(message)?;
        }
        state.held.reset();
        state.phase = Phase::Running;
        Ok(())
    }

    /// There is no IOTLB any more, and nobody works on a ring.
    pub(crate) fn stop(&self) {
        let mut resolved = Resolved::default();
        // No message of before may come to the IOTLB that is there afterwards.
        let writing = lock(&self.writing);
        let mut state = self.state();
        if state.phase != Phase::Fenced {
            state.phase = Phase::Stopped;
        }
        state.held.reset();
        state.end_jobs(true, &mut resolved);
        drop((state, writing));
    }

    pub(crate) fn fence(&self) -> Result<(), FenceFailed> {
        let (phase, action) = {
            let mut state = self.state();
            (state.phase, state.action.take())
        };
        if phase == Phase::Fenced {
            return Ok(());
        }
        let outcome = match action {
            Some(mut action) => {
                let outcome = action();
                self.state().action = Some(action);
                outcome
            }
            None if phase == Phase::Stopped => Ok(()),
            None => self.drop_everything(),
        };
        outcome?;
        let mut resolved = Resolved::default();
        let writing = lock(&self.writing);
        let mut state = self.state();
        state.phase = Phase::Fenced;
        state.line = None;
        state.held.reset();
        state.end_jobs(true, &mut resolved);
        drop((state, writing));
        Ok(())
    }

    /// Nobody will say anything any more.
    pub(crate) fn close(&self) {
        let mut resolved = Resolved::default();
        let mut state = self.state();
        state.line = None;
        state.action = None;
        if state.phase != Phase::Fenced {
            state.phase = Phase::Stopped;
        }
        state.end_jobs(false, &mut resolved);
        drop(state);
    }

    /// With no entry, and nobody who answers, the device reaches nothing.
    fn drop_everything(&self) -> Result<(), FenceFailed> {
        let failed = |why: &str| FenceFailed(why.to_owned());
        let _writing = lock(&self.writing);
        let mut state = self.state();
        let line = state.line.clone().ok_or_else(|| failed("no descriptor"))?;
        let mut parcel = Parcel::new();
        parcel.drop_range(&state.protocol, IovaRange::ALL);
        let mut parcel = parcel.closed(&state.protocol);
        match write(&*line, &mut parcel, &mut state.counts) {
            Ok(()) => Ok(()),
            Err(Stop::Wait) => Err(failed("the device takes no message")),
            Err(Stop::Failed) => Err(failed("the device refuses to drop its entries")),
        }
    }
}
