//! Starts another kernel in place of the one that runs, without a reset.

use std::{error::Error, ffi::CString, fs::File, io, os::fd::AsRawFd};

/// Loads a kernel with its first file system and command line, and jumps to it; comes back only with an error.
///
/// # Errors
///
/// If a file cannot be read, or the kernel refuses.
pub(crate) fn run(kernel: &str, initramfs: &str, words: &str) -> Result<(), Box<dyn Error>> {
    let (kernel, initramfs) = (File::open(kernel)?, File::open(initramfs)?);
    let words = CString::new(words.trim())?;
    let words = words.as_bytes_with_nul();
    // SAFETY: the words end with a zero, are as long as is said, and outlive the call.
    let loaded = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            words.len(),
            words.as_ptr(),
            0,
        )
    };
    if loaded != 0 {
        return Err(format!("kexec_file_load: {}", io::Error::last_os_error()).into());
    }
    // SAFETY: the argument is a number; this process ends with the kernel, which nothing in it can mind.
    let _failed = unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
    Err(format!("reboot: {}", io::Error::last_os_error()).into())
}
