//! The kernel's own IOMMU in software, which its self-test has: devices that are there for the asking, tables that can be
//! looked into, and pages that are dirty on demand.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use viommu_vfio::{Errno, iommufd::Device};

/// Requests of <linux/iommufd.h>: `_IO(';', 0x80 + n)`.
const IOAS_ALLOC: u64 = 0x3b81;
const IOAS_UNMAP: u64 = 0x3b86;
/// That of the self-test.
const TEST: u64 = 0x3ba0;

/// Operations of the self-test.
mod op {
    pub(super) const ADD_RESERVED: u32 = 1;
    pub(super) const MOCK_DOMAIN: u32 = 2;
    pub(super) const CHECK_MAP: u32 = 3;
    pub(super) const DOMAIN_REPLACE: u32 = 10;
    pub(super) const DOMAIN_FLAGS: u32 = 12;
    pub(super) const DIRTY: u32 = 13;
}

/// `MOCK_FLAGS_DEVICE_NO_DIRTY`.
const NO_DIRTY: u32 = 1;

/// `struct iommu_test_cmd`: the words of its union are each operation's own, and one is behind it.
#[repr(C, align(8))]
struct Command {
    size: u32,
    operation: u32,
    id: u32,
    reserved: u32,
    words: [u32; 12],
    last: u32,
}

/// An iommufd, for calls that the binding does not make.
#[derive(Clone)]
pub(super) struct Mock(Arc<OwnedFd>);

/// Two halves of a number.
fn halves(number: u64) -> [u32; 2] {
    let low = number & 0xffff_ffff;
    [u32::try_from(low).unwrap_or(0), u32::try_from(number >> 32).unwrap_or(0)]
}

/// Numbers as they lie in memory.
fn words(numbers: &[u64]) -> [u32; 12] {
    let mut words = [0; 12];
    let halves = numbers.iter().flat_map(|number| halves(*number));
    words.iter_mut().zip(halves).for_each(|(word, half)| *word = half);
    words
}

impl Mock {
    pub(super) fn new(fd: OwnedFd) -> Mock {
        Mock(Arc::new(fd))
    }

    fn call<T>(&self, request: u64, arg: &mut T) -> Result<(), Errno> {
        // SAFETY: the argument is the structure that the request takes, with its size in its first word; addresses in it
        // are of memory of this program's that outlives the call.
        let returned = unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(arg)) };
        match returned {
            0 => Ok(()),
            _ => Err(Errno::from_raw(io::Error::last_os_error().raw_os_error().unwrap_or(0))),
        }
    }

    fn test(&self, operation: u32, id: u32, words: [u32; 12]) -> Result<[u32; 12], Errno> {
        let size = u32::try_from(size_of::<Command>()).unwrap_or(0);
        let mut command = Command { size, operation, id, reserved: 0, words, last: 0 };
        self.call(TEST, &mut command)?;
        Ok(command.words)
    }

    fn empty_ioas(&self) -> Result<u32, Errno> {
        let mut arg = [12_u32, 0, 0];
        self.call(IOAS_ALLOC, &mut arg)?;
        Ok(arg[2])
    }

    /// Whether a table maps a range to memory of this program's, all of it.
    pub(super) fn maps(&self, hwpt: u32, iova: u64, length: u64, address: u64) -> Result<bool, Errno> {
        match self.test(op::CHECK_MAP, hwpt, words(&[iova, length, address])) {
            Ok(_) => Ok(true),
            Err(Errno::EINVAL) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// As if the device had written to a page.
    pub(super) fn write(&self, hwpt: u32, iova: u64) -> Result<(), Errno> {
        let bits = [1_u64];
        let numbers = [0, iova, 4096, 4096, bits.as_ptr().expose_provenance() as u64, 0];
        self.test(op::DIRTY, hwpt, words(&numbers)).map(drop)
    }

    /// Removes a mapping from whatever IOAS has it: behind the binding's back. Gives the IOAS.
    pub(super) fn betray(&self, iova: u64) -> Option<u32> {
        #[repr(C)]
        struct Unmap {
            size: u32,
            ioas: u32,
            iova: u64,
            length: u64,
        }
        (1..200).find(|ioas| {
            self.call(IOAS_UNMAP, &mut Unmap { size: 24, ioas: *ioas, iova, length: 4096 }).is_ok()
        })
    }

    /// Takes a range from an IOAS, as a device with a reserved region would that comes later.
    pub(super) fn reserve(&self, ioas: u32, iova: u64, length: u64) -> Result<(), Errno> {
        self.test(op::ADD_RESERVED, ioas, words(&[iova, length])).map(drop)
    }

    /// A new device, and where it is: the number of its table, or 0.
    pub(super) fn device(&self, tracks: bool) -> Result<(MockDevice, Arc<AtomicU32>), Errno> {
        let nowhere = self.empty_ioas()?;
        let operation = if tracks { op::MOCK_DOMAIN } else { op::DOMAIN_FLAGS };
        let mut asked = [0; 12];
        asked[3] = if tracks { 0 } else { NO_DIRTY };
        let made = self.test(operation, nowhere, asked)?;
        let at = Arc::new(AtomicU32::new(0));
        let device =
            MockDevice { mock: self.clone(), nowhere, standing: made[0], id: made[2], at: at.clone() };
        Ok((device, at))
    }
}

/// A device of the self-test. It is always attached: detached, to an IOAS with nothing in it.
pub(super) struct MockDevice {
    mock: Mock,
    nowhere: u32,
    /// The self-test's number for it.
    standing: u32,
    id: u32,
    at: Arc<AtomicU32>,
}

impl MockDevice {
    fn replace(&self, table: u32) -> Result<(), Errno> {
        let mut words = [0; 12];
        words[0] = table;
        self.mock.test(op::DOMAIN_REPLACE, self.standing, words).map(drop)
    }
}

impl Device for MockDevice {
    fn id(&self) -> u32 {
        self.id
    }

    fn attach(&mut self, table: u32) -> Result<(), Errno> {
        self.replace(table)?;
        self.at.store(table, Ordering::Relaxed);
        Ok(())
    }

    fn detach(&mut self) -> Result<(), Errno> {
        self.replace(self.nowhere)?;
        self.at.store(0, Ordering::Relaxed);
        Ok(())
    }
}
