//! A device that does nothing, for measuring what all else costs. Not for use: no device is behind it.

use rustix::io::Errno;
use viommu::IovaRange;

use crate::spec::Message;
use crate::vdpa::wire::Kernel;
use crate::vdpa::{Device, Info};

struct Nothing;

impl Kernel for Nothing {
    fn write(&mut self, _: &Message) -> Result<(), Errno> {
        Ok(())
    }

    fn reset(&mut self) -> Result<u8, Errno> {
        Ok(0)
    }
}

impl Device {
    /// Over nothing, with so many entries.
    #[doc(hidden)]
    #[must_use]
    pub fn of_nothing(entries: u32) -> Self {
        let info = Info { range: IovaRange::ALL, batches: true, persists: true, address_spaces: 1 };
        Self::over(Box::new(Nothing), info).entries(Some(entries))
    }
}
