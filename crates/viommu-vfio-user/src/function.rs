//! What a server offers: one PCI function.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::memory::{Window, Windows};
use crate::server::{Interrupts, Link};

/// Regions of a function that exist and may be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// A base address register's.
    Bar(u8),
    /// Configuration space.
    Config,
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
    /// Bytes of each BAR, 0 for those that do not exist. Constant.
    fn bars(&self) -> [u64; 6];

    /// Bytes of configuration space: 256 or 4096. Constant.
    fn config_size(&self) -> u64 {
        256
    }

    /// Its interrupts: the server sets them as the client says, the function raises them.
    fn interrupts(&self) -> &Interrupts;

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
