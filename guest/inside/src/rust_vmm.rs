//! The device of the example `rust_vmm_device`, driven by hand from user space: its registers, the BAR that the machine maps,
//! and DMA to what is mapped and to what is not.

#[expect(dead_code, reason = "what the host looks at is there too")]
#[path = "../../../crates/viommu-vfio-user/examples/rust_vmm_device/registers.rs"]
mod registers;

use std::error::Error;

use crate::{
    memory::Shared,
    vfio::{Access, Device},
};

/// Bytes.
const PAGE: usize = 4096;
/// The same, as addresses are counted.
const STEP: u64 = 4096;
/// Where the device sees two pages that it may read and write, and the one that it may only read.
const BOTH: u64 = 0x80_0000;
const READ_ONLY: u64 = 0x90_0000;

/// Drives the device at `bdf`.
///
/// # Errors
///
/// If something that must arrive does not, or the other way round.
pub(crate) fn run(bdf: &str, group: &str) -> Result<(), Box<dyn Error>> {
    let memory = Shared::new(3 * PAGE)?;
    let driver = Driver { device: Device::open(bdf, group)? };
    // Memory space and bus mastering.
    driver.device.write_config(4, &6u16.to_le_bytes())?;
    is("the identity", &driver.device.config::<4>(0)?, &registers::IDENTITY)?;
    driver.write(registers::DATA, u64::from_le_bytes(*b"register"))?;
    is("a register", &driver.read(registers::DATA)?.to_le_bytes(), b"register")?;
    println!("@@SAW registers");

    driver.bar()?;
    println!("@@SAW bar");

    let (device, address) = (&driver.device, memory.address());
    memory.write(0x40, b"guest 00");
    memory.write(PAGE + 0x40, b"guest 01");
    memory.write(2 * PAGE + 0x40, b"guest 02");
    is("nothing mapped", &driver.fetched(BOTH + 0x40)?, &None)?;
    device.map(BOTH, address, 2 * STEP, Access::Both)?;
    device.map(READ_ONLY, address + 2 * STEP, STEP, Access::Read)?;
    is("the first page", &driver.fetched(BOTH + 0x40)?, &Some(*b"guest 00"))?;
    is("the second page", &driver.fetched(BOTH + STEP + 0x40)?, &Some(*b"guest 01"))?;
    is("the page that is read only", &driver.fetched(READ_ONLY + 0x40)?, &Some(*b"guest 02"))?;
    driver.write(registers::DATA, u64::from_le_bytes(*b"the dev."))?;
    is("a write", &driver.execute(registers::WRITE, BOTH + 0x80)?, &true)?;
    is("a write to what is read only", &driver.execute(registers::WRITE, READ_ONLY + 0x80)?, &false)?;
    let mut seen = [[0; 8]; 2];
    for (seen, at) in seen.iter_mut().zip([0x80, 2 * PAGE + 0x80]) {
        memory.read(at, seen);
    }
    is("what the device has written", &seen, &[*b"the dev.", [0; 8]])?;
    println!("@@SAW dma");

    device.unmap(BOTH, 2 * STEP)?;
    is("what was unmapped", &driver.fetched(BOTH + 0x40)?, &None)?;
    driver.write(registers::DATA, u64::from_le_bytes(*b"too late"))?;
    is("a write to what was unmapped", &driver.execute(registers::WRITE, BOTH + 0x80)?, &false)?;
    memory.read(0x80, &mut seen[0]);
    is("what the device has written", &seen[0], b"the dev.")?;
    is("what is still mapped", &driver.fetched(READ_ONLY + 0x40)?, &Some(*b"guest 02"))?;
    println!("@@SAW unmapped");
    Ok(())
}

struct Driver {
    device: Device,
}

impl Driver {
    fn read(&self, register: u64) -> std::io::Result<u64> {
        Ok(u64::from_le_bytes(self.device.read(registers::REGISTERS, register)?))
    }

    fn write(&self, register: u64, value: u64) -> std::io::Result<()> {
        self.device.write(registers::REGISTERS, register, &value.to_le_bytes())
    }

    /// Whether the device could do it.
    fn execute(&self, command: u64, address: u64) -> std::io::Result<bool> {
        self.write(registers::ADDRESS, address)?;
        self.write(registers::COMMAND, command)?;
        Ok(self.read(registers::COMMAND)? == 0)
    }

    /// What the device finds there.
    fn fetched(&self, address: u64) -> std::io::Result<Option<[u8; 8]>> {
        match self.execute(registers::READ, address)? {
            true => Ok(Some(self.read(registers::DATA)?.to_le_bytes())),
            false => Ok(None),
        }
    }

    /// What may be mapped of the BAR is, so that no access to it is a message; the rest is reached by messages.
    fn bar(&self) -> Result<(), Box<dyn Error>> {
        let device = &self.device;
        for (offset, _) in registers::AREAS {
            let before = self.read(registers::MESSAGES)?;
            device.write(registers::SHARED, offset + 0x10, b"straight")?;
            is("what was written", &device.read::<8>(registers::SHARED, offset + 0x10)?, b"straight")?;
            is("what the device sees", &self.execute(registers::LOOK, offset + 0x10)?, &true)?;
            is("what it sees", &self.read(registers::DATA)?.to_le_bytes(), b"straight")?;
            is("messages", &self.read(registers::MESSAGES)?, &before)?;
            device.write(registers::SHARED, offset - 0x10, b"messages")?;
            is("what was written", &device.read::<8>(registers::SHARED, offset - 0x10)?, b"messages")?;
            let after = self.read(registers::MESSAGES)?;
            is("whether there were messages", &(after > before), &true)?;
        }
        Ok(())
    }
}

/// Checks one thing.
fn is<T: PartialEq + std::fmt::Debug>(what: &str, seen: &T, expected: &T) -> Result<(), Box<dyn Error>> {
    match seen == expected {
        true => Ok(()),
        false => Err(format!("{what}: expected {expected:?}, seen {seen:?}").into()),
    }
}
