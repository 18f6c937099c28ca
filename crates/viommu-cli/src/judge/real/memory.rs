//! Guest memory for real interfaces, which pin its pages or hand out its file.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

pub(super) type Ram = Arc<GuestMemoryMmap>;

/// Bits of the addresses that memory is tried to be had for: a hole, but for pages that somebody pins or touches.
const SIZES: [u32; 3] = [46, 42, 38];

/// Memory from address 0 on, as much as can be had.
///
/// # Errors
/// There is no address space, or no file.
pub(super) fn from_zero() -> Result<Ram, Box<dyn core::error::Error>> {
    let mut failed = None;
    for bits in SIZES {
        let bytes = 1_u64 << bits;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("viommu-replay", flags)?);
        let outcome = ftruncate(&file, bytes).map_err(Into::into).and_then(|()| {
            // A server takes no memory that could go away under it.
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            let range = (GuestAddress(0), usize::try_from(bytes)?, Some(FileOffset::new(file, 0)));
            Ok(GuestMemoryMmap::from_ranges_with_files([range])?)
        });
        match outcome {
            Ok(memory) => return Ok(Arc::new(memory)),
            Err(why) => failed = Some(why),
        }
    }
    Err(failed.unwrap_or_else(|| "no memory".into()))
}
