//! An endpoint's view, with stock rust-vmm pieces over it.

mod access;
#[cfg(feature = "iommu")]
mod iommu_memory;
mod model;
mod queue;
mod quiescence;

use std::sync::Arc;

use viommu::{Access, Domain, Endpoint, EndpointConfig, Gpa, Iommu, Iova, IovaRange, Mapping, Tables};
use viommu_memory::{EndpointMemory, EndpointSpace, ram_extents};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const PAGE: u64 = 4096;

/// Memory of two neighbouring regions and one apart, all of it backing; an endpoint in a domain.
struct Rig {
    memory: Arc<Memory>,
    iommu: Iommu,
    endpoint: Endpoint,
    domain: Domain,
}

impl Rig {
    const REGIONS: [(u64, u64); 3] = [(0, 8), (8, 8), (20, 4)];

    fn new() -> Self {
        Self::with(EndpointConfig::default(), |builder| builder)
    }

    fn with(config: EndpointConfig, more: impl FnOnce(viommu::Builder) -> viommu::Builder) -> Self {
        let regions = Self::REGIONS
            .map(|(page, pages)| (GuestAddress(page * PAGE), usize::try_from(pages * PAGE).expect("small")));
        let memory = Arc::new(Memory::from_ranges(&regions).unwrap());
        let builder = ram_extents(&*memory).unwrap().into_iter().fold(Iommu::builder(), |b, e| b.backing(e));
        let iommu = more(builder).build().unwrap();
        let endpoint = iommu.add_endpoint(8, config).unwrap();
        let domain = iommu.create_domain(1, Tables::OwnedCut).unwrap();
        endpoint.attach(1).unwrap().wait().unwrap();
        Self { memory, iommu, endpoint, domain }
    }

    fn map(&self, iova: u64, pages: u64, gpa: u64, access: Access) -> IovaRange {
        let mapping = Mapping::new(Iova(iova), pages * PAGE, Gpa(gpa), access).unwrap();
        self.domain.map(mapping).unwrap().wait().unwrap();
        mapping.range
    }

    fn worker(&self) -> EndpointMemory<Arc<Memory>> {
        EndpointMemory::new(self.endpoint.reader("worker").unwrap(), self.memory.clone())
    }

    fn space(&self) -> EndpointSpace<Arc<Memory>> {
        EndpointSpace::new(self.endpoint.reader("space").unwrap(), self.memory.clone())
    }
}
