//! What is asked of an iommufd: the kernel's answers, or those of a stand-in.

use std::os::fd::BorrowedFd;

use viommu::{Access, IovaRange};

use crate::errno::Errno;
use crate::software::Bitmap;

/// Where mappings may lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Each mapping inside a single range: ascending, inclusive.
    pub apertures: Vec<IovaRange>,
    /// Bytes of the smallest page, a power of two.
    pub page_size: u64,
}

/// A mapping, without what it maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) ioas: u32,
    pub(crate) iova: u64,
    pub(crate) length: u64,
    pub(crate) access: Access,
}

/// The calls of an iommufd. One that fails has changed nothing, but for an unmap that has met whole mappings before one
/// that sticks out.
pub(crate) trait Kernel: Send + Sync {
    fn ioas_alloc(&self) -> Result<u32, Errno>;

    /// Takes away an IOAS or a HWPT.
    fn destroy(&self, id: u32) -> Result<(), Errno>;

    /// What the devices now attached to an IOAS leave of it.
    fn limits(&self, ioas: u32) -> Result<Limits, Errno>;

    fn map(&self, place: Place, vaddr: u64) -> Result<(), Errno>;

    fn map_file(&self, place: Place, file: BorrowedFd<'_>, start: u64) -> Result<(), Errno>;

    /// Bytes removed.
    fn unmap(&self, ioas: u32, iova: u64, length: u64) -> Result<u64, Errno>;

    /// A hardware page table of `ioas`, as `device` has them.
    fn hwpt_alloc(&self, device: u32, ioas: u32, tracks: bool) -> Result<u32, Errno>;

    /// Whether the device's IOMMU says which pages were written.
    fn can_track(&self, device: u32) -> Result<bool, Errno>;

    fn track(&self, hwpt: u32, on: bool) -> Result<(), Errno>;

    /// Adds the dirty pages of `length` bytes from `iova` on; they are clean afterwards.
    fn dirty(&self, hwpt: u32, iova: u64, length: u64, bitmap: &mut Bitmap) -> Result<(), Errno>;
}
