//! vm-memory's own `Iommu`, for those who have an `IommuMemory`.

use core::fmt;
use std::sync::Arc;
use std::time::Instant;

use viommu::Iova;
use viommu_memory::iommu::{EndpointIommu, IotlbGuard};
use vm_memory::iommu::{Error, Iommu, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, Permissions};

use super::BackendError;
use super::iotlb::Iotlb;
use super::misses::{Miss, MissError};
use crate::user::access_for;

/// The IOTLB as a [`vm_memory::Iommu`], which promises less than [`DeviceMemory`](super::DeviceMemory): see
/// [`EndpointIommu`]. What is not there is asked for and waited for under no guard of the same call; a thread that holds
/// another's iterator meanwhile holds up INVALIDATEs for as long.
#[derive(Clone)]
pub struct DeviceIommu {
    iotlb: Arc<Iotlb>,
    inner: EndpointIommu,
}

impl DeviceIommu {
    pub(super) fn new(iotlb: Arc<Iotlb>) -> Result<Self, BackendError> {
        let inner = EndpointIommu::new(iotlb.reader()?);
        Ok(Self { iotlb, inner })
    }
}

impl fmt::Debug for DeviceIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceIommu").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl Iommu for DeviceIommu {
    type IotlbGuard<'a> = IotlbGuard;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<IotlbGuard>, Error> {
        let now = Instant::now();
        let until = now.checked_add(self.iotlb.patience).unwrap_or(now);
        let mut before = None;
        loop {
            let (range, reason) = match self.inner.translate(iova, length, access) {
                Err(Error::CannotResolve { iova_range, reason }) => (iova_range, reason),
                outcome => return outcome,
            };
            // The guard of the call has gone with its error.
            let miss = Miss::at(Iova(range.base.0), access_for(access));
            let fetched = if before == Some((miss, reason.clone())) {
                Err(MissError::Refused)
            } else {
                self.iotlb.fetch(&[miss], false, until)
            };
            if let Err(error) = fetched {
                let iova_range = IovaRange { base: range.base, length: range.length };
                return Err(Error::CannotResolve { iova_range, reason: error.to_string() });
            }
            before = Some((miss, reason));
        }
    }
}
