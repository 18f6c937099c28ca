//! The simulator's disk, driven by hand: its ring and buffers lie where the record says, and nowhere else.

use std::{
    error::Error,
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::type1::world::STEP;

/// Requests of <linux/vhost.h>.
mod request {
    pub(super) const SET_OWNER: u64 = 0xaf01;
    pub(super) const SET_FEATURES: u64 = 0x4008_af00;
    pub(super) const SET_VRING_NUM: u64 = 0x4008_af10;
    pub(super) const SET_VRING_ADDR: u64 = 0x4028_af11;
    pub(super) const SET_VRING_BASE: u64 = 0x4008_af12;
    pub(super) const SET_VRING_KICK: u64 = 0x4008_af20;
    pub(super) const GET_STATUS: u64 = 0x8001_af71;
    pub(super) const SET_STATUS: u64 = 0x4001_af72;
    pub(super) const SET_VRING_ENABLE: u64 = 0x4008_af75;
}

/// VIRTIO_F_VERSION_1 and VIRTIO_F_ACCESS_PLATFORM.
const FEATURES: u64 = 3 << 32;

/// Entries of the ring.
const ENTRIES: u16 = 8;

/// Pages of the ring: descriptors, available and used ring, and a request's head and status.
pub(super) const RINGS: u64 = 4;

/// Where the device sees the ring, and where it lies in memory, in pages.
#[derive(Clone, Copy)]
pub(super) struct Ring {
    pub(super) at: u64,
    pub(super) page: u64,
}

pub(super) struct Disk {
    kick: File,
    memory: GuestMemoryMmap<()>,
    ring: Ring,
    asked: u16,
}

/// What a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The status that the device wrote: 0 is good.
    Status(u8),
    /// It did not answer: it could not reach what it needed to.
    Silence,
}

/// Opens a device, and becomes its owner.
///
/// # Errors
///
/// If there is none.
pub(super) fn open(path: &str) -> Result<File, Box<dyn Error>> {
    let file =
        File::options().read(true).write(true).open(path).map_err(|error| format!("{path}: {error}"))?;
    number(&file, request::SET_OWNER, 0)?;
    Ok(file)
}

fn number(file: &File, request: u64, value: u64) -> io::Result<()> {
    // SAFETY: the argument is a number, which the request does not take for a pointer.
    answered(unsafe { libc::ioctl(file.as_raw_fd(), request, value) })
}

fn pointed<T>(file: &File, request: u64, value: &T) -> io::Result<()> {
    // SAFETY: the argument is what the request reads, of the size that is in its number.
    answered(unsafe { libc::ioctl(file.as_raw_fd(), request, std::ptr::from_ref(value)) })
}

fn answered(returned: i32) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Disk {
    /// A reset device with an empty ring, which runs from here on.
    ///
    /// # Errors
    ///
    /// If the device does not take it.
    pub(super) fn start(
        file: &File,
        memory: &GuestMemoryMmap<()>,
        ring: Ring,
    ) -> Result<Disk, Box<dyn Error>> {
        let page = |page: u64| GuestAddress((ring.page + page) * STEP);
        for at in 0..RINGS {
            memory.write_slice(&[0; 4096], page(at))?;
        }
        let status = |status: u8| pointed(file, request::SET_STATUS, &status);
        status(0)?;
        status(1 | 2)?;
        pointed(file, request::SET_FEATURES, &FEATURES)?;
        status(1 | 2 | 8)?;
        pointed(file, request::SET_VRING_NUM, &[0_u32, ENTRIES.into()])?;
        pointed(file, request::SET_VRING_BASE, &[0_u32, 0])?;
        let at = |page: u64| (ring.at + page) * STEP;
        // Index and flags, then descriptors, used ring, available ring, log.
        pointed(file, request::SET_VRING_ADDR, &[0_u64, at(0), at(2), at(1), 0])?;
        // SAFETY: the call takes two numbers.
        let kick = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        answered(kick)?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        let kick = unsafe { OwnedFd::from_raw_fd(kick) };
        pointed(file, request::SET_VRING_KICK, &[0_i32, kick.as_raw_fd()])?;
        pointed(file, request::SET_VRING_ENABLE, &[0_u32, 1])?;
        status(1 | 2 | 8 | 4)?;
        Ok(Disk { kick: kick.into(), memory: memory.clone(), ring, asked: 0 })
    }

    /// Has the device write `bytes` bytes at `iova` to its first sectors, or read them from there.
    ///
    /// # Errors
    ///
    /// If the ring itself cannot be used.
    pub(super) fn ask(&mut self, write: bool, iova: u64, bytes: u32) -> Result<Outcome, Box<dyn Error>> {
        use std::io::Write as _;
        let page = |page: u64| (self.ring.page + page) * STEP;
        let seen = |page: u64| (self.ring.at + page) * STEP;
        let mut head = [0; 16];
        head[0] = u8::from(write);
        self.memory.write_slice(&head, GuestAddress(page(3)))?;
        self.memory.write_slice(&[0xff], GuestAddress(page(3) + 64))?;
        let data_flags: u16 = if write { 1 } else { 1 | 2 };
        let chain = [(seen(3), 16, 1_u16, 1_u16), (iova, bytes, data_flags, 2), (seen(3) + 64, 1, 2, 0)];
        for (at, (address, length, flags, next)) in (0..).zip(chain) {
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&address.to_le_bytes());
            descriptor[8..12].copy_from_slice(&length.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&next.to_le_bytes());
            self.memory.write_slice(&descriptor, GuestAddress(page(0) + 16 * at))?;
        }
        let slot = u64::from(self.asked % ENTRIES);
        self.memory.write_slice(&0_u16.to_le_bytes(), GuestAddress(page(1) + 4 + 2 * slot))?;
        self.asked = self.asked.wrapping_add(1);
        self.memory.write_slice(&self.asked.to_le_bytes(), GuestAddress(page(1) + 2))?;
        self.kick.write_all(&1_u64.to_ne_bytes())?;
        let until = Instant::now() + Duration::from_millis(300);
        while Instant::now() < until {
            let index: u16 = self.memory.read_obj(GuestAddress(page(2) + 2))?;
            if index == self.asked {
                let status: u8 = self.memory.read_obj(GuestAddress(page(3) + 64))?;
                return Ok(Outcome::Status(status));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(Outcome::Silence)
    }
}

/// What a device's driver has said of itself so far.
///
/// # Errors
///
/// If the device does not tell.
pub(super) fn status(file: &File) -> io::Result<u8> {
    let mut status = [0_u8];
    // SAFETY: the argument is a byte that the request writes to.
    answered(unsafe { libc::ioctl(file.as_raw_fd(), request::GET_STATUS, status.as_mut_ptr()) })?;
    Ok(status[0])
}

/// Says that there is a driver.
///
/// # Errors
///
/// If the device does not take it.
pub(super) fn acknowledge(file: &File) -> io::Result<()> {
    pointed(file, request::SET_STATUS, &3_u8)?;
    match status(file)? {
        3 => Ok(()),
        status => Err(io::Error::other(format!("the status is {status:#x}"))),
    }
}

/// Begins a batch of an address space.
///
/// # Errors
///
/// If the device does not take it.
pub(super) fn begin_batch(mut file: &File, asid: u32) -> io::Result<()> {
    use std::io::Write as _;
    let mut message = [0; 72];
    message[0] = 2; // the second version
    message[4..8].copy_from_slice(&asid.to_ne_bytes());
    message[33] = 5; // BATCH_BEGIN
    file.write_all(&message)
}
