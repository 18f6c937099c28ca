//! A device of another process, behind the IOMMU: what the monitor asks for is passed on, and its DMA is confined to what the
//! guest mapped.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;
use viommu::{Endpoint, Gpa, GpaRange, Interest, Subscription};
use viommu_memory::EndpointSpace;
use viommu_vfio_user::client::{Client, ClientError, Handle, IrqFlags, MirrorOptions, SeenThrough};
use viommu_vfio_user::memory::Window;
use viommu_vfio_user::spec::{irq, region};
use viommu_vfio_user::{Function, Interrupts, IrqRequest, Link, Region, RegionFile, Windows};
use viommu_virtio::viot::Bdf;

use super::unit::{self, Unit};
use crate::serve::hush::Hush;

/// How long the device may take for a reply, and as long again to be cut off: together less than the 5 s that QEMU gives us
/// for ours.
const LIMIT: Duration = Duration::from_secs(2);
/// Configuration space of a function without any.
const CONFIG: u64 = 256;

/// What there is to be told of the device.
#[derive(Default)]
pub(crate) struct Upstream(Mutex<State>);

#[derive(Default)]
struct State {
    now: Option<(Client, Handle)>,
    connections: u64,
}

impl Upstream {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each field is whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it can be spoken with.
    pub(crate) fn is_there(&self) -> bool {
        // Not under the lock: a call may be under way.
        let now = self.lock().now.clone();
        now.is_some_and(|(client, _)| client.is_open())
    }

    /// What it has, by name.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        let (now, connections) = {
            let state = self.lock();
            (state.now.clone(), state.connections)
        };
        let handle = now.as_ref().map(|(_, handle)| handle);
        let left_out = handle.map_or(0, |handle| handle.left_out().len());
        let named = [
            ("upstream_connected", u64::from(self.is_there())),
            ("upstream_connections", connections),
            ("upstream_windows", handle.map_or(0, Handle::windows)),
            ("upstream_left_out", u64::try_from(left_out).unwrap_or(u64::MAX)),
        ];
        named.into_iter().map(|(name, count)| (name.to_owned(), count)).collect()
    }
}

/// The function.
pub(crate) struct ProxyFunction {
    address: Bdf,
    socket: PathBuf,
    endpoint: Endpoint,
    unit: Unit,
    windows: Windows,
    /// Nobody sets these: the client's go to the device.
    interrupts: Interrupts,
    /// Watches the connection that there is.
    watch: OwnedFd,
    way: Option<Way>,
    upstream: Arc<Upstream>,
    hush: Hush,
}

/// A connection to the device, and what it has.
struct Way {
    client: Client,
    handle: Handle,
    /// None once the device is gone for good.
    subscription: Option<Subscription>,
    bars: [u64; 6],
    config: u64,
    files: Vec<(Region, RegionFile)>,
    irqs: Vec<(IrqFlags, u32)>,
}

impl ProxyFunction {
    pub(crate) fn new(
        address: Bdf,
        socket: PathBuf,
        endpoint: Endpoint,
        unit: Unit,
        windows: Windows,
        upstream: Arc<Upstream>,
    ) -> std::io::Result<Self> {
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let (interrupts, hush) = (Interrupts::new(0), Hush::default());
        Ok(Self { address, socket, endpoint, unit, windows, interrupts, watch, way: None, upstream, hush })
    }

    fn connect(&self) -> Result<Way, Box<dyn core::error::Error>> {
        let stream = UnixStream::connect(&self.socket)?;
        epoll::add(&self.watch, &stream, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        let reader = self.endpoint.reader(&format!("{} messages", self.address));
        let view = EndpointSpace::new(reader.ok_or("the endpoint is gone")?, self.windows.with_read_only());
        let client = Client::connect(stream, LIMIT, SeenThrough(view))?;
        let info = client.info()?;
        if !info.pci || info.regions <= region::CONFIG {
            return Err("it is no PCI function".into());
        }
        let (mut bars, mut files) = ([0; 6], Vec::new());
        for (index, bar) in (0_u8..).zip(&mut bars) {
            let found = client.region_info(index.into())?;
            *bar = found.size;
            if let Some(file) = found.file {
                let file = RegionFile { file: Arc::new(file), offset: found.offset, areas: found.areas };
                files.push((Region::Bar(index), file));
            }
        }
        let config = client.region_info(region::CONFIG)?.size;
        let irqs = (0..info.irqs.min(irq::COUNT)).map(|index| client.irq_info(index));
        let irqs = irqs.map(|kind| kind.map(|kind| (kind.flags, kind.count))).collect::<Result<_, _>>()?;
        if info.reset {
            client.reset()?;
        }
        // It has no windows yet: what the endpoint sees is replayed.
        let (mirror, handle) = client.mirror(self.windows.with_read_only(), MirrorOptions::default());
        let subscription = self.endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR)?;
        Ok(Way { client, handle, subscription: Some(subscription), bars, config, files, irqs })
    }

    /// Says what went wrong; a device that answers no more would say it often.
    fn complain(&self, what: &str, error: &ClientError) {
        if self.hush.allows() {
            tracing::warn!("{}={}: {what}: {error}", self.address, self.socket.display());
        }
    }

    /// What of the mirror lies in a window of the client's is looked up again.
    fn refresh(&self, window: Window) {
        let range = GpaRange::from_len(Gpa(window.address), window.size);
        if let (Some(Way { handle, .. }), Some(range)) = (&self.way, range)
            && let Err(error) = handle.refresh(range)
        {
            tracing::error!(
                "{}={}: it may still reach memory that is gone, so stop the virtual machine: {error}",
                self.address,
                self.socket.display()
            );
        }
    }
}

fn index_of(region: Region) -> u32 {
    match region {
        Region::Bar(bar) => bar.into(),
        Region::Config => region::CONFIG,
    }
}

impl Function for ProxyFunction {
    fn bars(&self) -> [u64; 6] {
        self.way.as_ref().map_or([0; 6], |way| way.bars)
    }

    fn config_size(&self) -> u64 {
        self.way.as_ref().map_or(CONFIG, |way| way.config)
    }

    fn region_file(&self, region: Region) -> Option<RegionFile> {
        let way = self.way.as_ref()?;
        way.files.iter().find(|(at, _)| *at == region).map(|(_, file)| file.clone())
    }

    fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    fn irq_info(&self, index: u32) -> Option<(IrqFlags, u32)> {
        let there = self.way.as_ref().and_then(|way| way.irqs.get(usize::try_from(index).ok()?).copied());
        there.or_else(|| (index < irq::COUNT).then_some((IrqFlags::empty(), 0)))
    }

    fn set_irqs(&mut self, request: IrqRequest<'_>) -> Result<(), Errno> {
        let Some(way) = &self.way else { return Err(Errno::IO) };
        let IrqRequest { index, action, start, count, data, events } = request;
        way.client.set_irqs(index, action, start, count, data, &events).map_err(|error| match error {
            ClientError::Refused { errno, .. } if errno > 0 => Errno::from_raw_os_error(errno),
            ClientError::Request(_) => Errno::INVAL,
            error => {
                self.complain("interrupts", &error);
                Errno::IO
            }
        })
    }

    fn windows(&self) -> &Windows {
        &self.windows
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        let read = self.way.as_ref().map(|way| way.client.region_read(index_of(region), offset, data));
        // As a bus answers where nobody is.
        match read {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                self.complain("a read", &error);
                data.fill(0xff);
            }
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, region: Region, offset: u64, data: &[u8]) {
        let written = self.way.as_ref().map(|way| way.client.region_write(index_of(region), offset, data));
        if let Some(Err(error)) = written {
            self.complain("a write", &error);
        }
    }

    fn reset(&mut self) {
        if let Some(Err(error)) = self.way.as_ref().map(|way| way.client.reset()) {
            self.complain("a reset", &error);
        }
    }

    fn connected(&mut self, _: &Link) {
        match self.connect() {
            Ok(way) => {
                let mut state = self.upstream.lock();
                state.connections = state.connections.saturating_add(1);
                state.now = Some((way.client.clone(), way.handle.clone()));
                drop(state);
                self.way = Some(way);
            }
            Err(why) => tracing::warn!(
                "{}={}: the device is not there until the next client comes: {why}",
                self.address,
                self.socket.display()
            ),
        }
    }

    fn disconnected(&mut self) {
        self.upstream.lock().now = None;
        let Some(Way { client, subscription, .. }) = self.way.take() else { return };
        // The device gives back what it has, and then is reset by the end of its connection.
        if let Some(subscription) = subscription {
            unit::wait(subscription.leave(), "a device that is given up");
        }
        if !client.close("the virtual machine monitor has gone") {
            tracing::warn!("{}={}: it has not closed the connection", self.address, self.socket.display());
        }
    }

    fn mapped(&mut self, window: Window) {
        self.unit.add(self.address, window);
        // Where others had given memory already, the record has seen no change.
        self.refresh(window);
    }

    fn unmapped(&mut self, window: Window) {
        self.unit.remove(self.address, window);
        self.refresh(window);
    }

    fn events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.watch.as_fd()]
    }

    fn event(&mut self, _: usize) {
        if let Some(Err(error)) = self.way.as_ref().map(|way| way.client.serve()) {
            tracing::warn!(
                "{}={}: the device is gone until the next client comes: {error}",
                self.address,
                self.socket.display()
            );
        }
        // One that could not be fenced before has closed its end after all: what was held up by it goes on.
        if let Some(way) = &mut self.way
            && way.subscription.as_ref().is_some_and(Subscription::is_fenced)
            && way.client.close("the device is gone")
            && let Some(subscription) = way.subscription.take()
        {
            unit::wait(subscription.leave(), "a device that is gone");
        }
    }
}
