//! What is served: the IOMMU, the devices behind it, and a thread with a socket for each.

mod endpoint;
mod iommu;
mod place;
mod proxy;
mod unit;
mod vtd;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use viommu::{Endpoint, EndpointConfig, EndpointId, Iommu, Subscription};
use viommu_trace::Scribe;
use viommu_vfio_user::virtio::{DriverState, status};
use viommu_vfio_user::{
    Device as VirtioDevice, Function, Link, Server, Stopper, VirtioFunction, WindowLimits, Windows,
};
use viommu_virtio::viot::Bdf;
use viommu_virtio::{Config, EndpointPlan, VirtioIommu};
use viommu_vtd::Vtd;

use self::endpoint::{Behind, EndpointDevice, Engine};
use self::iommu::IommuDevice;
pub(super) use self::place::Place;
use self::proxy::{ProxyFunction, Upstream};
use self::unit::Unit;
use self::vtd::VtdFunction;
use super::control::Live;
use super::control::protocol::Plugged;
use super::device::Kind;
use super::options::{Device, IommuPlan, Model, ServePlan, VtdPlan};
use super::record::Recording;
use super::snapshot::{self, Hex, Snapshot};
use super::times::Times;
use super::{qemu, snapshot::gather::nanos, viot};

/// A driver of an IOMMU sends its requests one at a time, and waits for each: about as long as the way from one answer to
/// the next kick.
const BUSY_POLL: Duration = Duration::from_micros(50);

/// Something that keeps a machine from being served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// A device cannot be made.
    #[error("{address}={device}: {why}")]
    Device { address: Bdf, device: String, why: String },
    /// The IOMMU cannot be made so.
    #[error("the IOMMU: {0}")]
    Iommu(#[from] viommu_virtio::ConfigError),
    /// The VT-d unit cannot be made so.
    #[error("the VT-d unit: {0}")]
    Vtd(#[from] viommu_vtd::ConfigError),
    /// Without an IOMMU.
    #[error("the record: {0}")]
    Record(#[from] viommu::BuildError),
    /// A socket.
    #[error(transparent)]
    Bind(#[from] viommu_vfio_user::BindError),
    /// The history cannot be begun.
    #[error("--record {path}: {source}", path = path.display())]
    History { path: PathBuf, source: io::Error },
    /// A thread or a descriptor.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A function that is served.
struct Served {
    address: Bdf,
    socket: PathBuf,
    stopper: Stopper,
    link: Link,
    /// Of a virtio device.
    driver: Option<DriverState>,
    windows: Windows,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            // It has said itself what was wrong.
            let _panicked = thread.join();
        }
    }
}

/// A device behind the IOMMU.
struct Member {
    device: Device,
    works: Works,
    served: Served,
    /// Of a VT-d unit whose history is written.
    followed: Option<Subscription>,
}

/// Who does what a device is there for.
#[derive(Clone)]
enum Works {
    /// This process.
    Engine(Arc<Engine>, Arc<Times>),
    /// Another.
    Upstream(Arc<Upstream>),
}

impl Works {
    fn flush(&self) -> io::Result<()> {
        match self {
            Self::Engine(engine, _) => engine.flush(),
            Self::Upstream(_) => Ok(()),
        }
    }

    /// The state with what it says itself.
    fn state(&self, function: snapshot::Function) -> snapshot::Function {
        match self {
            Self::Engine(engine, times) => snapshot::Function {
                request_times: Some(times.histogram()),
                counters: engine.counters(),
                ..function
            },
            Self::Upstream(upstream) => snapshot::Function {
                driver_ready: upstream.is_there(),
                counters: upstream.counters(),
                ..function
            },
        }
    }
}

/// A VT-d unit.
struct VtdParts {
    vtd: Vtd,
    /// Its client's memory, in which its tables are.
    windows: Windows,
    place: Arc<Place>,
    /// Of what a write of the queue's tail asks for.
    times: Arc<Times>,
}

/// The machine. Dropping it stops all that is served.
pub(crate) struct Machine {
    plan: ServePlan,
    unit: Unit,
    device: Option<VirtioIommu>,
    /// The other IOMMU that there may be.
    vtd: Option<VtdParts>,
    members: Mutex<BTreeMap<Bdf, Member>>,
    iommu: Mutex<Option<Served>>,
    recording: Option<Arc<Recording<File>>>,
    /// Writes what a VT-d unit's record makes of its driver's tables.
    scribe: Option<Arc<Scribe>>,
    started: Instant,
}

impl Machine {
    /// Makes the IOMMU and the devices, and serves them: their sockets are there when this returns.
    ///
    /// # Errors
    /// See [`MachineError`]. Nothing is served then.
    pub(crate) fn start(plan: ServePlan) -> Result<Self, MachineError> {
        let limits = WindowLimits { allow_unsealed: plan.allow_unsealed_memory, ..WindowLimits::default() };
        let (unit, device, vtd) = match &plan.iommu {
            Some(iommu) => match &iommu.model {
                Model::Virtio => {
                    let device = virtio_iommu(iommu)?;
                    (Unit::new(device.iommu().clone()), Some(device), None)
                }
                Model::Vtd(model) => {
                    let windows = Windows::new(limits);
                    let vtd = vtd_unit(iommu, model, &windows)?;
                    let dmar = viot::dmar_plan(&plan).unwrap_or_default();
                    let place = Arc::new(Place::new(plan.table_file(), dmar, model.base)?);
                    let unit = Unit::new(vtd.iommu().clone());
                    (unit, None, Some(VtdParts { vtd, windows, place, times: Arc::default() }))
                }
            },
            None => (Unit::new(Iommu::builder().bypass(true).build()?), None, None),
        };
        let recording = plan.record.as_ref().map(|path| {
            let failed = |source| MachineError::History { path: path.clone(), source };
            Recording::create(path).map_err(failed)
        });
        let recording = recording.transpose()?;
        let mut scribe = None;
        if let Some(recording) = &recording {
            if let Some(device) = &device {
                // The device is new: nobody else has taken its journal.
                device.journal(recording.clone());
            }
            scribe = vtd.as_ref().map(|_| {
                let recording = recording.clone();
                Scribe::new(move |event| recording.write(event))
            });
        }
        let (members, iommu, started) = (Mutex::default(), Mutex::default(), Instant::now());
        let machine = Self { plan, unit, device, vtd, members, iommu, recording, scribe, started };
        for device in machine.plan.devices.clone() {
            machine.add(device)?;
        }
        if let (Some(parts), Some(iommu)) = (&machine.vtd, &machine.plan.iommu) {
            let VtdParts { vtd, windows, place, times } = parts;
            let (unit, address) = (machine.unit.clone(), iommu.address);
            let (vtd, place, times) = (vtd.clone(), place.clone(), times.clone());
            let function = VtdFunction::new(vtd, address, unit, windows.clone(), place, times)?;
            let socket = machine.plan.iommu_socket();
            let served = serve_function(function, None, windows.clone(), socket, machine.limits(), address)?;
            *machine.iommu() = Some(served);
        }
        if let (Some(device), Some(plan)) = (&machine.device, &machine.plan.iommu) {
            let windows = Windows::new(machine.limits());
            let unit = machine.unit.clone();
            let function = IommuDevice::new(device.clone(), plan.address, unit, windows.clone())?;
            let socket = machine.plan.iommu_socket();
            let served = serve(function, windows, socket, machine.limits(), plan.address)?;
            *machine.iommu() = Some(served);
        }
        Ok(machine)
    }

    fn limits(&self) -> WindowLimits {
        WindowLimits { allow_unsealed: self.plan.allow_unsealed_memory, ..WindowLimits::default() }
    }

    /// What was asked for.
    pub(crate) fn plan(&self) -> &ServePlan {
        &self.plan
    }

    fn iommu(&self) -> MutexGuard<'_, Option<Served>> {
        self.iommu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<Bdf, Member>> {
        // A device is put in or taken out as a whole.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a device. Its socket is there when this returns.
    fn add(&self, device: Device) -> Result<(), MachineError> {
        let address = device.address;
        let refused = |why: String| MachineError::Device { address, device: device.kind.to_string(), why };
        if let Some(why) = self.plan.cannot_serve(&device.kind) {
            return Err(refused(why.into()));
        }
        let works = match Engine::new(&device.kind, address).map_err(refused)? {
            Some(engine) => Works::Engine(Arc::new(engine), Arc::default()),
            None => Works::Upstream(Arc::default()),
        };
        let endpoint = self.add_endpoint(address).map_err(refused)?;
        let followed = self.scribe.as_ref().map(|scribe| scribe.follow(&endpoint)).transpose();
        let followed = followed.map_err(|why| {
            self.remove_endpoint(address);
            refused(why.to_string())
        })?;
        let served = self.serve_device(&device, &works, &endpoint);
        let served = served.inspect_err(|_| self.remove_endpoint(address))?;
        self.members().insert(address, Member { device, works, served, followed });
        Ok(())
    }

    fn serve_device(
        &self,
        device: &Device,
        works: &Works,
        endpoint: &Endpoint,
    ) -> Result<Served, MachineError> {
        let address = device.address;
        let windows = Windows::new(self.limits());
        let unit = self.unit.clone();
        let (path, limits) = (self.plan.socket(address), self.limits());
        match (works, &device.kind) {
            (Works::Engine(engine, times), _) => {
                let behind = Behind { iommu: self.plan.iommu.is_some(), platform: self.plan.access_platform };
                let device =
                    EndpointDevice::new(address, engine.clone(), times, endpoint, unit, &windows, behind)?;
                serve(device, windows, path, limits, address)
            }
            (Works::Upstream(upstream), kind) => {
                let Kind::Proxy { socket } = kind else {
                    return Err(io::Error::other("a device without an engine").into());
                };
                let (upstream, endpoint) = (upstream.clone(), endpoint.clone());
                let function =
                    ProxyFunction::new(address, socket.clone(), endpoint, unit, windows.clone(), upstream)?;
                serve_function(function, None, windows, path, limits, address)
            }
        }
    }

    fn add_endpoint(&self, address: Bdf) -> Result<Endpoint, String> {
        let id = u32::from(u16::from(address));
        if let Some(VtdParts { vtd, .. }) = &self.vtd {
            return vtd.add_endpoint(address.into()).map_err(|why| why.to_string());
        }
        match (&self.device, &self.plan.iommu) {
            (Some(device), Some(iommu)) => {
                let plan = EndpointPlan::default();
                let plan =
                    iommu.regions.iter().fold(plan, |plan, region| plan.region(region.range, region.kind));
                let added = device.add_endpoint(id, plan).map_err(|why| why.to_string())?;
                Ok(added.endpoint)
            }
            _ => self.unit.iommu().add_endpoint(id, EndpointConfig::default()).map_err(|why| why.to_string()),
        }
    }

    fn remove_endpoint(&self, address: Bdf) {
        let id = u32::from(u16::from(address));
        let removed = match (&self.device, &self.vtd) {
            (_, Some(VtdParts { vtd, .. })) => {
                vtd.remove_endpoint(address.into()).map_err(|why| why.to_string())
            }
            (Some(device), None) => device.remove_endpoint(id).map_err(|why| why.to_string()),
            (None, None) => match self.unit.iommu().endpoint(id) {
                Some(endpoint) => endpoint.remove().map_err(|why| why.to_string()),
                None => return,
            },
        };
        match removed {
            Ok(done) => {
                unit::wait(done, "an endpoint that goes");
                if let Some(scribe) = &self.scribe {
                    scribe.forget(EndpointId::new(id));
                }
            }
            Err(why) => tracing::error!("{address} stays known to the IOMMU: {why}"),
        }
    }

    /// Stops all that is served and makes safe what was written.
    ///
    /// # Errors
    /// The disks whose data may be lost, and why.
    pub(crate) fn stop(&self) -> Result<(), Vec<String>> {
        let members = core::mem::take(&mut *self.members());
        // All are told before one is waited for.
        members.values().for_each(|member| member.served.stopper.stop());
        drop(self.iommu().take());
        let mut lost = Vec::new();
        for (address, Member { device, works, served, .. }) in members {
            drop(served);
            if let Err(error) = works.flush() {
                lost.push(format!("{address}={}: what was written may be lost: {error}", device.kind));
            }
        }
        if let Some(recording) = &self.recording {
            // It has said itself what is wrong with it.
            let _file = recording.finish();
        }
        if lost.is_empty() { Ok(()) } else { Err(lost) }
    }
}

fn vtd_unit(plan: &IommuPlan, model: &VtdPlan, windows: &Windows) -> Result<Vtd, MachineError> {
    let mut builder = Iommu::builder();
    if let Some(mappings) = plan.max_mappings {
        builder = builder.mappings(mappings);
    }
    if let Some(domains) = plan.max_domains {
        builder = builder.domains(domains);
    }
    Ok(Vtd::new(builder, windows.clone(), model.config())?)
}

fn virtio_iommu(plan: &IommuPlan) -> Result<VirtioIommu, MachineError> {
    let mut builder = Iommu::builder();
    if let Some(mappings) = plan.max_mappings {
        builder = builder.mappings(mappings);
    }
    if let Some(domains) = plan.max_domains {
        builder = builder.domains(domains);
    }
    let config = Config {
        page_size_mask: plan.page_size_mask,
        input_range: plan.input_range,
        probe_size: plan.probe_size(),
        bypass: plan.bypass,
        ..Config::default()
    };
    Ok(VirtioIommu::new(builder, config)?)
}

/// Serves a function on a thread of its own.
fn serve(
    device: impl VirtioDevice + 'static,
    windows: Windows,
    socket: PathBuf,
    limits: WindowLimits,
    address: Bdf,
) -> Result<Served, MachineError> {
    let function = VirtioFunction::new(device, windows.clone());
    let driver = Some(function.driver_state());
    serve_function(function, driver, windows, socket, limits, address)
}

fn serve_function(
    function: impl Function + 'static,
    driver: Option<DriverState>,
    windows: Windows,
    socket: PathBuf,
    limits: WindowLimits,
    address: Bdf,
) -> Result<Served, MachineError> {
    let mut server = Server::bind(&socket, function, limits)?.busy_poll(BUSY_POLL);
    let (stopper, link) = (server.stopper(), server.link());
    let run = move || {
        if let Err(error) = server.run() {
            tracing::error!("{address}: its socket is not served any more: {error}");
        }
    };
    let thread = thread::Builder::new().name(format!("{address} server")).spawn(run)?;
    Ok(Served { address, socket, stopper, link, driver, windows, thread: Some(thread) })
}

impl Served {
    fn state(&self, device: String) -> snapshot::Function {
        let windows = self.windows.list();
        let (memory, refused): (Vec<_>, Vec<_>) = windows.into_iter().partition(|window| window.memory);
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        snapshot::Function {
            address: self.address.to_string(),
            device,
            socket: self.socket.display().to_string(),
            connected: self.link.is_connected(),
            connections: self.link.clients(),
            driver_ready: self.driver.as_ref().is_some_and(|driver| driver.status() & status::DRIVER_OK != 0),
            features: Hex(self.driver.as_ref().map_or(0, DriverState::features)),
            memory: snapshot::Windows {
                windows: count(memory.len()),
                bytes: memory.iter().map(|window| window.size).sum(),
                refused: count(refused.len()),
            },
            request_times: None,
            counters: BTreeMap::new(),
        }
    }
}

impl Live for Machine {
    fn snapshot(&self, mappings: bool) -> Snapshot {
        let model = self.plan.iommu.as_ref().map(|iommu| iommu.model.to_string()).unwrap_or_default();
        let function = self.iommu().as_ref().map(|served| served.state(model));
        let iommu = function.and_then(|function| match (&self.device, &self.vtd) {
            (Some(device), _) => Some(snapshot::Iommu::of(device, function, self.started, mappings)),
            (None, Some(parts)) => {
                let function = snapshot::Function {
                    driver_ready: parts.vtd.is_translating(),
                    request_times: Some(parts.times.histogram()),
                    ..function
                };
                Some(snapshot::Iommu::of_vtd(&parts.vtd, &parts.place, function, self.started, mappings))
            }
            (None, None) => None,
        });
        let record = self.plan.iommu.as_ref().map(|_| self.unit.iommu());
        let members = self.members();
        let endpoints = members.iter().map(|(address, member)| {
            let function = member.works.state(member.served.state(member.device.kind.to_string()));
            snapshot::Endpoint::of(record, u32::from(u16::from(*address)), function)
        });
        Snapshot {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_ns: nanos(self.started.elapsed()),
            iommu,
            endpoints: endpoints.collect(),
        }
    }

    fn plug(&self, address: Bdf, device: Kind) -> Result<Plugged, String> {
        if !self.plan.takes_hotplug(address) {
            return Err(format!("{address} is in no --endpoint FIRST-LAST=hotplug of the server"));
        }
        if self.members().contains_key(&address) {
            return Err(format!("there is a device at {address} already"));
        }
        self.add(Device { address, kind: device }).map_err(|why| why.to_string())?;
        Ok(self.plugged(address, qemu::device_add(&self.plan, address)))
    }

    fn unplug(&self, address: Bdf) -> Result<Plugged, String> {
        if !self.plan.takes_hotplug(address) {
            return Err(format!("nothing was plugged in at {address}"));
        }
        let member = self.members().remove(&address);
        let Member { works, served, followed, .. } =
            member.ok_or_else(|| format!("there is no device at {address}"))?;
        drop(served);
        drop(followed);
        let flushed = works.flush();
        self.remove_endpoint(address);
        flushed.map_err(|why| format!("the device is gone, but what was written may be lost: {why}"))?;
        Ok(self.plugged(address, qemu::device_del(address)))
    }
}

impl Machine {
    fn plugged(&self, address: Bdf, qmp: String) -> Plugged {
        let socket = self.plan.socket(address).display().to_string();
        Plugged { address: address.to_string(), socket, qmp }
    }
}
