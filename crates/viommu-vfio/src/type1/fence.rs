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
        self.entries = 0;
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
            let apertures = self.info.apertures.iter();
            let size = |bytes: u128| u64::try_from(bytes).ok();
            apertures
                .filter_map(|range| {
                    let page = self.info.page_size();
                    // A size of 2^64 cannot be said; the last page of it is never mapped.
                    let size = size(range.bytes()).unwrap_or(u64::MAX) & !(page - 1);
                    Some(UnmapDma { flags: UnmapFlags::empty(), iova: range.start().0, size })
                        .filter(|u| u.size != 0)
                })
                .collect()
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
