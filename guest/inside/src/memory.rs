//! Memory that a device reads and writes too.

use std::{io, ptr::NonNull};

/// Pages of this program that stay where they are, zero at first.
pub(crate) struct Shared {
    start: NonNull<u8>,
    length: usize,
}

impl Shared {
    /// Memory of `length` bytes, a multiple of a page's.
    ///
    /// # Errors
    ///
    /// If there is none left.
    pub(crate) fn new(length: usize) -> io::Result<Shared> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that is there.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Shared { start, length })
    }

    /// The address, as VFIO takes it.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Writes bytes, each as a device may read it at any time.
    ///
    /// # Panics
    ///
    /// If they do not fit.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let place = self.place(at + index);
            // SAFETY: `place` is inside the mapping, which lives as long as `self`.
            unsafe { place.write_volatile(*byte) };
        }
    }

    /// Reads bytes, each as a device may write it at any time.
    ///
    /// # Panics
    ///
    /// If they are not all there.
    pub(crate) fn read(&self, at: usize, bytes: &mut [u8]) {
        for (index, byte) in bytes.iter_mut().enumerate() {
            let place = self.place(at + index);
            // SAFETY: as in `write`.
            *byte = unsafe { place.read_volatile() };
        }
    }

    fn place(&self, at: usize) -> *mut u8 {
        assert!(at < self.length, "{at} is beyond the {} bytes of this memory", self.length);
        self.start.as_ptr().wrapping_add(at)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is of this length and ours alone; nothing keeps a pointer into it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// A file in memory of so many bytes.
///
/// # Errors
///
/// If there is none left.
pub(crate) fn memfd(bytes: u64) -> io::Result<std::fs::File> {
    use std::os::fd::FromRawFd as _;
    // SAFETY: the name is a string that ends with a zero and outlives the call.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    let file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}
