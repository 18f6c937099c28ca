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

/// Runs `then` on a thread that may have no more than so many bytes pinned: without the capability that lifts the limit.
///
/// # Errors
///
/// If the kernel does not let the limit be set.
pub(crate) fn with_little_locked<T: Send>(bytes: u64, then: impl FnOnce() -> T + Send) -> Result<T, String> {
    let before = limited(bytes)?;
    let outcome = std::thread::scope(|scope| {
        scope
            .spawn(|| without_capabilities().map(|()| then()))
            .join()
            .map_err(|_| "a thread panicked".to_owned())?
    });
    limited(before)?;
    outcome
}

/// Sets the limit of locked memory; gives the one before.
fn limited(bytes: u64) -> Result<u64, String> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is there to be written to.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0 {
        return Err(format!("getrlimit: {}", io::Error::last_os_error()));
    }
    let before = limit.rlim_cur;
    limit = libc::rlimit { rlim_cur: bytes, rlim_max: limit.rlim_max.max(bytes) };
    // SAFETY: the structure is there to be read.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } != 0 {
        return Err(format!("setrlimit: {}", io::Error::last_os_error()));
    }
    Ok(before)
}

/// Takes all capabilities from this thread.
fn without_capabilities() -> Result<(), String> {
    // _LINUX_CAPABILITY_VERSION_3 and this thread; then three sets, in two halves each.
    let (head, sets) = ([0x2008_0522_u32, 0], [0_u32; 6]);
    // SAFETY: the words are what the call reads.
    if unsafe { libc::syscall(libc::SYS_capset, head.as_ptr(), sets.as_ptr()) } != 0 {
        return Err(format!("capset: {}", io::Error::last_os_error()));
    }
    Ok(())
}
