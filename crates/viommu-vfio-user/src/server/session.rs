//! One client: from its messages to the function, and back.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use zerocopy::native_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

use super::version::{self, ClientCapabilities, MAX_TRANSFER};
use crate::function::{Function, IrqRequest, Region};
use crate::memory::WindowError;
use crate::message::Received;
use crate::spec::{
    CAP_SPARSE_MMAP, CapHeader, Command, DeviceInfo, DmaMap, DmaUnmap, HEADER, Header, IoFd, IoFds,
    IrqAction, IrqInfo, IrqSet, MessageFlags, MultiWrite, RegionAccess, RegionFlags, RegionInfo, SparseArea,
    SparseMmap, UNMAP_ALL, irq, region,
};

/// Bytes behind the header of the greatest message that is taken: a write of as much as may be, with its own header.
pub(crate) const MAX_PAYLOAD: usize = MAX_TRANSFER + size_of::<RegionAccess>();

/// What to do with a message.
pub(crate) enum Outcome {
    /// Send this, with the session's reply as payload.
    Reply(Header, Vec<Arc<OwnedFd>>),
    /// Nothing is to be sent.
    Silence,
    /// The client cannot be spoken with.
    HangUp(&'static str),
}

/// What is known of a client.
#[derive(Debug)]
pub(crate) struct Session {
    /// None until it has said its version.
    client: Option<ClientCapabilities>,
    /// Windows that it may have.
    windows: usize,
    /// Windows that were refused and told of.
    told: u32,
    /// The payload of the reply.
    reply: Vec<u8>,
}

/// Files to send with a reply.
type Files = Vec<Arc<OwnedFd>>;

/// Windows that are refused and told of in the log: the first ones say what is wrong.
const TOLD: u32 = 4;

impl Session {
    pub(crate) fn new(windows: usize) -> Self {
        Self { client: None, windows, told: 0, reply: Vec::new() }
    }

    /// The payload that belongs to the last [`Outcome::Reply`].
    pub(crate) fn payload(&self) -> &[u8] {
        &self.reply
    }

    /// Does what one message asks for.
    pub(crate) fn handle(
        &mut self,
        function: &mut impl Function,
        message: Received,
        payload: &[u8],
    ) -> Outcome {
        let Received { header, fds } = message;
        let flags = MessageFlags::from_bits_retain(header.flags.get());
        match header.flags.get() & TYPE {
            0 => {}
            // To a command of ours. We asked for none, and there is nothing to do with one.
            1 => return Outcome::Silence,
            _ => return Outcome::HangUp("a message that is neither command nor reply"),
        }
        let command = Command(header.command.get());
        if self.client.is_none() && command != Command::VERSION {
            return Outcome::HangUp("the first message was not VERSION");
        }
        self.reply.clear();
        let result = self.execute(function, command, payload, fds);
        if let Err(errno) = &result {
            crate::log::refused(command.0, *errno);
        }
        if flags.contains(MessageFlags::NO_REPLY) {
            return Outcome::Silence;
        }
        let mut flags = MessageFlags::REPLY;
        let (files, error) = match result {
            Ok(files) => (files, 0),
            Err(errno) => {
                self.reply.clear();
                flags |= MessageFlags::ERROR;
                (Files::new(), u32::try_from(errno.raw_os_error()).unwrap_or_default())
            }
        };
        let Ok(size) = u32::try_from(self.reply.len().saturating_add(HEADER)) else {
            return Outcome::HangUp("a reply that is too long");
        };
        let header = Header {
            id: header.id,
            command: header.command,
            size: size.into(),
            flags: flags.bits().into(),
            error: error.into(),
        };
        Outcome::Reply(header, files)
    }

    fn execute(
        &mut self,
        function: &mut impl Function,
        command: Command,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Files, Errno> {
        if !fds.is_empty() && !matches!(command, Command::DMA_MAP | Command::DEVICE_SET_IRQS) {
            return Err(Errno::INVAL);
        }
        match command {
            Command::VERSION => self.version(payload)?,
            Command::DMA_MAP => self.map(function, payload, fds)?,
            Command::DMA_UNMAP => self.unmap(function, payload)?,
            Command::DEVICE_GET_INFO => {
                argsz(payload, size_of::<DeviceInfo>())?;
                self.answer(&DeviceInfo {
                    argsz: bytes_of::<DeviceInfo>().into(),
                    flags: 0b11.into(),
                    regions: region::COUNT.into(),
                    irqs: irq::COUNT.into(),
                });
            }
            Command::DEVICE_GET_REGION_INFO => return self.region_info(function, payload),
            Command::DEVICE_GET_REGION_IO_FDS => return self.io_fds(function, payload),
            Command::DEVICE_GET_IRQ_INFO => self.irq_info(function, payload)?,
            Command::DEVICE_SET_IRQS => {
                argsz(payload, size_of::<IrqSet>())?;
                let (set, data) = read::<IrqSet>(payload)?;
                let action = IrqAction::from_bits_retain(set.flags.get());
                let (index, start, count) = (set.index.get(), set.start.get(), set.count.get());
                function.set_irqs(IrqRequest { index, action, start, count, data, events: fds })?;
            }
            Command::REGION_READ => self.region_read(function, payload)?,
            Command::REGION_WRITE => self.region_write(function, payload)?,
            Command::REGION_WRITE_MULTI => self.write_multi(function, payload)?,
            Command::DEVICE_RESET => function.reset(),
            _ => return Err(Errno::NOSYS),
        }
        Ok(Files::new())
    }

    fn answer(&mut self, payload: &(impl IntoBytes + zerocopy::Immutable)) {
        self.reply.extend_from_slice(payload.as_bytes());
    }

    fn version(&mut self, payload: &[u8]) -> Result<(), Errno> {
        if self.client.is_some() {
            return Err(Errno::INVAL);
        }
        let (client, reply) = version::negotiate(payload, self.windows)?;
        self.client = Some(client);
        self.reply = reply;
        Ok(())
    }

    fn map(&mut self, function: &mut impl Function, payload: &[u8], fds: Vec<OwnedFd>) -> Result<(), Errno> {
        argsz(payload, size_of::<DmaMap>())?;
        let (map, _) = read::<DmaMap>(payload)?;
        let mut fds = fds.into_iter();
        let file = fds.next().map(File::from);
        if fds.next().is_some() {
            return Err(Errno::INVAL);
        }
        let (offset, address, size) = (map.offset.get(), map.address.get(), map.size.get());
        let window = function.windows().map(map.flags.get(), file, offset, address, size);
        let window = window.map_err(|error| {
            if self.told < TOLD {
                self.told = self.told.saturating_add(1);
                crate::log::window(address, size, &error, self.told == TOLD);
            }
            errno_of(error)
        })?;
        function.mapped(window);
        Ok(())
    }

    fn unmap(&mut self, function: &mut impl Function, payload: &[u8]) -> Result<(), Errno> {
        argsz(payload, size_of::<DmaUnmap>())?;
        let (unmap, _) = read::<DmaUnmap>(payload)?;
        let (address, size) = (unmap.address.get(), unmap.size.get());
        let windows = function.windows().clone();
        match unmap.flags.get() {
            0 => windows.unmap(address, size, |window| function.unmapped(window)).map_err(errno_of)?,
            UNMAP_ALL if address == 0 && size == 0 => windows.clear(|window| function.unmapped(window)),
            _ => return Err(Errno::INVAL),
        }
        self.answer(&unmap);
        Ok(())
    }

    fn region_info(&mut self, function: &impl Function, payload: &[u8]) -> Result<Files, Errno> {
        argsz(payload, size_of::<RegionInfo>())?;
        let (asked, _) = read::<RegionInfo>(payload)?;
        let index = asked.index.get();
        if index >= region::COUNT {
            return Err(Errno::INVAL);
        }
        let (target, size) = region_of(function, index).map_or((None, 0), |(at, size)| (Some(at), size));
        let mut flags = if size > 0 { RegionFlags::READ | RegionFlags::WRITE } else { RegionFlags::empty() };
        let takes_files = self.client.is_some_and(|client| client.fds() > 0);
        let file = target.and_then(|target| function.region_file(target)).filter(|_| takes_files);
        let areas = file.as_ref().map_or(&[][..], |file| &file.areas);
        flags.set(RegionFlags::MMAP, file.is_some());
        let fixed = size_of::<RegionInfo>();
        let list = areas.len().saturating_mul(size_of::<SparseArea>());
        let heads = size_of::<CapHeader>().saturating_add(size_of::<SparseMmap>());
        let more = if areas.is_empty() { 0 } else { heads.saturating_add(list) };
        let needed = fixed.saturating_add(more);
        let room = usize::try_from(asked.argsz.get()).unwrap_or(usize::MAX);
        // A client that has less room learns how much it takes, and asks again. QEMU takes no CAPS before they are there.
        let whole = room >= needed;
        let cap_offset = if whole && more > 0 { bytes_of::<RegionInfo>() } else { 0 };
        flags.set(RegionFlags::CAPS, cap_offset > 0);
        self.answer(&RegionInfo {
            argsz: u32::try_from(needed).map_err(|_| Errno::OVERFLOW)?.into(),
            flags: flags.bits().into(),
            index: index.into(),
            cap_offset: cap_offset.into(),
            size: size.into(),
            offset: file.as_ref().map_or(0, |file| file.offset).into(),
        });
        if cap_offset > 0 {
            self.answer(&CapHeader { id: CAP_SPARSE_MMAP.into(), version: 1.into(), next: 0.into() });
            let count = u32::try_from(areas.len()).map_err(|_| Errno::OVERFLOW)?;
            self.answer(&SparseMmap { areas: count.into(), reserved: 0.into() });
            for area in areas {
                self.answer(&SparseArea { offset: area.offset.into(), size: area.size.into() });
            }
        }
        Ok(file.filter(|_| whole).map(|file| file.file).into_iter().collect())
    }

    fn io_fds(&mut self, function: &impl Function, payload: &[u8]) -> Result<Files, Errno> {
        argsz(payload, size_of::<IoFds>())?;
        let (asked, _) = read::<IoFds>(payload)?;
        let index = asked.index.get();
        if index >= region::COUNT || asked.flags.get() != 0 {
            return Err(Errno::INVAL);
        }
        let fds = self.client.map_or(1, |client| client.fds());
        let doorbells = function.doorbells().into_iter().filter(|bell| u32::from(bell.bar) == index);
        let doorbells: Vec<_> = doorbells.take(fds).collect();
        let entries = doorbells.len().saturating_mul(size_of::<IoFd>());
        let needed = entries.saturating_add(size_of::<IoFds>());
        let room = usize::try_from(asked.argsz.get()).unwrap_or(usize::MAX);
        let whole = room >= needed;
        self.answer(&IoFds {
            argsz: u32::try_from(needed).map_err(|_| Errno::OVERFLOW)?.into(),
            flags: 0.into(),
            index: index.into(),
            count: u32::try_from(doorbells.len()).map_err(|_| Errno::OVERFLOW)?.into(),
        });
        let mut files = Files::new();
        for (nth, bell) in (0_u32..).zip(doorbells) {
            // A client that has less room learns how much it takes, and asks again.
            if !whole {
                break;
            }
            self.answer(&IoFd {
                offset: bell.offset.into(),
                size: bell.size.into(),
                fd_index: nth.into(),
                kind: 0.into(),
                flags: u32::from(bell.value.is_some()).into(),
                padding: 0.into(),
                datamatch: bell.value.unwrap_or_default().into(),
            });
            files.push(bell.event);
        }
        Ok(files)
    }

    fn irq_info(&mut self, function: &impl Function, payload: &[u8]) -> Result<(), Errno> {
        argsz(payload, size_of::<IrqInfo>())?;
        let (asked, _) = read::<IrqInfo>(payload)?;
        let (flags, count) = function.irq_info(asked.index.get()).ok_or(Errno::INVAL)?;
        self.answer(&IrqInfo {
            argsz: bytes_of::<IrqInfo>().into(),
            flags: flags.bits().into(),
            index: asked.index,
            count: count.into(),
        });
        Ok(())
    }

    fn region_read(&mut self, function: &mut impl Function, payload: &[u8]) -> Result<(), Errno> {
        let (access, rest) = read::<RegionAccess>(payload)?;
        let count = usize::try_from(access.count.get()).map_err(|_| Errno::INVAL)?;
        let most = self.client.map_or(0, |client| client.transfer());
        if count > most || !rest.is_empty() {
            return Err(Errno::INVAL);
        }
        let target = within(function, access.region.get(), access.offset.get(), count)?;
        self.answer(&access);
        let head = self.reply.len();
        self.reply.resize(head.saturating_add(count), 0);
        function.read(target, access.offset.get(), self.reply.get_mut(head..).unwrap_or_default());
        Ok(())
    }

    fn region_write(&mut self, function: &mut impl Function, payload: &[u8]) -> Result<(), Errno> {
        let (access, data) = read::<RegionAccess>(payload)?;
        if usize::try_from(access.count.get()).ok() != Some(data.len()) {
            return Err(Errno::INVAL);
        }
        let target = within(function, access.region.get(), access.offset.get(), data.len())?;
        function.write(target, access.offset.get(), data);
        self.answer(&access);
        Ok(())
    }

    fn write_multi(&mut self, function: &mut impl Function, payload: &[u8]) -> Result<(), Errno> {
        let (count, rest) = read::<U64>(payload)?;
        let writes = <[MultiWrite]>::ref_from_bytes(rest).map_err(|_| Errno::INVAL)?;
        if u64::try_from(writes.len()).ok() != Some(count.get()) {
            return Err(Errno::INVAL);
        }
        for write in writes {
            let bytes = usize::try_from(write.count.get()).unwrap_or(usize::MAX);
            let data = write.data.get(..bytes).ok_or(Errno::INVAL)?;
            let target = within(function, write.region.get(), write.offset.get(), bytes)?;
            function.write(target, write.offset.get(), data);
        }
        self.answer(&count);
        Ok(())
    }
}

/// Bits of a message's type.
const TYPE: u32 = 0xf;

fn errno_of(error: WindowError) -> Errno {
    match error {
        WindowError::Overlap => Errno::EXIST,
        WindowError::TooMany(_) | WindowError::TooManyFiles(_) | WindowError::TooMuch(_) => Errno::NOSPC,
        WindowError::Unsealed | WindowError::Huge => Errno::PERM,
        WindowError::Unknown => Errno::NOENT,
        WindowError::Descriptor(errno) => errno,
        WindowError::Map(_) => Errno::NOMEM,
        _ => Errno::INVAL,
    }
}

/// The fixed part of a payload, and the rest.
fn read<T: FromBytes>(payload: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(payload).map_err(|_| Errno::INVAL)
}

/// A request says first how many bytes it has, or has room for in a reply: not less than `least`.
fn argsz(payload: &[u8], least: usize) -> Result<(), Errno> {
    let (argsz, _) = read::<zerocopy::native_endian::U32>(payload)?;
    let room = usize::try_from(argsz.get()).unwrap_or(usize::MAX);
    if room < least { Err(Errno::INVAL) } else { Ok(()) }
}

fn bytes_of<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or_default()
}

fn region_of(function: &impl Function, index: u32) -> Option<(Region, u64)> {
    if index == region::CONFIG {
        return Some((Region::Config, function.config_size()));
    }
    let bar = u8::try_from(index).ok()?;
    let size = *function.bars().get(usize::from(bar))?;
    (size > 0).then_some((Region::Bar(bar), size))
}

/// The region, if all of the access is in it.
fn within(function: &impl Function, index: u32, offset: u64, count: usize) -> Result<Region, Errno> {
    let (target, size) = region_of(function, index).ok_or(Errno::INVAL)?;
    let end = u64::try_from(count).ok().and_then(|count| offset.checked_add(count));
    if end.is_some_and(|end| end <= size) { Ok(target) } else { Err(Errno::INVAL) }
}

/// Descriptors of a reply, to send them.
pub(crate) fn borrowed(files: &[Arc<OwnedFd>]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(|file| file.as_fd()).collect()
}
