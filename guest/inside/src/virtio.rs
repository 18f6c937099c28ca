//! A virtio source of random numbers, driven by hand from user space, with and without what it writes to being mapped.

use std::{
    error::Error,
    thread,
    time::{Duration, Instant},
};

use crate::{
    memory::Shared,
    vfio::{Access, Device},
};

/// Bytes.
const PAGE: usize = 4096;
/// The same, as addresses are counted.
const STEP: u64 = 4096;

/// Where the device sees the queue: descriptors, available and used ring, a page each.
const RINGS: u32 = 0x10_0000;
/// Where it sees the page to fill.
const BUFFER: u64 = 0x80_0000;
/// Bytes to fill.
const BYTES: u32 = 64;
/// Entries of the queue.
const ENTRIES: u16 = 8;

/// Places of the common configuration.
mod common {
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(super) const DRIVER_FEATURE: u64 = 12;
    pub(super) const STATUS: u64 = 20;
    pub(super) const QUEUE_SELECT: u64 = 22;
    pub(super) const QUEUE_SIZE: u64 = 24;
    pub(super) const QUEUE_ENABLE: u64 = 28;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 30;
    pub(super) const QUEUE_DESC: u64 = 32;
    pub(super) const QUEUE_DRIVER: u64 = 40;
    pub(super) const QUEUE_DEVICE: u64 = 48;
}

/// A part of a BAR that a capability tells of.
#[derive(Clone, Copy, Debug)]
struct Part {
    bar: u32,
    offset: u64,
}

/// Drives the device at `bdf`: DMA to what is mapped arrives, DMA to what was unmapped or is read-only does not. The
/// host sees the faults.
///
/// # Errors
///
/// If something that must arrive does not, or the other way round.
pub(crate) fn probe(bdf: &str, group: &str) -> Result<(), Box<dyn Error>> {
    let memory = Shared::new(8 * PAGE)?;
    let device = Device::open(bdf, group)?;
    device.map(u64::from(RINGS), memory.address(), 3 * STEP, Access::Both)?;
    let buffer = memory.address() + 4 * STEP;
    device.map(BUFFER, buffer, STEP, Access::Both)?;
    let mut rng = Rng::start(&device, &memory)?;

    let filled = rng.ask()?;
    if filled != Some(BYTES) || !rng.is_overwritten() {
        return Err(format!("mapped: the device says {filled:?} and wrote {}", rng.is_overwritten()).into());
    }
    println!("@@PROBE mapped: written");

    // The same page under another address: the right memory is reached, not merely the right number.
    device.map(BUFFER + STEP, buffer + STEP, STEP, Access::Both)?;
    device.unmap(BUFFER, STEP)?;
    let filled = rng.ask()?;
    if rng.is_overwritten() {
        return Err(
            format!("unmapped: the device has written there all the same, and says {filled:?}").into()
        );
    }
    println!("@@PROBE unmapped: nothing written, the device says {filled:?}");

    rng = Rng::start(&device, &memory)?;
    device.map(BUFFER, buffer, STEP, Access::Read)?;
    let filled = rng.ask()?;
    if rng.is_overwritten() {
        return Err(
            format!("read-only: the device has written there all the same, and says {filled:?}").into()
        );
    }
    println!("@@PROBE read-only: nothing written, the device says {filled:?}");

    rng = Rng::start(&device, &memory)?;
    device.unmap(BUFFER, STEP)?;
    device.map(BUFFER, buffer, STEP, Access::Both)?;
    let filled = rng.ask()?;
    if filled != Some(BYTES) || !rng.is_overwritten() {
        return Err(
            format!("mapped again: the device says {filled:?} and wrote {}", rng.is_overwritten()).into()
        );
    }
    println!("@@PROBE mapped again: written");
    Ok(())
}

/// The device with its one queue.
struct Rng<'a> {
    device: &'a Device,
    memory: &'a Shared,
    notify: Part,
    /// Requests so far.
    asked: u16,
}

impl<'a> Rng<'a> {
    /// Resets the device and gives it an empty queue at the start of `memory`.
    fn start(device: &'a Device, memory: &'a Shared) -> Result<Rng<'a>, Box<dyn Error>> {
        // Memory space and bus mastering.
        device.write_config(4, &6u16.to_le_bytes())?;
        let (common, _) = part(device, 1)?;
        let (mut notify, multiplier) = part(device, 2)?;
        let put = |at: u64, bytes: &[u8]| device.write(common.bar, common.offset + at, bytes);
        let status = || device.read::<1>(common.bar, common.offset + common::STATUS);

        put(common::STATUS, &[0])?;
        let until = Instant::now() + Duration::from_secs(2);
        while status()? != [0] {
            if Instant::now() > until {
                return Err("the device does not reset".into());
            }
        }
        memory.write(0, &[0; 3 * PAGE]);
        put(common::STATUS, &[1 | 2])?;
        // VERSION_1 and ACCESS_PLATFORM, bits 32 and 33.
        for (select, features) in [(0u32, 0u32), (1, 3)] {
            put(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes())?;
            put(common::DRIVER_FEATURE, &features.to_le_bytes())?;
        }
        put(common::STATUS, &[1 | 2 | 8])?;
        if status()?[0] & 8 == 0 {
            return Err("the device does not take its features".into());
        }
        put(common::QUEUE_SELECT, &0u16.to_le_bytes())?;
        put(common::QUEUE_SIZE, &ENTRIES.to_le_bytes())?;
        for (at, address) in [
            (common::QUEUE_DESC, RINGS),
            (common::QUEUE_DRIVER, RINGS + 0x1000),
            (common::QUEUE_DEVICE, RINGS + 0x2000),
        ] {
            put(at, &address.to_le_bytes())?;
            put(at + 4, &0u32.to_le_bytes())?;
        }
        let offset: [u8; 2] = device.read(common.bar, common.offset + common::QUEUE_NOTIFY_OFF)?;
        notify.offset += u64::from(u16::from_le_bytes(offset)) * u64::from(multiplier);
        put(common::QUEUE_ENABLE, &1u16.to_le_bytes())?;
        put(common::STATUS, &[1 | 2 | 8 | 4])?;
        Ok(Rng { device, memory, notify, asked: 0 })
    }

    /// Asks for bytes, into a page filled with a pattern before; how many the device says it has written, if it
    /// answers within a second.
    fn ask(&mut self) -> Result<Option<u32>, Box<dyn Error>> {
        self.memory.write(4 * PAGE, &[0x5a; PAGE]);
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&BUFFER.to_le_bytes());
        descriptor[8..12].copy_from_slice(&BYTES.to_le_bytes());
        descriptor[12] = 2; // the device writes
        self.memory.write(0, &descriptor);
        let slot = usize::from(self.asked % ENTRIES);
        let (available, used) = (PAGE, 2 * PAGE);
        self.memory.write(available + 4 + 2 * slot, &0u16.to_le_bytes());
        self.asked += 1;
        self.memory.write(available + 2, &self.asked.to_le_bytes());
        self.device.write(self.notify.bar, self.notify.offset, &0u16.to_le_bytes())?;

        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            let mut index = [0; 2];
            self.memory.read(used + 2, &mut index);
            if u16::from_le_bytes(index) == self.asked {
                let mut length = [0; 4];
                self.memory.read(used + 4 + 8 * slot + 4, &mut length);
                return Ok(Some(u32::from_le_bytes(length)));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(None)
    }

    /// Whether the page is no longer as [`Rng::ask`] has filled it.
    fn is_overwritten(&self) -> bool {
        let mut page = [0; PAGE];
        self.memory.read(4 * PAGE, &mut page);
        page != [0x5a; PAGE]
    }
}

/// The part of a BAR that a capability of this type tells of, and the word after it.
fn part(device: &Device, kind: u8) -> Result<(Part, u32), Box<dyn Error>> {
    let mut at = u64::from(device.config::<1>(0x34)?[0]);
    // No more capabilities than fit.
    for _ in 0..48 {
        if at == 0 {
            break;
        }
        let capability: [u8; 20] = device.config(at)?;
        let word = |at: usize| {
            u32::from_le_bytes([capability[at], capability[at + 1], capability[at + 2], capability[at + 3]])
        };
        if capability[0] == 9 && capability[3] == kind {
            let part = Part { bar: u32::from(capability[4]), offset: u64::from(word(8)) };
            return Ok((part, word(16)));
        }
        at = u64::from(capability[1]);
    }
    Err(format!("the device has no virtio capability of type {kind}").into())
}
