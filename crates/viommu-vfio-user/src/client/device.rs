//! What the device has, and what is done with it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use zerocopy::{FromBytes, IntoBytes};

use super::Client;
use super::error::ClientError;
use crate::function::Area;
use crate::spec::{
    self, CAP_SPARSE_MMAP, CapHeader, Command, IrqAction, IrqFlags, IrqSet, RegionAccess, RegionFlags,
    SparseArea, SparseMmap,
};

/// Regions and kinds of interrupts that a device may have: a PCI function has 9 and 5.
const MAX_INDEX: u32 = 64;
/// Bytes of the greatest reply to GET_REGION_INFO.
const MAX_REGION_INFO: usize = 1 << 16;
/// Capabilities of a region that are looked at; there is one kind.
const MAX_CAPS: usize = 16;
/// Bytes of one access. Both ends have room for it in their sockets, so neither waits for the other to read.
const CHUNK: usize = 1 << 16;

/// What DEVICE_GET_INFO says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// It can be reset.
    pub reset: bool,
    /// It is a PCI function.
    pub pci: bool,
    /// Regions.
    pub regions: u32,
    /// Kinds of interrupts.
    pub irqs: u32,
}

/// What DEVICE_GET_REGION_INFO says.
#[derive(Debug)]
pub struct RegionInfo {
    /// What it allows. MMAP only with a file.
    pub flags: RegionFlags,
    /// Bytes; 0 for one that does not exist.
    pub size: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// The file to map.
    pub file: Option<OwnedFd>,
    /// What of the region may be mapped: all of it, where none is named.
    pub areas: Vec<Area>,
}

/// What DEVICE_GET_IRQ_INFO says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// What they can.
    pub flags: IrqFlags,
    /// How many there are.
    pub count: u32,
}

/// A reply's payload as a structure, exactly.
fn whole<T: FromBytes>(payload: &[u8]) -> Result<T, ClientError> {
    T::read_from_bytes(payload).map_err(|_| ClientError::broken("a reply of the wrong size"))
}

fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or_default()
}

fn exactly<T>() -> (usize, usize) {
    (size_of::<T>(), size_of::<T>())
}

impl Client {
    /// DEVICE_GET_INFO.
    ///
    /// # Errors
    /// Any of [`ClientError`].
    pub fn info(&self) -> Result<DeviceInfo, ClientError> {
        type Info = spec::DeviceInfo;
        let ask = Info { argsz: size::<Info>().into(), flags: 0.into(), regions: 0.into(), irqs: 0.into() };
        let mut connection = self.connection();
        let reply = connection.call(Command::DEVICE_GET_INFO, &[ask.as_bytes()], &[], exactly::<Info>())?;
        let info: Info = whole(&reply.payload)?;
        let (flags, regions, irqs) = (info.flags.get(), info.regions.get(), info.irqs.get());
        if regions > MAX_INDEX || irqs > MAX_INDEX {
            return Err(ClientError::Broken(format!("{regions} regions and {irqs} kinds of interrupts")));
        }
        Ok(DeviceInfo { reset: flags & 1 != 0, pci: flags & 2 != 0, regions, irqs })
    }

    /// DEVICE_GET_REGION_INFO. A region that says it can be mapped and brings no file cannot.
    ///
    /// # Errors
    /// Any of [`ClientError`].
    pub fn region_info(&self, index: u32) -> Result<RegionInfo, ClientError> {
        type Info = spec::RegionInfo;
        let mut room = MAX_REGION_INFO.min(1 << 12);
        // A server that needs more room says how much, and is asked once more.
        for _ in 0..2 {
            let ask = Info {
                argsz: u32::try_from(room).unwrap_or_default().into(),
                flags: 0.into(),
                index: index.into(),
                cap_offset: 0.into(),
                size: 0.into(),
                offset: 0.into(),
            };
            let sizes = (size_of::<Info>(), room);
            let reply =
                self.connection().call(Command::DEVICE_GET_REGION_INFO, &[ask.as_bytes()], &[], sizes)?;
            let (info, _) = Info::read_from_prefix(&reply.payload)
                .map_err(|_| ClientError::broken("a reply of the wrong size"))?;
            if info.index.get() != index {
                return Err(ClientError::Broken(format!(
                    "region {} where {index} was asked for",
                    info.index
                )));
            }
            let needed = usize::try_from(info.argsz.get()).unwrap_or(usize::MAX);
            if needed > room && needed <= MAX_REGION_INFO {
                room = needed;
                continue;
            }
            return region_of(&info, &reply.payload, reply.fds);
        }
        Err(ClientError::broken("a region's description that grows"))
    }

    /// DEVICE_GET_IRQ_INFO.
    ///
    /// # Errors
    /// Any of [`ClientError`].
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, ClientError> {
        type Info = spec::IrqInfo;
        let ask =
            Info { argsz: size::<Info>().into(), flags: 0.into(), index: index.into(), count: 0.into() };
        let mut connection = self.connection();
        let reply =
            connection.call(Command::DEVICE_GET_IRQ_INFO, &[ask.as_bytes()], &[], exactly::<Info>())?;
        let info: Info = whole(&reply.payload)?;
        if info.index.get() != index {
            return Err(ClientError::Broken(format!(
                "interrupts {} where {index} were asked for",
                info.index
            )));
        }
        Ok(IrqInfo { flags: IrqFlags::from_bits_retain(info.flags.get()), count: info.count.get() })
    }

    /// DEVICE_SET_IRQS for `count` interrupts from `start` on: with a byte each in `data` (DATA_BOOL), or with a descriptor
    /// each in `events` (DATA_EVENTFD), where those without one lose theirs. More descriptors than the server takes at once
    /// go in several messages.
    ///
    /// # Errors
    /// Any of [`ClientError`]. Of several messages, those before the one refused are done.
    pub fn set_irqs(
        &self,
        index: u32,
        action: IrqAction,
        start: u32,
        count: u32,
        data: &[u8],
        events: &[OwnedFd],
    ) -> Result<(), ClientError> {
        let takes = self.capabilities().fds;
        let given = u32::try_from(events.len()).unwrap_or(u32::MAX);
        if given > count || (given > 0 && takes == 0) {
            return Err(ClientError::Request("more descriptors than interrupts, or than the server takes"));
        }
        if events.is_empty() {
            return self.set_some(index, action, start, count, data, &[]);
        }
        let mut next = start;
        for some in events.chunks(takes) {
            let fds: Vec<_> = some.iter().map(AsFd::as_fd).collect();
            let count = u32::try_from(some.len()).unwrap_or_default();
            self.set_some(index, action, next, count, data, &fds)?;
            next = next.saturating_add(count);
        }
        match count.saturating_sub(given) {
            0 => Ok(()),
            rest => self.set_some(index, action, next, rest, data, &[]),
        }
    }

    fn set_some(
        &self,
        index: u32,
        action: IrqAction,
        start: u32,
        count: u32,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let bytes = size_of::<IrqSet>().saturating_add(data.len());
        let set = IrqSet {
            argsz: u32::try_from(bytes).unwrap_or_default().into(),
            flags: action.bits().into(),
            index: index.into(),
            start: start.into(),
            count: count.into(),
        };
        let parts = [set.as_bytes(), data];
        // Some servers repeat the fixed part.
        let sizes = (0, size_of::<IrqSet>());
        self.connection().call(Command::DEVICE_SET_IRQS, &parts, fds, sizes).map(drop)
    }

    /// REGION_READ of all of `data`, in pieces that the server takes.
    ///
    /// # Errors
    /// Any of [`ClientError`]; of `data` the pieces before it are read.
    pub fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), ClientError> {
        let mut at = offset;
        for piece in data.chunks_mut(self.capabilities().transfer.min(CHUNK)) {
            let access = access_of(region, at, piece.len());
            let most = size_of::<RegionAccess>().saturating_add(piece.len());
            let mut connection = self.connection();
            let parts = [access.as_bytes()];
            let reply = connection.call(Command::REGION_READ, &parts, &[], (most, most))?;
            drop(connection);
            let (said, got) = RegionAccess::read_from_prefix(&reply.payload)
                .map_err(|_| ClientError::broken("a reply of the wrong size"))?;
            if said.as_bytes() != access.as_bytes() || got.len() != piece.len() {
                return Err(ClientError::broken("a reply to another read"));
            }
            piece.copy_from_slice(got);
            at = at.wrapping_add(u64::try_from(piece.len()).unwrap_or_default());
        }
        Ok(())
    }

    /// REGION_WRITE of all of `data`, in pieces that the server takes.
    ///
    /// # Errors
    /// Any of [`ClientError`]; the pieces before it are written.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        let mut at = offset;
        for piece in data.chunks(self.capabilities().transfer.min(CHUNK)) {
            let access = access_of(region, at, piece.len());
            let parts = [access.as_bytes(), piece];
            let reply =
                self.connection().call(Command::REGION_WRITE, &parts, &[], exactly::<RegionAccess>())?;
            if reply.payload != access.as_bytes() {
                return Err(ClientError::broken("a reply to another write"));
            }
            at = at.wrapping_add(u64::try_from(piece.len()).unwrap_or_default());
        }
        Ok(())
    }

    /// DEVICE_RESET. Windows and interrupts stay.
    ///
    /// # Errors
    /// Any of [`ClientError`].
    pub fn reset(&self) -> Result<(), ClientError> {
        self.connection().call(Command::DEVICE_RESET, &[], &[], (0, 0)).map(drop)
    }
}

fn access_of(region: u32, offset: u64, bytes: usize) -> RegionAccess {
    let count = u32::try_from(bytes).unwrap_or_default();
    RegionAccess { offset: offset.into(), region: region.into(), count: count.into() }
}

fn region_of(info: &spec::RegionInfo, payload: &[u8], fds: Vec<OwnedFd>) -> Result<RegionInfo, ClientError> {
    let mut flags = RegionFlags::from_bits_retain(info.flags.get());
    let size = info.size.get();
    let areas = match flags.contains(RegionFlags::CAPS) {
        true => areas_of(info.cap_offset.get(), size, payload)?,
        false => Vec::new(),
    };
    let file = fds.into_iter().next().filter(|_| flags.contains(RegionFlags::MMAP));
    if file.is_none() {
        flags.remove(RegionFlags::MMAP);
    }
    Ok(RegionInfo { flags, size, offset: info.offset.get(), file, areas })
}

fn areas_of(first: u32, region: u64, payload: &[u8]) -> Result<Vec<Area>, ClientError> {
    let broken = || ClientError::broken("a region's capabilities make no sense");
    let mut at = first;
    for _ in 0..MAX_CAPS {
        if at == 0 {
            return Ok(Vec::new());
        }
        let here = usize::try_from(at).ok().and_then(|at| payload.get(at..)).ok_or_else(broken)?;
        let (header, rest) = CapHeader::read_from_prefix(here).map_err(|_| broken())?;
        if header.id.get() != CAP_SPARSE_MMAP {
            at = header.next.get();
            continue;
        }
        let (sparse, rest) = SparseMmap::read_from_prefix(rest).map_err(|_| broken())?;
        let count = usize::try_from(sparse.areas.get()).map_err(|_| broken())?;
        let bytes = count.checked_mul(size_of::<SparseArea>()).and_then(|bytes| rest.get(..bytes));
        let areas = <[SparseArea]>::ref_from_bytes(bytes.ok_or_else(broken)?).map_err(|_| broken())?;
        let area = |area: &SparseArea| Area { offset: area.offset.get(), size: area.size.get() };
        let areas: Vec<_> = areas.iter().map(area).collect();
        let inside = |area: &Area| area.offset.checked_add(area.size).is_some_and(|end| end <= region);
        return if areas.iter().all(inside) { Ok(areas) } else { Err(broken()) };
    }
    Err(broken())
}
