//! QEMU's `edu` device: a DMA engine with a buffer of a page, for which each transfer takes a tenth of a second.

use std::{
    error::Error,
    thread,
    time::{Duration, Instant},
};

use crate::vfio::Device;

/// Bytes that one transfer moves here.
pub(crate) const BYTES: usize = 64;

/// Registers of its first BAR.
mod register {
    pub(super) const IDENTITY: u64 = 0;
    pub(super) const SOURCE: u64 = 0x80;
    pub(super) const TARGET: u64 = 0x88;
    pub(super) const COUNT: u64 = 0x90;
    pub(super) const COMMAND: u64 = 0x98;
}

/// Where the device's buffer is, as its transfers name it.
const BUFFER: u64 = 0x4_0000;
/// Bits of the command.
const RUN: u64 = 1;
const TO_MEMORY: u64 = 2;

/// A device with memory space and bus mastering switched on.
#[derive(Clone, Copy)]
pub(crate) struct Edu<'a>(&'a Device);

impl<'a> Edu<'a> {
    /// Takes the device.
    ///
    /// # Errors
    ///
    /// If it is another one.
    pub(crate) fn start(device: &'a Device) -> Result<Edu<'a>, Box<dyn Error>> {
        device.write_config(4, &6u16.to_le_bytes())?;
        match u32::from_le_bytes(device.read(0, register::IDENTITY)?) {
            identity if identity & 0xff == 0xed => Ok(Edu(device)),
            identity => Err(format!("no edu device: it says {identity:#x}").into()),
        }
    }

    /// Has the device read `BYTES` bytes at `iova` into its buffer.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub(crate) fn load(&self, iova: u64) -> Result<(), Box<dyn Error>> {
        self.begin(iova, BUFFER, RUN)?;
        self.wait()
    }

    /// Has the device begin to write its buffer to `iova`; it does so a tenth of a second later.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub(crate) fn begin_store(&self, iova: u64) -> Result<(), Box<dyn Error>> {
        self.begin(BUFFER, iova, RUN | TO_MEMORY)
    }

    /// The same, and waits for it.
    ///
    /// # Errors
    ///
    /// As [`Edu::begin_store`].
    pub(crate) fn store(&self, iova: u64) -> Result<(), Box<dyn Error>> {
        self.begin_store(iova)?;
        self.wait()
    }

    fn begin(&self, source: u64, target: u64, command: u64) -> Result<(), Box<dyn Error>> {
        let registers = [
            (register::SOURCE, source),
            (register::TARGET, target),
            (register::COUNT, BYTES as u64),
            (register::COMMAND, command),
        ];
        for (at, value) in registers {
            self.0.write(0, at, &value.to_le_bytes())?;
        }
        Ok(())
    }

    /// Waits until the transfer is over.
    ///
    /// # Errors
    ///
    /// If it takes seconds.
    pub(crate) fn wait(&self) -> Result<(), Box<dyn Error>> {
        let until = Instant::now() + Duration::from_secs(10);
        while u64::from_le_bytes(self.0.read(0, register::COMMAND)?) & RUN != 0 {
            if Instant::now() > until {
                return Err("the edu device does not end its transfer".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}
