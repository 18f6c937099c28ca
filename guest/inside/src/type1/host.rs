//! Memory of this program with nothing on either side of it.

use std::{io, ptr::NonNull};

use super::PAGE;

/// Pages without access before and after.
const GUARD: usize = 16 * PAGE;

/// Pages that may be read, or read and written.
pub(super) struct Guarded {
    start: NonNull<libc::c_void>,
    length: usize,
}

impl Guarded {
    /// Memory of `length` bytes, a multiple of a page's.
    ///
    /// # Errors
    ///
    /// If there is none left.
    pub(super) fn new(length: usize, writable: bool) -> io::Result<Guarded> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that is there.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length + 2 * GUARD, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("mapped at zero"))?;
        let memory = Guarded { start, length };
        let access = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let inner = start.as_ptr().wrapping_byte_add(GUARD);
        // SAFETY: the pages are of the mapping just made, which nobody else knows.
        if unsafe { libc::mprotect(inner, length, access) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(memory)
    }

    /// The address of the first byte.
    pub(super) fn address(&self) -> u64 {
        self.start.as_ptr().wrapping_byte_add(GUARD).expose_provenance() as u64
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping is of this length and ours alone; nothing keeps a pointer into it.
        unsafe { libc::munmap(self.start.as_ptr(), self.length + 2 * GUARD) };
    }
}
