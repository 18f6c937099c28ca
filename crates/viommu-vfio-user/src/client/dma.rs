//! What a server reads and writes by messages: its DMA where it has no descriptor, or uses none.

use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory};
use zerocopy::{FromBytes, IntoBytes};

use crate::server::MAX_TRANSFER;
use crate::spec::{Command, DmaAccess};

/// Memory as the device sees it at the moment. It is asked while the client's lock is held, so it must not call the client;
/// and inside a step of the record, so it may translate and nothing else.
pub trait DeviceMemory: Send {
    /// Reads all of `data` from `address` on.
    ///
    /// # Errors
    /// What the server is told. What `data` has is not sent.
    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes all of `data` from `address` on.
    ///
    /// # Errors
    /// What the server is told; some of it may be written.
    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Errno>;
}

/// No memory at all: EFAULT.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMemory;

impl DeviceMemory for NoMemory {
    fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::FAULT)
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::FAULT)
    }
}

/// What an address space has at the time of each access: an endpoint's view, say (`viommu_memory::EndpointSpace`), where
/// the record decides. Anything that cannot be reached is EFAULT.
#[derive(Clone, Debug)]
pub struct SeenThrough<A>(pub A);

impl<A> DeviceMemory for SeenThrough<A>
where
    A: GuestAddressSpace + Send,
    A::M: GuestMemory,
{
    fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.0.memory().read_slice(data, GuestAddress(address)).map_err(|_| Errno::FAULT)
    }

    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.memory().write_slice(data, GuestAddress(address)).map_err(|_| Errno::FAULT)
    }
}

/// Does what a command of the server's asks for; the payload of the answer is put into `answer`, which is empty.
pub(crate) fn answer(
    memory: &mut dyn DeviceMemory,
    command: Command,
    payload: &[u8],
    answer: &mut Vec<u8>,
) -> Result<(), Errno> {
    if !matches!(command, Command::DMA_READ | Command::DMA_WRITE) {
        return Err(Errno::NOSYS);
    }
    let (access, data) = DmaAccess::read_from_prefix(payload).map_err(|_| Errno::INVAL)?;
    let count = usize::try_from(access.count.get()).map_err(|_| Errno::TOOBIG)?;
    if count > MAX_TRANSFER {
        return Err(Errno::TOOBIG);
    }
    let address = access.address.get();
    answer.extend_from_slice(access.as_bytes());
    if command == Command::DMA_WRITE {
        return if data.len() == count { memory.write(address, data) } else { Err(Errno::INVAL) };
    }
    if !data.is_empty() {
        return Err(Errno::INVAL);
    }
    let head = answer.len();
    answer.resize(head.saturating_add(count), 0);
    memory.read(address, answer.get_mut(head..).unwrap_or_default())
}
