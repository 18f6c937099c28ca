//! What is asked of a container: the kernel's answers, or those of a stand-in.

use crate::errno::Errno;
use crate::software::{Bitmap, MapDma, UnmapDma};
use crate::type1::info::Info;

/// The calls of a type1 v2 container. One that fails has changed nothing.
pub(crate) trait Kernel: Send {
    /// `GET_INFO`, and which extensions there are.
    fn info(&mut self) -> Result<Info, Errno>;

    /// `MAP_DMA`.
    fn map(&mut self, map: &MapDma) -> Result<(), Errno>;

    /// `UNMAP_DMA`: bytes removed, modulo 2^64. `bitmap` goes with GET_DIRTY_BITMAP.
    fn unmap(&mut self, unmap: &UnmapDma, bitmap: Option<&mut Bitmap>) -> Result<u64, Errno>;

    /// `DIRTY_PAGES` with START or STOP.
    fn track(&mut self, on: bool) -> Result<(), Errno>;

    /// `DIRTY_PAGES` with GET_BITMAP: the dirty pages of `size` bytes from `iova` on, clean afterwards.
    fn dirty(&mut self, iova: u64, size: u64, bitmap: &mut Bitmap) -> Result<(), Errno>;
}
