//! What a server offers: one PCI function.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use crate::memory::{Window, Windows};
use crate::server::{Interrupts, Link};
use crate::spec::{IrqAction, IrqFlags};

/// Regions of a function that exist and may be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// A base address register's.
    Bar(u8),
    /// Configuration space.
    Config,
}

/// A file that a region lies in: the client may map it, and reach the region without a message.
#[derive(Clone, Debug)]
pub struct RegionFile {
    /// The descriptor that is handed out.
    pub file: Arc<OwnedFd>,
    /// Where the region begins in it.
    pub offset: u64,
    /// What of the region may be mapped: all of it, where none is named.
    pub areas: Vec<Area>,
}

/// A piece of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Where in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// What DEVICE_SET_IRQS asks for.
#[derive(Debug)]
pub struct IrqRequest<'a> {
    /// Which kind of interrupt.
    pub index: u32,
    /// What with: one kind of data, one action, if the client keeps to the protocol.
    pub action: IrqAction,
    /// The first of them.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// A byte each.
    pub data: &'a [u8],
    /// A descriptor each; nobody has looked whether they are eventfds.
    pub events: Vec<OwnedFd>,
}

/// A piece of a BAR whose writes may come as events, so that the client's hypervisor need not tell them.
#[derive(Clone, Debug)]
pub struct Doorbell {
    /// Which BAR.
    pub bar: u8,
    /// Where in it.
    pub offset: u64,
    /// Bytes of the write.
    pub size: u64,
    /// Only a write of this value; any if none.
    pub value: Option<u64>,
    /// An eventfd.
    pub event: Arc<OwnedFd>,
}

/// A PCI function behind a [`Server`](crate::Server): a virtio device, or the registers of an IOMMU. An IOMMU that is
/// two functions (AMD's) is two of these, behind two servers, with what they share between them.
///
/// All methods are called on the server's thread, one at a time. While one runs the client waits, and with it perhaps a
/// virtual CPU: long work belongs elsewhere.
pub trait Function: Send {
    /// Bytes of each BAR, 0 for those that do not exist. Constant while a client is there.
    fn bars(&self) -> [u64; 6];

    /// Bytes of configuration space: 256 or 4096. Constant while a client is there.
    fn config_size(&self) -> u64 {
        256
    }

    /// The file of a region that the client may map.
    fn region_file(&self, region: Region) -> Option<RegionFile> {
        let _unused = region;
        None
    }

    /// Its interrupts: the server sets them as the client says, the function raises them.
    fn interrupts(&self) -> &Interrupts;

    /// Flags and number of a kind of interrupts, if there is such a kind. Of a function that passes on somebody else's.
    fn irq_info(&self, index: u32) -> Option<(IrqFlags, u32)> {
        self.interrupts().info(index)
    }

    /// The client sets interrupts up. Of a function that passes on somebody else's.
    ///
    /// # Errors
    /// What the client is told.
    fn set_irqs(&mut self, request: IrqRequest<'_>) -> Result<(), Errno> {
        let IrqRequest { index, action, start, count, data, events } = request;
        self.interrupts().set(index, action, start, count, data, events)
    }

    /// The windows that its client gives: the server fills and clears them.
    fn windows(&self) -> &Windows;

    /// Reads. All of the range is in the region.
    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]);

    /// Writes. All of the range is in the region.
    fn write(&mut self, region: Region, offset: u64, data: &[u8]);

    /// The machine, or a bridge above, is reset.
    fn reset(&mut self);

    /// A client has come. `link` is the way to it, and good for all later clients.
    fn connected(&mut self, link: &Link) {
        let _unused = link;
    }

    /// The client has gone. Its interrupts go after this, then its windows, as if it had unmapped them one by one.
    fn disconnected(&mut self);

    /// A window has come.
    fn mapped(&mut self, window: Window) {
        let _unused = window;
    }

    /// A window is going: who looks for it does not find it any more. The server then waits until nobody holds it. To
    /// return only when nothing will use it that was looked up before, is this method's part.
    fn unmapped(&mut self, window: Window) {
        let _unused = window;
    }

    /// What may come as events instead of writes. Constant.
    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }

    /// Descriptors that the server's thread is to watch: [`Function::event`] is called when one can be read. Constant.
    fn events(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// One of [`Function::events`] can be read, and is to be read.
    fn event(&mut self, index: usize) {
        let _unused = index;
    }
}
