//! A front end and a back end, each with a naive rest of vhost-user behind it.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use viommu::subscribe::FenceFailed;
use viommu::{Completion, Domain, Endpoint, EndpointConfig, Interest, Iommu, Subscription, Tables};
use viommu_memory::ram_extents;
use viommu_vhost::spec::{IotlbMsg, VIRTIO_F_ACCESS_PLATFORM};
use viommu_vhost::user::backend::{Backend, BackendError, BackendOptions};
use viommu_vhost::user::frontend::{Frontend, FrontendError};
use viommu_vhost::user::spec::{Header, MemoryRegion, MemoryTable, flag, protocol, request};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};
use zerocopy::{FromBytes, IntoBytes};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Guest memory in a file to share: regions at these guest addresses.
pub(crate) fn memory(regions: &[(u64, u64)]) -> GuestMemoryMmap {
    let regions = regions.iter().map(|(start, bytes)| {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, *bytes).unwrap();
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        let bytes = usize::try_from(*bytes).unwrap();
        let file = Some(FileOffset::new(File::from(fd), 0));
        GuestRegionMmap::from_range(GuestAddress(*start), bytes, file).unwrap()
    });
    GuestMemoryMmap::from_regions(regions.collect()).unwrap()
}

/// The user address of a guest address.
pub(crate) fn user(memory: &GuestMemoryMmap, gpa: u64) -> u64 {
    u64::try_from(memory.get_host_address(GuestAddress(gpa)).unwrap().addr()).unwrap()
}

/// One end that writes messages and reads answers, and waits for them.
pub(crate) struct Caller(pub(crate) UnixStream);

impl Caller {
    pub(crate) fn send(&mut self, request: u32, flags: u32, payload: &[u8], files: &[&File]) {
        let size = u32::try_from(payload.len()).unwrap();
        let header =
            Header { request: request.into(), flags: (flags | flag::VERSION).into(), size: size.into() };
        let bytes = [header.as_bytes(), payload].concat();
        let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        let mut space = [core::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let sent = sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// The next message: request, flags, payload; `None` at the end.
    pub(crate) fn receive(&mut self) -> Option<(u32, u32, Vec<u8>)> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).ok()?;
        let header = Header::read_from_bytes(&header).unwrap();
        let mut payload = vec![0; usize::try_from(header.size.get()).unwrap()];
        self.0.read_exact(&mut payload).ok()?;
        Some((header.request.get(), header.flags.get(), payload))
    }

    /// Sends, and waits for the number that is the answer; `None` when the connection ends instead.
    pub(crate) fn ask(&mut self, request: u32, payload: &[u8], files: &[&File]) -> Option<u64> {
        self.send(request, flag::NEED_REPLY, payload, files);
        let (answered, flags, payload) = self.receive()?;
        assert_eq!((answered, flags), (request, flag::VERSION | flag::REPLY));
        Some(u64::read_from_bytes(&payload).unwrap())
    }

    pub(crate) fn iotlb(&mut self, message: &IotlbMsg) -> Option<u64> {
        self.ask(request::IOTLB_MSG, message.as_bytes(), &[])
    }

    pub(crate) fn features(&mut self, features: u64) {
        assert_eq!(self.ask(request::SET_FEATURES, features.as_bytes(), &[]), Some(0));
    }

    pub(crate) fn protocol(&mut self) {
        let wanted = protocol::REPLY_ACK | protocol::BACKEND_REQ;
        assert_eq!(self.ask(request::SET_PROTOCOL_FEATURES, wanted.as_bytes(), &[]), Some(0));
    }

    pub(crate) fn table(&mut self, memory: &GuestMemoryMmap) -> Option<u64> {
        let mut payload = Vec::new();
        let mut files = Vec::new();
        for region in memory.iter() {
            let file = region.file_offset().unwrap();
            files.push(file.file());
            let start = region.start_addr().0;
            let said = MemoryRegion {
                guest: start.into(),
                size: region.len().into(),
                user: user(memory, start).into(),
                offset: file.start().into(),
            };
            payload.extend_from_slice(said.as_bytes());
        }
        let count = u32::try_from(files.len()).unwrap();
        let head = MemoryTable { regions: count.into(), ..MemoryTable::default() };
        self.ask(request::SET_MEM_TABLE, &[head.as_bytes(), &payload].concat(), &files)
    }
}

/// A daemon's vhost-user code that says yes to everything.
pub(crate) fn yes(socket: UnixStream) -> JoinHandle<Vec<u32>> {
    thread::spawn(move || {
        let (mut caller, mut seen) = (Caller(socket), Vec::new());
        while let Some((request, flags, _)) = caller.receive() {
            seen.push(request);
            if flags & flag::NEED_REPLY != 0 {
                let header = Header {
                    request: request.into(),
                    flags: (flag::VERSION | flag::REPLY).into(),
                    size: 8.into(),
                };
                let bytes = [header.as_bytes(), 0_u64.as_bytes()].concat();
                if caller.0.write_all(&bytes).is_err() {
                    break;
                }
            }
        }
        seen
    })
}

/// A back end that is served by a thread.
pub(crate) struct Device {
    pub(crate) backend: Arc<Backend>,
    pub(crate) server: JoinHandle<BackendError>,
    pub(crate) daemon: JoinHandle<Vec<u32>>,
}

impl Device {
    pub(crate) fn new(main: UnixStream, options: BackendOptions) -> Self {
        let (backend, inner) = Backend::new(main, options).unwrap();
        let backend = Arc::new(backend);
        let serving = backend.clone();
        Self { backend, server: thread::spawn(move || serving.serve()), daemon: yes(inner) }
    }

    pub(crate) fn end(self) -> BackendError {
        self.backend.close();
        let error = self.server.join().unwrap();
        self.daemon.join().unwrap();
        error
    }
}

/// A unit with one endpoint in one domain, whose device is behind a [`Frontend`] that is served by a thread.
pub(crate) struct Vmm {
    pub(crate) iommu: Iommu,
    pub(crate) endpoint: Endpoint,
    pub(crate) domain: Domain,
    pub(crate) memory: Arc<GuestMemoryMmap>,
    pub(crate) frontend: Arc<Frontend>,
    pub(crate) subscription: Arc<Subscription>,
    pub(crate) server: JoinHandle<FrontendError>,
    pub(crate) caller: Caller,
}

impl Vmm {
    pub(crate) fn new(
        main: UnixStream,
        memory: GuestMemoryMmap,
        limit: Duration,
        cut_off: impl FnMut() -> Result<(), FenceFailed> + Send + 'static,
    ) -> Self {
        let memory = Arc::new(memory);
        let builder =
            ram_extents(&*memory).unwrap().into_iter().fold(Iommu::builder(), |b, extent| b.backing(extent));
        let iommu = builder.build().unwrap();
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        endpoint.attach(1).unwrap().wait().unwrap();
        let (frontend, inner) = Frontend::new(main, limit, None).unwrap();
        let cache = frontend.cache(memory.clone(), Box::new(cut_off));
        let subscription = Arc::new(endpoint.subscribe_cache(Box::new(cache), Interest::CACHE).unwrap());
        let frontend = Arc::new(frontend);
        let (serving, fills) = (frontend.clone(), subscription.clone());
        let server = thread::spawn(move || serving.serve(&fills));
        Self { iommu, endpoint, domain, memory, frontend, subscription, server, caller: Caller(inner) }
    }

    /// What an embedder says before the device runs.
    pub(crate) fn negotiate(&mut self) {
        self.caller.protocol();
        self.caller.features(VIRTIO_F_ACCESS_PLATFORM | 1 << 32);
        assert_eq!(self.caller.table(&self.memory), Some(0));
    }
}

/// Waits with a limit: a completion that does not come is a failed test, not one that hangs.
pub(crate) fn wait(mut done: Completion) {
    done.wait_timeout(LIMIT).unwrap();
}
