//! vm-memory's own `Iommu`, for those who have an `IommuMemory`.

use core::fmt;
use core::ops::Deref;

use viommu::{Iova, IovaRange as Range, Reader};
use vm_memory::iommu::{Error, Iommu, Iotlb, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, Permissions};

use crate::pool::{Entered, Pool};
use crate::slices::{access_of, bytes, is_memory};

/// An endpoint as a [`vm_memory::Iommu`]: each call fills an IOTLB of its own from the record, so that there is no
/// cache to invalidate.
///
/// It promises less than [`EndpointSpace`](crate::EndpointSpace), because of what `IommuMemory` is made of:
///
/// - The viommu guard is in the iterator that `translate` returns. `Bytes` methods (`write_obj`, `read_slice`, ...) keep
///   it while they access, so an unmap waits for them. But slices that are collected (by `virtio_queue::Reader` and
///   `Writer`, say) outlive it, and an unmap does not wait for them.
/// - Each access is a batch of its own, and a lookup copies every mapping that it meets.
/// - `IommuMemory` notes writes in one bitmap by I/O virtual address, not in those of the regions.
/// - An `IommuMemory` whose IOMMU is not enabled reaches all of memory. Bypass is viommu's to grant: leave it enabled.
#[derive(Clone)]
pub struct EndpointIommu {
    pool: Pool,
}

impl EndpointIommu {
    /// The view of `reader`'s endpoint. Guards report themselves under the reader's label.
    #[must_use]
    pub fn new(reader: Reader) -> Self {
        Self { pool: Pool::new(reader) }
    }
}

impl fmt::Debug for EndpointIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointIommu").field("pool", &self.pool).finish()
    }
}

/// The IOTLB of one call, and the viommu guard that keeps what it says true. Its addresses count from the start of the
/// range that was asked for: an `Iotlb` cannot hold the last byte of the address space.
pub struct IotlbGuard {
    iotlb: Iotlb,
    _entered: Entered,
}

impl Deref for IotlbGuard {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        &self.iotlb
    }
}

impl fmt::Debug for IotlbGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IotlbGuard").field("iotlb", &self.iotlb).finish_non_exhaustive()
    }
}

impl Iommu for EndpointIommu {
    type IotlbGuard<'a> = IotlbGuard;

    fn translate(
        &self,
        iova: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<IotlbGuard>, Error> {
        let refused = |at: Iova, reason: String| {
            let before = usize::try_from(at.0.saturating_sub(iova.0)).unwrap_or(length);
            let iova_range =
                IovaRange { base: GuestAddress(at.0), length: length.saturating_sub(before).max(1) };
            Error::CannotResolve { iova_range, reason }
        };
        let entered = self.pool.enter();
        let mut iotlb = Iotlb::new();
        if length == 0 {
            return nothing(IotlbGuard { iotlb, _entered: entered });
        }
        let range = u64::try_from(length).ok().and_then(|bytes| Range::from_len(Iova(iova.0), bytes));
        let range = range.ok_or_else(|| refused(Iova(iova.0), "it passes 2^64-1".into()))?;
        let wanted = access_of(access);
        let mut pieces = Vec::new();
        let fault = |fault: viommu::Fault| refused(fault.iova, fault.reason.to_string());
        entered.translator().span(range, wanted, &mut pieces).map_err(fault)?;
        let mut at = range.start();
        for piece in &pieces {
            if !is_memory(piece.place) {
                return Err(refused(at, format!("{:?} is not memory", piece.place)));
            }
            let key = GuestAddress(at.0.wrapping_sub(iova.0));
            iotlb.set_mapping(key, GuestAddress(piece.gpa.0), bytes(at, piece.last), access)?;
            at = Iova(piece.last.0.wrapping_add(1));
        }
        let guard = IotlbGuard { iotlb, _entered: entered };
        Iotlb::lookup(guard, GuestAddress(0), length, access)
            .map_err(|_| refused(Iova(iova.0), "the IOTLB does not hold what it was told".into()))
    }
}

/// An iterator over nothing. An `Iotlb` cannot be asked for no bytes, so it is one byte that has been given out.
fn nothing(mut guard: IotlbGuard) -> Result<IotlbIterator<IotlbGuard>, Error> {
    guard.iotlb.set_mapping(GuestAddress(0), GuestAddress(0), 1, Permissions::No)?;
    let iova_range = IovaRange { base: GuestAddress(0), length: 0 };
    let mut one = Iotlb::lookup(guard, GuestAddress(0), 1, Permissions::No)
        .map_err(|_| Error::CannotResolve { iova_range, reason: "no bytes".into() })?;
    let _byte = one.next();
    Ok(one)
}
