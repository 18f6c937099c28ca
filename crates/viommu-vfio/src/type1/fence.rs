//! Cutting a device off for good.

use viommu::subscribe::FenceFailed;

use crate::software::{UnmapDma, UnmapFlags};
use crate::type1::state::{Closed, State};

/// What an embedder does to cut its devices off: see [`Container::fence`](crate::type1::Container::fence).
pub(crate) type Action = Box<dyn FnMut() -> Result<(), FenceFailed> + Send>;

impl State {
    /// Returns when no device of the container does DMA through it any more. Once it has, it does nothing.
    pub(crate) fn fence(&mut self) -> Result<(), FenceFailed> {
        if self.kernel.is_err() {
            return Ok(());
        }
        match self.action.as_mut() {
            // Only the embedder knows of the devices; what it says holds.
            Some(action) => action()?,
            None => self.remove_everything()?,
        }
        self.kernel = Err(Closed);
        self.held.clear();
        Ok(())
    }

    /// With nothing mapped, the host's IOMMU lets nothing through: the call returns when it has been flushed. It is not
    /// believed on its word alone, since a fence comes after something has gone wrong.
    fn remove_everything(&mut self) -> Result<(), FenceFailed> {
        let failed = |why: String| FenceFailed(why);
        let unmap_all = self.info.unmap_all;
        let kernel = self.kernel.as_mut().map_err(|Closed| failed("the container is closed".into()))?;
        let calls = if unmap_all {
            vec![UnmapDma { flags: UnmapFlags::ALL, iova: 0, size: 0 }]
        } else {
            // Inside the windows alone there can be mappings, and none lies across two.
            let page = self.info.page_size();
            let pieces = self.info.apertures.iter().map(|range| {
                // A range that ends at 2^64 is empty to Linux 6.12, which has nothing in the last page anyway.
                let last = range.last().0.min(u64::MAX - page);
                let size = last.wrapping_sub(range.start().0).wrapping_add(1) & !(page - 1);
                UnmapDma { flags: UnmapFlags::empty(), iova: range.start().0, size }
            });
            pieces.filter(|unmap| unmap.size != 0).collect()
        };
        for call in calls {
            kernel.unmap(&call, None).map_err(|errno| failed(format!("UNMAP_DMA of everything: {errno}")))?;
        }
        let Some(before) = self.info.entries else { return Ok(()) };
        let info = kernel.info().map_err(|errno| failed(format!("GET_INFO: {errno}")))?;
        match info.entries {
            Some(now) if now >= before => Ok(()),
            Some(now) => Err(failed(format!("{} mappings are left after all were removed", before - now))),
            None => Ok(()),
        }
    }
}
