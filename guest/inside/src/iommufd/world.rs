//! A record with two endpoints, whose devices are behind one iommufd.

use std::{
    error::Error,
    fs::File,
    ops::ControlFlow,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use viommu::{
    Access, BindingHandle, Domain, Endpoint, EndpointConfig, Incident, Iommu, Iova, IovaRange, Medium,
    Tables, View,
};
use viommu_vfio::iommufd::{Device, Handle, Iommufd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::type1::world::{STEP, backing, memory, over};

/// The whole.
pub(super) struct World {
    pub(super) iommu: Iommu,
    pub(super) domains: [Domain; 2],
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) binding: BindingHandle,
    pub(super) handle: Handle,
    pub(super) incidents: Arc<Mutex<Vec<Incident>>>,
    pub(super) memory: GuestMemoryMmap<()>,
}

/// Opens a file for reading and writing.
pub(super) fn open(path: &str) -> Result<OwnedFd, Box<dyn Error>> {
    let file = File::options().read(true).write(true).open(path);
    Ok(file.map_err(|error| format!("{path}: {error}"))?.into())
}

impl World {
    /// Over an iommufd, with an endpoint for each device, all in the first domain.
    ///
    /// # Errors
    ///
    /// If a device cannot be added.
    pub(super) fn new(
        iommufd: Iommufd,
        devices: Vec<Box<dyn Device>>,
        memory: GuestMemoryMmap<()>,
    ) -> Result<World, Box<dyn Error>> {
        let incidents = Arc::new(Mutex::new(Vec::new()));
        let alarm = incidents.clone();
        let builder = Iommu::builder().table_bytes(48 << 20).alarm(move |incident| {
            if let Ok(mut incidents) = alarm.lock() {
                incidents.push(incident.clone());
            }
        });
        let iommu =
            backing()?.into_iter().fold(builder, |builder, extent| builder.backing(extent)).build()?;
        let domains = [iommu.create_domain(1, Tables::Owned)?, iommu.create_domain(2, Tables::Owned)?];
        let (binding, handle) = iommufd.binding(Arc::new(memory.clone()));
        let binding = iommu.add_binding(Box::new(binding));
        let mut endpoints = Vec::new();
        for (at, device) in (32..).zip(devices) {
            let endpoint = iommu.add_endpoint(at, EndpointConfig::default())?;
            handle.add(endpoint.id(), device)?;
            over(endpoint.bind_with(&binding)?)?;
            over(endpoint.attach(1)?)?;
            endpoints.push(endpoint);
        }
        Ok(World { iommu, domains, endpoints, binding, handle, incidents, memory })
    }

    /// The same, with memory of this program's own.
    ///
    /// # Errors
    ///
    /// As [`World::new`].
    pub(super) fn plain(iommufd: Iommufd, devices: Vec<Box<dyn Device>>) -> Result<World, Box<dyn Error>> {
        World::new(iommufd, devices, memory()?)
    }

    /// What an endpoint sees.
    fn seen(&self, endpoint: &Endpoint) -> Option<Domain> {
        match endpoint.view() {
            Some(View::Identity) => Some(self.iommu.identity()),
            Some(View::Domain(id)) => self.iommu.domain(id),
            _ => None,
        }
    }

    /// Where each page of `range` that an endpoint's device must reach lies in this process, by the record and the
    /// backing alone.
    pub(super) fn expected(&self, endpoint: &Endpoint, range: IovaRange) -> Vec<(u64, u64)> {
        let Some(domain) = self.seen(endpoint).filter(|_| !endpoint.is_fenced()) else { return Vec::new() };
        let backing = self.iommu.backing();
        let apertures = self.handle.limits(endpoint.id()).map(|limits| limits.apertures).unwrap_or_default();
        let mut due = Vec::new();
        domain.for_each(range, |mapping| {
            let pages = (mapping.range.start().0..=mapping.range.last().0).step_by(4096);
            for at in pages.filter(|at| range.contains(Iova(*at))) {
                let gpa = mapping.translate(Iova(at));
                let there = backing.iter().any(|e| e.range.contains(gpa) && e.medium == Medium::Ram);
                let inside = apertures.iter().any(|aperture| aperture.contains(Iova(at)));
                let address = self.memory.get_host_address(GuestAddress(gpa.0));
                if let (true, true, Ok(address)) =
                    (there && inside, mapping.access.intersects(Access::RW), address)
                {
                    due.push((at, address.expose_provenance() as u64));
                }
            }
            ControlFlow::Continue(())
        });
        due
    }

    /// Unplugs everything: a record that goes with endpoints bound keeps their devices.
    ///
    /// # Errors
    ///
    /// If a device cannot be had back.
    pub(super) fn end(self) -> Result<(), Box<dyn Error>> {
        for endpoint in self.endpoints {
            let id = endpoint.id();
            over(endpoint.remove()?)?;
            drop(self.handle.remove(id)?);
        }
        Ok(())
    }

    /// No mirror or device was cut off.
    pub(super) fn unhurt(&self) -> Result<(), Box<dyn Error>> {
        match &self.incidents.lock().map_err(|_| "poisoned")?[..] {
            [] => Ok(()),
            incidents => Err(format!("unforeseen: {incidents:?}").into()),
        }
    }
}

/// Pages `first` to `last`, where the mock IOMMU's aperture is.
pub(super) const BASE: u64 = 8192;

/// An address of the device's, by its page.
pub(super) fn at(page: u64) -> u64 {
    (BASE + page) * STEP
}
