//! What is served: the IOMMU, the devices behind it, and a thread with a socket for each.

mod endpoint;
mod iommu;
mod unit;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use viommu::{Endpoint, EndpointConfig, Iommu};
use viommu_vfio_user::{
    Device as VirtioDevice, Link, Server, Stopper, VirtioFunction, WindowLimits, Windows,
};
use viommu_virtio::viot::Bdf;
use viommu_virtio::{Config, EndpointPlan, VirtioIommu};

use self::endpoint::{EndpointDevice, Engine};
use self::iommu::IommuDevice;
use self::unit::Unit;
use super::options::{Device, IommuPlan, ServePlan};
use super::times::Times;

/// Something that keeps a machine from being served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// A device cannot be made.
    #[error("{address}={device}: {why}")]
    Device { address: Bdf, device: String, why: String },
    /// The IOMMU cannot be made so.
    #[error("the IOMMU: {0}")]
    Iommu(#[from] viommu_virtio::ConfigError),
    /// Without an IOMMU.
    #[error("the record: {0}")]
    Record(#[from] viommu::BuildError),
    /// A socket.
    #[error(transparent)]
    Bind(#[from] viommu_vfio_user::BindError),
    /// A thread or a descriptor.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A function that is served.
struct Served {
    stopper: Stopper,
    link: Link,
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
    engine: Arc<Engine>,
    served: Served,
}

/// The machine. Dropping it stops all that is served.
pub(crate) struct Machine {
    plan: ServePlan,
    unit: Unit,
    device: Option<VirtioIommu>,
    times: Arc<Times>,
    members: Mutex<BTreeMap<Bdf, Member>>,
    iommu: Option<Served>,
}

impl Machine {
    /// Makes the IOMMU and the devices, and serves them: their sockets are there when this returns.
    ///
    /// # Errors
    /// See [`MachineError`]. Nothing is served then.
    pub(crate) fn start(plan: ServePlan) -> Result<Self, MachineError> {
        let times = Arc::new(Times::default());
        let (unit, device) = match &plan.iommu {
            Some(iommu) => {
                let device = virtio_iommu(iommu)?;
                (Unit::new(device.iommu().clone()), Some(device))
            }
            None => (Unit::new(Iommu::builder().bypass(true).build()?), None),
        };
        let mut machine = Self { plan, unit, device, times, members: Mutex::default(), iommu: None };
        for device in machine.plan.devices.clone() {
            machine.add(device)?;
        }
        if let (Some(device), Some(plan)) = (&machine.device, &machine.plan.iommu) {
            let windows = Windows::new(machine.limits());
            let unit = machine.unit.clone();
            let function =
                IommuDevice::new(device.clone(), plan.address, unit, windows.clone(), machine.times.clone())?;
            let socket = machine.plan.iommu_socket();
            machine.iommu = Some(serve(function, windows, socket, machine.limits(), plan.address)?);
        }
        Ok(machine)
    }

    fn limits(&self) -> WindowLimits {
        WindowLimits { allow_unsealed: self.plan.allow_unsealed_memory, ..WindowLimits::default() }
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<Bdf, Member>> {
        // A device is put in or taken out as a whole.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a device. Its socket is there when this returns.
    fn add(&self, device: Device) -> Result<(), MachineError> {
        let address = device.address;
        let refused = |why: String| MachineError::Device { address, device: device.kind.to_string(), why };
        let engine = Arc::new(Engine::new(&device.kind, address).map_err(refused)?);
        let endpoint = self.add_endpoint(address).map_err(refused)?;
        let served = self.serve_device(address, &engine, &endpoint);
        let served = served.inspect_err(|_| self.remove_endpoint(address))?;
        self.members().insert(address, Member { device, engine, served });
        Ok(())
    }

    fn serve_device(
        &self,
        address: Bdf,
        engine: &Arc<Engine>,
        endpoint: &Endpoint,
    ) -> Result<Served, MachineError> {
        let windows = Windows::new(self.limits());
        let behind = self.device.is_some();
        let device =
            EndpointDevice::new(address, engine.clone(), endpoint, self.unit.clone(), &windows, behind)?;
        serve(device, windows, self.plan.socket(address), self.limits(), address)
    }

    fn add_endpoint(&self, address: Bdf) -> Result<Endpoint, String> {
        let id = u32::from(u16::from(address));
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
        let removed = match &self.device {
            Some(device) => device.remove_endpoint(id).map_err(|why| why.to_string()),
            None => match self.unit.iommu().endpoint(id) {
                Some(endpoint) => endpoint.remove().map_err(|why| why.to_string()),
                None => return,
            },
        };
        match removed {
            Ok(done) => unit::wait(done, "an endpoint that goes"),
            Err(why) => tracing::error!("{address} stays known to the IOMMU: {why}"),
        }
    }

    /// Stops all that is served and makes safe what was written.
    ///
    /// # Errors
    /// The disks whose data may be lost, and why.
    pub(crate) fn stop(mut self) -> Result<(), Vec<String>> {
        let members = core::mem::take(&mut *self.members());
        // All are told before one is waited for.
        members.values().for_each(|member| member.served.stopper.stop());
        self.iommu = None;
        let mut lost = Vec::new();
        for (address, Member { device, engine, served }) in members {
            drop(served);
            if let Err(error) = engine.flush() {
                lost.push(format!("{address}={}: what was written may be lost: {error}", device.kind));
            }
        }
        if lost.is_empty() { Ok(()) } else { Err(lost) }
    }
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
    let mut server = Server::bind(&socket, VirtioFunction::new(device, windows.clone()), limits)?;
    let (stopper, link) = (server.stopper(), server.link());
    let run = move || {
        if let Err(error) = server.run() {
            tracing::error!("{}: {error}", socket.display());
        }
    };
    let thread = thread::Builder::new().name(format!("{address} server")).spawn(run)?;
    Ok(Served { stopper, link, windows, thread: Some(thread) })
}
