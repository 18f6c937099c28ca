//! Dirty pages of what is held, by guest physical address.

use viommu::{Access, GpaRange};

use crate::errno::Errno;
use crate::software::Bitmap;
use crate::type1::state::{Closed, State};
use crate::written::pages_of;

impl State {
    pub(crate) fn track(&mut self, on: bool) -> Result<(), Errno> {
        let kernel = self.kernel.as_mut().map_err(|Closed| Errno::EBADF)?;
        if on && self.info.dirty.is_none() {
            return Err(Errno::EOPNOTSUPP);
        }
        kernel.track(on)?;
        self.tracking = on;
        if !on {
            self.untold.clear();
        }
        Ok(())
    }

    /// What was written since the last call, in ranges that ascend and do not touch.
    pub(crate) fn dirty(&mut self) -> Result<Vec<GpaRange>, Errno> {
        let State { kernel, held, untold, info, tracking, .. } = self;
        let kernel = kernel.as_mut().map_err(|Closed| Errno::EBADF)?;
        let page = info.dirty.filter(|_| *tracking).ok_or(Errno::EINVAL)?.page_size;
        for held in held.iter().filter(|held| held.mapping.access.contains(Access::WRITE)) {
            for piece in held.pieces() {
                let size = u64::try_from(piece.range.bytes()).map_err(|_| Errno::EINVAL)?;
                let mut bitmap = Bitmap::new(page, size)?;
                kernel.dirty(piece.range.start().0, size, &mut bitmap)?;
                untold.add(&held.mapping, piece, pages_of(&bitmap, size), page);
            }
        }
        Ok(untold.take())
    }
}
