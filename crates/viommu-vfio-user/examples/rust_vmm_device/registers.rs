//! What a driver of the device must know.

/// Vendor and device.
pub(crate) const IDENTITY: [u8; 4] = [0x36, 0x1b, 0xf0, 0x10];

/// The BAR with registers: addresses are of these, each of 8 bytes.
pub(crate) const REGISTERS: u32 = 0;
/// Bytes of it.
pub(crate) const REGISTERS_SIZE: u64 = 0x1000;
/// Where DMA goes to, or what is looked at.
pub(crate) const ADDRESS: u64 = 0x00;
/// What is written, or was read.
pub(crate) const DATA: u64 = 0x08;
/// Written: one of the commands below. Read: 0 where the last one was done, 1 where it was not.
pub(crate) const COMMAND: u64 = 0x10;
/// Windows that there are.
pub(crate) const WINDOWS: u64 = 0x18;
/// Resets so far.
pub(crate) const RESETS: u64 = 0x20;
/// Accesses by a message to the BAR that lies in a file.
pub(crate) const MESSAGES: u64 = 0x28;

/// Reads 8 bytes of guest memory.
pub(crate) const READ: u64 = 1;
/// Writes 8 bytes of guest memory.
pub(crate) const WRITE: u64 = 2;
/// Raises the INTx line.
pub(crate) const RAISE: u64 = 3;
/// Reads 8 bytes of the other BAR, past all messages.
pub(crate) const LOOK: u64 = 4;

/// The BAR that lies in a file.
pub(crate) const SHARED: u32 = 2;
/// Bytes of it.
pub(crate) const SHARED_SIZE: u64 = 0x4000;
/// Where it begins in its file.
pub(crate) const SHARED_OFFSET: u64 = 0x2000;
/// What of it may be mapped: first byte and size.
pub(crate) const AREAS: [(u64, u64); 2] = [(0x1000, 0x1000), (0x3000, 0x1000)];
