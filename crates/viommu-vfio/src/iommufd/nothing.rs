//! A kernel that does nothing, for measuring what all else costs. Not for use: no device is behind it.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use viommu::IovaRange;

use crate::errno::Errno;
use crate::iommufd::kernel::{Kernel, Limits, Place};
use crate::iommufd::{Device, Iommufd};
use crate::software::Bitmap;

/// Its next number.
struct Nothing(AtomicU32);

impl Nothing {
    fn number(&self) -> Result<u32, Errno> {
        Ok(self.0.fetch_add(1, Ordering::Relaxed))
    }
}

impl Kernel for Nothing {
    fn ioas_alloc(&self) -> Result<u32, Errno> {
        self.number()
    }

    fn destroy(&self, _: u32) -> Result<(), Errno> {
        Ok(())
    }

    fn limits(&self, _: u32) -> Result<Limits, Errno> {
        Ok(Limits { apertures: vec![IovaRange::ALL], page_size: 1 << 12 })
    }

    fn map(&self, _: Place, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn map_file(&self, _: Place, _: BorrowedFd<'_>, _: u64) -> Result<(), Errno> {
        Err(Errno::ENOTTY)
    }

    /// All of the range was mapped.
    fn unmap(&self, _: u32, _: u64, length: u64) -> Result<u64, Errno> {
        Ok(length)
    }

    fn hwpt_alloc(&self, _: u32, _: u32, _: bool) -> Result<u32, Errno> {
        self.number()
    }

    fn can_track(&self, _: u32) -> Result<bool, Errno> {
        Ok(false)
    }

    fn track(&self, _: u32, _: bool) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn dirty(&self, _: u32, _: u64, _: u64, _: &mut Bitmap) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }
}

struct NoDevice;

impl Device for NoDevice {
    fn id(&self) -> u32 {
        0
    }

    fn attach(&mut self, _: u32) -> Result<(), Errno> {
        Ok(())
    }

    fn detach(&mut self) -> Result<(), Errno> {
        Ok(())
    }
}

impl Iommufd {
    /// Over nothing, and a device behind it.
    #[doc(hidden)]
    #[must_use]
    pub fn of_nothing() -> (Self, Box<dyn Device>) {
        (Self::over(Arc::new(Nothing(AtomicU32::new(1)))), Box::new(NoDevice))
    }
}
