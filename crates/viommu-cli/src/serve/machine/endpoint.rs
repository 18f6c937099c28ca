//! A device behind the IOMMU: an engine, and a thread for each of its queues.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use viommu::Endpoint;
use viommu_devices::blk::{Answers, Metrics};
use viommu_devices::{Blk, BlkOptions, Rng, RngMetrics};
use viommu_memory::EndpointSpace;
use viommu_vfio_user::Windows;
use viommu_vfio_user::memory::{AllWindows, Window};
use viommu_vfio_user::virtio::{Device, QueueSignal, ResetBy, feature};
use viommu_virtio::viot::Bdf;
use virtio_queue::Queue;

use super::unit::Unit;
use crate::serve::device::Kind;
use crate::serve::hush::Hush;
use crate::serve::times::Times;

/// The greatest size of a queue.
const QUEUE_SIZE: u16 = 256;

/// What a device does with its queues.
#[derive(Debug)]
pub(crate) enum Engine {
    Blk(Box<Blk>),
    Rng(Rng),
}

impl Engine {
    /// None for a device that is another process's.
    pub(crate) fn new(kind: &Kind, address: Bdf) -> Result<Option<Self>, String> {
        match kind {
            Kind::Rng => Ok(Some(Self::Rng(Rng::new()))),
            Kind::Blk { file, read_only, queues } => {
                let id = format!("viommu-{}", address.to_string().replace([':', '.'], "-"));
                let options = BlkOptions { read_only: *read_only, queues: *queues, id };
                let blk = Blk::open(file, &options).map_err(|why| why.to_string())?;
                Ok(Some(Self::Blk(Box::new(blk))))
            }
            Kind::Proxy { .. } => Ok(None),
        }
    }

    fn queues(&self) -> u16 {
        match self {
            Self::Blk(blk) => blk.queues(),
            Self::Rng(rng) => rng.queues(),
        }
    }

    fn features(&self) -> u64 {
        match self {
            Self::Blk(blk) => blk.features(),
            Self::Rng(rng) => rng.features(),
        }
    }

    fn config(&self) -> &[u8] {
        match self {
            Self::Blk(blk) => blk.config(),
            Self::Rng(rng) => rng.config(),
        }
    }

    fn process(
        &self,
        features: u64,
        queue: &mut Queue,
        memory: &EndpointSpace<AllWindows>,
    ) -> Result<viommu_devices::Processed, viommu_devices::QueueError> {
        match self {
            Self::Blk(blk) => blk.process(features, queue, memory),
            Self::Rng(rng) => rng.process(queue, memory),
        }
    }

    /// What it has done, by name.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        let named = match self {
            Self::Blk(blk) => blk_counters(&blk.metrics()),
            Self::Rng(rng) => {
                let RngMetrics { requests, bytes, unanswered, .. } = rng.metrics();
                vec![("requests", requests), ("bytes", bytes), ("unanswered", unanswered)]
            }
        };
        named.into_iter().map(|(name, count)| (name.to_owned(), count)).collect()
    }

    /// Makes safe what was written.
    pub(crate) fn flush(&self) -> io::Result<()> {
        match self {
            Self::Blk(blk) => blk.flush(),
            Self::Rng(_) => Ok(()),
        }
    }
}

fn blk_counters(metrics: &Metrics) -> Vec<(&'static str, u64)> {
    let all = |answers: &Answers| answers.ok.saturating_add(answers.ioerr).saturating_add(answers.unsupp);
    let kinds = [
        &metrics.reads,
        &metrics.writes,
        &metrics.flushes,
        &metrics.discards,
        &metrics.write_zeroes,
        &metrics.ids,
        &metrics.others,
    ];
    let refused = |answers: &&Answers| answers.ioerr.saturating_add(answers.unsupp);
    vec![
        ("reads", all(&metrics.reads)),
        ("writes", all(&metrics.writes)),
        ("flushes", all(&metrics.flushes)),
        ("discards", all(&metrics.discards)),
        ("write_zeroes", all(&metrics.write_zeroes)),
        ("refused", kinds.iter().map(refused).fold(0, u64::saturating_add)),
        ("unanswered", metrics.unanswered),
        ("bytes_read", metrics.bytes_read),
        ("bytes_written", metrics.bytes_written),
        ("syncs", metrics.syncs),
        ("errors", metrics.errors),
    ]
}

/// A queue at work.
struct Job {
    queue: Queue,
    signal: QueueSignal,
    features: u64,
}

/// What a queue's thread shares with the server's.
struct Bench {
    engine: Arc<Engine>,
    times: Arc<Times>,
    memory: EndpointSpace<AllWindows>,
    kick: Arc<OwnedFd>,
    /// Locked for a batch at a time.
    job: Mutex<Option<Job>>,
    /// Somebody wants the job: the thread lets go after its batch.
    wanted: AtomicBool,
    over: AtomicBool,
    hush: Hush,
}

impl Bench {
    fn job(&self) -> MutexGuard<'_, Option<Job>> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_job(&self, job: Option<Job>) -> Option<Job> {
        self.wanted.store(true, Ordering::SeqCst);
        let before = core::mem::replace(&mut *self.job(), job);
        self.wanted.store(false, Ordering::SeqCst);
        before
    }

    fn kick(&self) {
        let _full = rustix::io::write(&self.kick, &1_u64.to_ne_bytes());
    }

    /// The thread: a batch, and another, until there is nothing; then it waits for a kick.
    fn run(&self) {
        while !self.over.load(Ordering::SeqCst) {
            if rustix::io::read(&self.kick, &mut [0_u8; 8]).is_err() {
                continue;
            }
            while self.batch() {}
        }
    }

    /// Gives whether there is more.
    fn batch(&self) -> bool {
        if self.wanted.load(Ordering::SeqCst) || self.over.load(Ordering::SeqCst) {
            // Whoever takes the job away, kicks if it gives one again.
            return false;
        }
        let mut job = self.job();
        let Some(Job { queue, signal, features }) = &mut *job else { return false };
        let start = Instant::now();
        match self.engine.process(*features, queue, &self.memory) {
            Ok(processed) => {
                if processed.requests > 0 {
                    self.times.add(start.elapsed());
                }
                if processed.interrupt {
                    signal.interrupt();
                }
                processed.more
            }
            Err(error) => {
                if self.hush.allows() {
                    let queue = thread::current();
                    tracing::warn!("{}: {error}", queue.name().unwrap_or_default());
                }
                signal.needs_reset();
                *job = None;
                false
            }
        }
    }
}

/// A queue's thread; dropping it ends and joins the thread.
struct Worker {
    bench: Arc<Bench>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.bench.over.store(true, Ordering::SeqCst);
        self.bench.kick();
        if let Some(thread) = self.thread.take() {
            // It has said itself what was wrong.
            let _panicked = thread.join();
        }
    }
}

/// What a device is behind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Behind {
    /// Our IOMMU.
    pub(crate) iommu: bool,
    /// Somebody else's, perhaps.
    pub(crate) platform: bool,
}

/// A virtio device that reaches memory as its endpoint.
pub(crate) struct EndpointDevice {
    address: Bdf,
    engine: Arc<Engine>,
    unit: Unit,
    /// There is an IOMMU, so its driver must use I/O virtual addresses.
    behind: bool,
    /// It says that there may be one.
    platform: bool,
    features: u64,
    workers: Vec<Worker>,
}

impl EndpointDevice {
    /// Starts the threads. They wait until the driver comes.
    pub(crate) fn new(
        address: Bdf,
        engine: Arc<Engine>,
        times: &Arc<Times>,
        endpoint: &Endpoint,
        unit: Unit,
        windows: &Windows,
        Behind { iommu: behind, platform }: Behind,
    ) -> io::Result<Self> {
        let mut workers = Vec::new();
        for index in 0..engine.queues() {
            let label = format!("{address} queue {index}");
            let reader = endpoint.reader(&label).ok_or_else(|| io::Error::other("the endpoint is gone"))?;
            let bench = Arc::new(Bench {
                engine: engine.clone(),
                times: times.clone(),
                memory: EndpointSpace::new(reader, windows.with_read_only()),
                kick: Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?),
                job: Mutex::default(),
                wanted: AtomicBool::new(false),
                over: AtomicBool::new(false),
                hush: Hush::default(),
            });
            let run = bench.clone();
            let thread = thread::Builder::new().name(label).spawn(move || run.run())?;
            workers.push(Worker { bench, thread: Some(thread) });
        }
        Ok(Self { address, engine, unit, behind, platform, features: 0, workers })
    }
}

impl Device for EndpointDevice {
    fn device_type(&self) -> u16 {
        match &*self.engine {
            Engine::Blk(_) => Blk::DEVICE_TYPE,
            Engine::Rng(_) => Rng::DEVICE_TYPE,
        }
    }

    fn class(&self) -> u32 {
        match &*self.engine {
            // Mass storage, other: as firmware expects of virtio-blk.
            Engine::Blk(_) => 0x01_80_00,
            Engine::Rng(_) => 0xff_00_00,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.workers.len()]
    }

    fn features(&self) -> u64 {
        let platform = if self.behind || self.platform { feature::ACCESS_PLATFORM } else { 0 };
        self.engine.features() | feature::INDIRECT_DESC | feature::EVENT_IDX | platform
    }

    fn negotiate(&mut self, features: u64) -> bool {
        self.features = features;
        // A driver that does not know of the IOMMU would give addresses that mean something else.
        !self.behind || features & feature::ACCESS_PLATFORM != 0
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(self.engine.config().iter().skip(from)) {
            *to = *from;
        }
    }

    fn start(&mut self, index: u16, queue: Queue, signal: QueueSignal) {
        if let Some(Worker { bench, .. }) = self.workers.get(usize::from(index)) {
            bench.set_job(Some(Job { queue, signal, features: self.features }));
            bench.kick();
        }
    }

    fn stop(&mut self, index: u16) {
        if let Some(Worker { bench, .. }) = self.workers.get(usize::from(index)) {
            bench.set_job(None);
        }
    }

    fn notify(&mut self, index: u16) {
        if let Some(Worker { bench, .. }) = self.workers.get(usize::from(index)) {
            bench.kick();
        }
    }

    fn reset(&mut self, by: ResetBy) {
        self.features = 0;
        if by == ResetBy::Machine
            && let Err(error) = self.engine.flush()
        {
            tracing::error!("{}: what was written may be lost: {error}", self.address);
        }
    }

    fn doorbell(&self, index: u16) -> Option<Arc<OwnedFd>> {
        self.workers.get(usize::from(index)).map(|worker| worker.bench.kick.clone())
    }

    fn mapped(&mut self, window: Window) {
        self.unit.add(self.address, window);
    }

    fn unmapped(&mut self, window: Window) {
        self.unit.remove(self.address, window);
    }
}
