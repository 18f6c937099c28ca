//! A device of an iommufd: what is asked of it.

use crate::errno::Errno;

/// A device that is bound to an iommufd, as the binding switches it: [`VfioDevice`](crate::iommufd::VfioDevice), or an
/// embedder's own way to make these calls.
pub trait Device: Send {
    /// The number under which the iommufd knows it.
    fn id(&self) -> u32;

    /// Switches it to a table: the number of a HWPT, or of an IOAS. One that is attached moves as one act.
    ///
    /// # Errors
    /// It is where it was.
    fn attach(&mut self, table: u32) -> Result<(), Errno>;

    /// Takes it off its table. When this returns it does no DMA, unless other devices of its group are attached.
    ///
    /// # Errors
    /// It may still do DMA.
    fn detach(&mut self) -> Result<(), Errno>;

    /// The number of its IOMMU group, where it may share one: to cut off one device is to cut off its group.
    fn group(&self) -> Option<u32> {
        None
    }
}
