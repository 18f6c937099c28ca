//! A disk in a process of its own, behind an IOMMU: `vhost_user_blk SOCKET IMAGE`. It listens, serves one connection, and
//! says at its end what went through its IOTLB.
//!
//! The vhost-user code is the `vhost` crate's; viommu takes the IOTLB out of the connection before it.
//! ```text
//! qemu-system-x86_64 ... -device intel-iommu,caching-mode=on
//!     -object memory-backend-memfd,id=ram,size=256M,share=on -machine memory-backend=ram
//!     -chardev socket,id=disk,path=SOCKET
//!     -device vhost-user-blk-pci,chardev=disk,num-queues=1,iommu_platform=on,disable-legacy=on
//! ```

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
    VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use viommu_devices::{Blk, BlkOptions};
use viommu_vhost::spec::VIRTIO_F_ACCESS_PLATFORM;
use viommu_vhost::user::backend::{Backend, BackendOptions, DeviceMemory, MissError, Ring};
use virtio_queue::{Queue, QueueT};

const VERSION_1: u64 = 1 << 32;
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
/// Chains that a batch of the disk takes at most.
const BATCH: u16 = 64;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [socket, image] = &words[..] else {
        eprintln!("error: it takes a socket's path and an image's");
        return ExitCode::from(2);
    };
    match serve(Path::new(socket), Path::new(image)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(socket: &Path, image: &Path) -> Result<(), Box<dyn Error>> {
    let disk = Blk::open(image, &BlkOptions::default())?;
    let listener = UnixListener::bind(socket)?;
    println!("ready");
    let (stream, _) = listener.accept()?;

    let (backend, inner) = Backend::new(stream, BackendOptions::default())?;
    let backend = Arc::new(backend);
    let serving = backend.clone();
    let iotlb = thread::spawn(move || serving.serve());

    let daemon = Arc::new(Mutex::new(Daemon::new(disk, backend.clone())?));
    let mut handler = BackendReqHandler::from_stream(inner, daemon.clone());
    let error = loop {
        if let Err(error) = handler.handle_request() {
            break error;
        }
    };
    backend.close();
    daemon.lock().unwrap_or_else(PoisonError::into_inner).stop();
    let ended = iotlb.join().map_err(|_| "the IOTLB's thread has panicked")?;
    let counts = backend.counts();
    println!("ended: {error}; {ended}");
    println!(
        "iotlb misses={} updates={} invalidates={} refused={}",
        counts.misses, counts.updates, counts.invalidates, counts.refused
    );
    Ok(())
}

/// What vhost-user says of the only queue.
struct Daemon {
    disk: Arc<Blk>,
    backend: Arc<Backend>,
    memory: DeviceMemory,
    features: u64,
    size: u16,
    base: u16,
    rings: [u64; 3],
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    worker: Option<Worker>,
}

struct Worker {
    stop: File,
    /// Gives the next entry of the available ring.
    thread: JoinHandle<u16>,
}

impl Daemon {
    fn new(disk: Blk, backend: Arc<Backend>) -> Result<Self, Box<dyn Error>> {
        let memory = backend.memory()?;
        Ok(Self {
            disk: Arc::new(disk),
            backend,
            memory,
            features: 0,
            size: 0,
            base: 0,
            rings: [0; 3],
            kick: None,
            call: None,
            enabled: false,
            worker: None,
        })
    }

    /// Starts the queue if all is there.
    fn start(&mut self) -> Result<(), Box<dyn Error>> {
        if self.worker.is_some() || !self.enabled {
            return Ok(());
        }
        let Some(kick) = &self.kick else { return Ok(()) };
        let address = |said| self.backend.ring_address(said).ok_or("a ring is outside memory");
        let (descriptors, available) = (address(self.rings[0])?, address(self.rings[1])?);
        let ring =
            Ring { descriptors, available, used: address(self.rings[2])?, size: self.size, next: self.base };
        let mut queue = Queue::new(self.size)?;
        queue.set_size(self.size);
        queue.try_set_desc_table_address(ring.descriptors)?;
        queue.try_set_avail_ring_address(ring.available)?;
        queue.try_set_used_ring_address(ring.used)?;
        queue.set_next_avail(self.base);
        queue.set_next_used(self.base);
        queue.set_event_idx(self.features & EVENT_IDX != 0);
        queue.set_ready(true);

        let stop = File::from(eventfd(0, EventfdFlags::CLOEXEC)?);
        let running = Running {
            disk: self.disk.clone(),
            memory: self.memory.clone(),
            features: self.features,
            queue,
            ring,
            kick: kick.try_clone()?,
            call: self.call.as_ref().map(File::try_clone).transpose()?,
            stop: stop.try_clone()?,
        };
        self.worker = Some(Worker { stop, thread: thread::spawn(move || running.run()) });
        Ok(())
    }

    fn stop(&mut self) {
        let Some(worker) = self.worker.take() else { return };
        // It can be counted up once at least.
        let _told = (&worker.stop).write_all(&1_u64.to_ne_bytes());
        match worker.thread.join() {
            Ok(next) => self.base = next,
            Err(_) => eprintln!("the queue's thread has panicked"),
        }
    }

    fn restart(&mut self) -> VhostResult<()> {
        self.stop();
        self.start().map_err(|error| {
            eprintln!("the queue does not start: {error}");
            VhostError::BackendInternalError
        })
    }
}

/// The queue at work, on a thread of its own.
struct Running {
    disk: Arc<Blk>,
    memory: DeviceMemory,
    features: u64,
    queue: Queue,
    ring: Ring,
    kick: File,
    call: Option<File>,
    stop: File,
}

impl Running {
    fn run(mut self) -> u16 {
        loop {
            let mut fds = [PollFd::new(&self.stop, PollFlags::IN), PollFd::new(&self.kick, PollFlags::IN)];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            if !fds[0].revents().is_empty() {
                return self.queue.next_avail();
            }
            let mut count = [0; 8];
            if (&self.kick).read_exact(&mut count).is_ok() && !self.requests() {
                return self.queue.next_avail();
            }
        }
    }

    /// Does what is in the ring; whether it goes on.
    fn requests(&mut self) -> bool {
        loop {
            // What the batch reaches is asked for here, where no guard is held and an unmap can go on.
            self.ring.next = self.queue.next_avail();
            match self.memory.prepare_ring(&self.ring, BATCH) {
                // The disk finds what is not there, and tells the driver.
                Ok(()) | Err(MissError::Refused | MissError::TimedOut | MissError::TooMany) => {}
                Err(error) => {
                    eprintln!("the queue stops: {error}");
                    return false;
                }
            }
            match self.disk.process(self.features, &mut self.queue, &self.memory) {
                Ok(done) => {
                    if done.interrupt
                        && let Some(call) = &mut self.call
                    {
                        // A driver that has not looked for 2^64 interrupts is not told of one more.
                        let _told = call.write_all(&1_u64.to_ne_bytes());
                    }
                    if !done.more {
                        return true;
                    }
                }
                Err(error) => {
                    eprintln!("the queue stops: {error}");
                    return false;
                }
            }
        }
    }
}

fn unsupported<T>() -> VhostResult<T> {
    Err(VhostError::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Daemon {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.stop();
        Ok(())
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.stop();
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        let ring = VERSION_1 | INDIRECT_DESC | EVENT_IDX | VIRTIO_F_ACCESS_PLATFORM;
        Ok(self.disk.features() | ring | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        self.features = features;
        // Without it the queue is enabled from the start.
        self.enabled |= features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        _table: &[VhostUserMemoryRegion],
        _files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        Ok(None) // the back end has it
    }

    fn set_vring_num(&mut self, _index: u32, num: u32) -> VhostResult<()> {
        self.size = u16::try_from(num).map_err(|_| VhostError::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        _index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        self.rings = [descriptor, available, used];
        Ok(())
    }

    fn set_vring_base(&mut self, _index: u32, base: u32) -> VhostResult<()> {
        self.base = u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        self.stop();
        (self.kick, self.call) = (None, None);
        Ok(VhostUserVringState::new(index, self.base.into()))
    }

    fn set_vring_kick(&mut self, _index: u8, fd: Option<File>) -> VhostResult<()> {
        self.kick = fd;
        self.restart()
    }

    fn set_vring_call(&mut self, _index: u8, fd: Option<File>) -> VhostResult<()> {
        self.call = fd;
        self.restart()
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> VhostResult<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        type Bits = VhostUserProtocolFeatures;
        Ok(Bits::REPLY_ACK | Bits::BACKEND_REQ | Bits::CONFIG | Bits::MQ)
    }

    fn set_protocol_features(&mut self, _features: u64) -> VhostResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(1)
    }

    fn set_vring_enable(&mut self, _index: u32, enable: bool) -> VhostResult<()> {
        self.enabled = enable;
        self.restart()
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        let [offset, size] = [offset, size].map(|number| usize::try_from(number).unwrap_or(usize::MAX));
        let mut config = vec![0; size];
        let there = self.disk.config().get(offset..).unwrap_or_default();
        config.iter_mut().zip(there).for_each(|(to, from)| *to = *from);
        Ok(config)
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        Ok(()) // nothing in it can be written
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> VhostResult<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> VhostResult<()> {
        unsupported()
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        unsupported()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        unsupported()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        unsupported()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> VhostResult<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        unsupported()
    }
}
