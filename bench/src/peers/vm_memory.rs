//! vm-memory's own `Iotlb`, in the lock that its documentation puts around it.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use vm_memory::iommu::Iotlb;
use vm_memory::{GuestAddress, Permissions};

use crate::table::Table;

/// Bytes that a lookup asks for: a small descriptor's buffer.
const ASKED: usize = 64;

#[derive(Clone)]
pub(crate) struct VmMemory(Arc<RwLock<Iotlb>>);

impl Table for VmMemory {
    fn new() -> anyhow::Result<Self> {
        Ok(Self(Arc::new(RwLock::new(Iotlb::new()))))
    }

    fn map(&mut self, iova: u64, bytes: u64, gpa: u64) -> bool {
        let (Ok(mut tlb), Ok(bytes)) = (self.0.write(), usize::try_from(bytes)) else { return false };
        tlb.set_mapping(GuestAddress(iova), GuestAddress(gpa), bytes, Permissions::ReadWrite).is_ok()
    }

    fn unmap(&mut self, iova: u64, bytes: u64) {
        if let (Ok(mut tlb), Ok(bytes)) = (self.0.write(), usize::try_from(bytes)) {
            tlb.invalidate_mapping(GuestAddress(iova), bytes);
        }
    }

    #[inline]
    fn translate(&mut self, iova: u64) -> Option<u64> {
        let tlb = self.0.read().ok()?;
        let mut ranges = Iotlb::lookup(tlb, GuestAddress(iova), ASKED, Permissions::Read).ok()?;
        ranges.next().map(|range| range.base.0)
    }

    /// It cannot be iterated.
    fn replay(&mut self) -> Option<(Duration, u64)> {
        None
    }
}
