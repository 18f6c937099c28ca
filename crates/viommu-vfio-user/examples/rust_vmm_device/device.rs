//! The device: registers, a BAR whose file may be mapped, and DMA through the descriptors that it is given.

#[path = "registers.rs"]
mod registers;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Error, ErrorKind, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_NUM_IRQS,
    VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion, SparseArea};

/// MSI vectors.
pub(crate) const VECTORS: u32 = 4;

pub(crate) use registers::{
    ADDRESS, AREAS, COMMAND, DATA, IDENTITY, LOOK, MESSAGES, RAISE, READ, REGISTERS, REGISTERS_SIZE, RESETS,
    SHARED, SHARED_OFFSET, SHARED_SIZE, WINDOWS, WRITE,
};

/// What the server has told the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Map { flags: u32, file: bool, offset: u64, address: u64, size: u64 },
    Unmap { flags: u32, address: u64, size: u64 },
    Irqs { index: u32, flags: u32, start: u32, count: u32, fds: usize },
    Reset,
}

struct Held {
    size: u64,
    flags: DmaMapFlags,
    file: Option<File>,
    offset: u64,
}

pub(crate) struct Device {
    config: [u8; 256],
    address: u64,
    data: u64,
    failed: bool,
    resets: u64,
    messages: u64,
    shared: File,
    windows: BTreeMap<u64, Held>,
    line: Option<File>,
    /// Windows that it holds at most.
    limit: usize,
    /// It does not take this window away.
    keeps: Option<u64>,
    told: Box<dyn FnMut(Told) + Send>,
}

fn refused(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidInput, what)
}

/// A register of which some bytes are written.
fn written(register: u64, offset: u64, data: &[u8]) -> io::Result<u64> {
    let mut bytes = register.to_le_bytes();
    let to = bytes.get_mut(at(offset & 7, data.len()));
    to.ok_or_else(|| refused("more than a register"))?.copy_from_slice(data);
    Ok(u64::from_le_bytes(bytes))
}

fn at(offset: u64, len: usize) -> std::ops::Range<usize> {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    from..from.saturating_add(len)
}

/// Configuration space: two BARs of memory, an INTx pin, and MSI of four vectors with addresses of 64 bits.
fn config() -> [u8; 256] {
    let mut config = [0; 256];
    config[..4].copy_from_slice(&IDENTITY);
    config[0x06] = 0x10; // a list of capabilities
    config[0x0b] = 0xff; // of no class
    config[0x34] = 0x40;
    config[0x3d] = 1;
    config[0x40] = 0x05;
    config[0x42] = 0x84;
    config
}

impl Device {
    /// `told` hears of all but accesses to regions.
    pub(crate) fn new(told: impl FnMut(Told) + Send + 'static) -> io::Result<Self> {
        let shared = File::from(memfd_create("bar", MemfdFlags::CLOEXEC)?);
        shared.set_len(SHARED_OFFSET + SHARED_SIZE)?;
        Ok(Self {
            config: config(),
            address: 0,
            data: 0,
            failed: false,
            resets: 0,
            messages: 0,
            shared,
            windows: BTreeMap::new(),
            line: None,
            limit: 1 << 16,
            keeps: None,
            told: Box::new(told),
        })
    }

    /// It refuses windows above this number.
    pub(crate) fn limited(self, limit: usize) -> Self {
        Self { limit, ..self }
    }

    /// It refuses to take away the window that begins at `address`.
    pub(crate) fn keeping(self, address: u64) -> Self {
        Self { keeps: Some(address), ..self }
    }

    /// The first address and the size of each window.
    pub(crate) fn windows(&self) -> Vec<(u64, u64)> {
        self.windows.iter().map(|(address, held)| (*address, held.size)).collect()
    }

    /// The client has gone: the crate tells nobody, so the program does.
    pub(crate) fn gone(&mut self) {
        self.windows.clear();
        self.line = None;
        self.start_anew();
    }

    fn start_anew(&mut self) {
        (self.config, self.address, self.data, self.failed) = (config(), 0, 0, false);
    }

    /// What the crate's server is to say of it.
    pub(crate) fn regions(&self) -> Vec<ServerRegion> {
        let access = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        let region = |index: u32| {
            let (size, flags, offset) = match index {
                REGISTERS => (REGISTERS_SIZE, access, 0),
                SHARED => (SHARED_SIZE, access | VFIO_REGION_INFO_FLAG_MMAP, SHARED_OFFSET),
                VFIO_PCI_CONFIG_REGION_INDEX => (256, access, 0),
                _ => (0, 0, 0),
            };
            let area = |(offset, size)| SparseArea { area: vfio_region_sparse_mmap_area { offset, size } };
            let mapped: Option<RawFd> = (index == SHARED).then(|| self.shared.as_raw_fd());
            ServerRegion {
                region_info: vfio_region_info { argsz: 32, flags, index, cap_offset: 0, size, offset },
                sparse_areas: mapped.map_or_else(Vec::new, |_| AREAS.map(area).into()),
                mmap_fd: mapped,
            }
        };
        (0..VFIO_PCI_NUM_REGIONS).map(region).collect()
    }

    /// Likewise of its interrupts.
    pub(crate) fn irqs() -> Vec<IrqInfo> {
        let irq = |index: u32| {
            let count = match index {
                VFIO_PCI_INTX_IRQ_INDEX => 1,
                VFIO_PCI_MSI_IRQ_INDEX => VECTORS,
                _ => 0,
            };
            IrqInfo { index, flags: if count > 0 { VFIO_IRQ_INFO_EVENTFD } else { 0 }, count }
        };
        (0..VFIO_PCI_NUM_IRQS).map(irq).collect()
    }

    /// Where 8 bytes of guest memory lie, if they may be accessed so.
    fn find(&self, access: DmaMapFlags) -> io::Result<(&File, u64)> {
        let (start, held) = self.windows.range(..=self.address).next_back().ok_or(ErrorKind::NotFound)?;
        let within = self.address - start;
        if within.checked_add(8).is_none_or(|end| end > held.size) || !held.flags.contains(access) {
            return Err(ErrorKind::PermissionDenied.into());
        }
        Ok((held.file.as_ref().ok_or(ErrorKind::Unsupported)?, held.offset + within))
    }

    fn execute(&mut self, command: u64) -> io::Result<()> {
        let mut bytes = [0; 8];
        match command {
            READ => {
                let (file, offset) = self.find(DmaMapFlags::READ)?;
                file.read_exact_at(&mut bytes, offset)?;
                self.data = u64::from_le_bytes(bytes);
            }
            WRITE => {
                let (file, offset) = self.find(DmaMapFlags::WRITE)?;
                file.write_all_at(&self.data.to_le_bytes(), offset)?;
            }
            RAISE => {
                let line = self.line.as_mut().ok_or(ErrorKind::NotConnected)?;
                line.write_all(&1_u64.to_ne_bytes())?;
            }
            LOOK => {
                self.shared.read_exact_at(&mut bytes, SHARED_OFFSET + self.address)?;
                self.data = u64::from_le_bytes(bytes);
            }
            _ => return Err(refused("no command")),
        }
        Ok(())
    }
}

impl ServerBackend for Device {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if region == SHARED {
            self.messages += 1;
            return self.shared.read_exact_at(data, SHARED_OFFSET + offset);
        }
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            let from = self.config.get(at(offset, data.len())).ok_or_else(|| refused("beyond the end"))?;
            data.copy_from_slice(from);
            return Ok(());
        }
        let value = match offset & !7 {
            ADDRESS => self.address,
            DATA => self.data,
            COMMAND => self.failed.into(),
            WINDOWS => u64::try_from(self.windows.len()).unwrap_or(u64::MAX),
            RESETS => self.resets,
            MESSAGES => self.messages,
            _ => return Err(refused("no register")),
        };
        let bytes = value.to_le_bytes();
        let from = bytes.get(at(offset & 7, data.len())).ok_or_else(|| refused("more than a register"))?;
        data.copy_from_slice(from);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        if region == SHARED {
            self.messages += 1;
            return self.shared.write_all_at(data, SHARED_OFFSET + offset);
        }
        if region == VFIO_PCI_CONFIG_REGION_INDEX {
            let to = self.config.get_mut(at(offset, data.len())).ok_or_else(|| refused("beyond the end"))?;
            // Of the header, a driver writes the command and the BARs; their sizes are the client's to know.
            if (0x04..0x06).contains(&offset) || (0x10..0x28).contains(&offset) {
                to.copy_from_slice(data);
            }
            return Ok(());
        }
        match offset & !7 {
            ADDRESS => self.address = written(self.address, offset, data)?,
            DATA => self.data = written(self.data, offset, data)?,
            // Whatever the upper half may bring.
            COMMAND if offset != COMMAND => {}
            COMMAND => self.failed = self.execute(written(0, offset, data)?).is_err(),
            _ => return Err(refused("no register")),
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        file: Option<File>,
    ) -> io::Result<()> {
        (self.told)(Told::Map { flags: flags.bits(), file: file.is_some(), offset, address, size });
        let end = address.checked_add(size).ok_or_else(|| refused("beyond the end"))?;
        let below = self.windows.range(..end).next_back();
        if below.is_some_and(|(start, held)| start + held.size > address) {
            return Err(refused("something is there"));
        }
        if self.windows.len() >= self.limit {
            return Err(refused("no room"));
        }
        self.windows.insert(address, Held { size, flags, file, offset });
        Ok(())
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        (self.told)(Told::Unmap { flags: flags.bits(), address, size });
        let exact = self.windows.get(&address).is_some_and(|held| held.size == size);
        if !exact || self.keeps == Some(address) {
            return Err(refused("no such window"));
        }
        self.windows.remove(&address);
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        (self.told)(Told::Reset);
        self.resets += 1;
        self.start_anew();
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        mut fds: Vec<File>,
    ) -> io::Result<()> {
        (self.told)(Told::Irqs { index, flags, start, count, fds: fds.len() });
        let events = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        if index == VFIO_PCI_INTX_IRQ_INDEX && (flags == events || count == 0) {
            self.line = fds.pop();
        }
        Ok(())
    }
}
