//! A kernel that does nothing, for measuring what all else costs. Not for use: no device is behind it.

use viommu::IovaRange;

use crate::errno::Errno;
use crate::software::{Bitmap, MapDma, UnmapDma};
use crate::type1::info::Info;
use crate::type1::kernel::Kernel;
use crate::type1::{Container, OpenError};

struct Nothing(u32);

impl Kernel for Nothing {
    fn info(&mut self) -> Result<Info, Errno> {
        let (page_sizes, apertures) = (1 << 12, vec![IovaRange::ALL]);
        Ok(Info { page_sizes, apertures, entries: Some(self.0), dirty: None, unmap_all: true })
    }

    fn map(&mut self, _: &MapDma) -> Result<(), Errno> {
        Ok(())
    }

    /// All of the range was mapped.
    fn unmap(&mut self, unmap: &UnmapDma, _: Option<&mut Bitmap>) -> Result<u64, Errno> {
        Ok(unmap.size)
    }

    fn track(&mut self, _: bool) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn dirty(&mut self, _: u64, _: u64, _: &mut Bitmap) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }
}

impl Container {
    /// Over nothing, with so many entries.
    ///
    /// # Errors
    /// None.
    #[doc(hidden)]
    pub fn of_nothing(entries: u32) -> Result<Self, OpenError> {
        Self::over(Box::new(Nothing(entries))).map_err(|errno| OpenError::Failed { call: "GET_INFO", errno })
    }
}
