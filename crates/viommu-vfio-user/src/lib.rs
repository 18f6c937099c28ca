//! vfio-user, both ends: PCI functions of this process in somebody else's virtual machine, and devices of other processes
//! that reach what the guest mapped.
//!
//! A virtual machine monitor that speaks [vfio-user] (QEMU since 10.1) takes a PCI function from a socket. This crate is
//! the other end of that socket: it serves any [`Function`], and has one, [`VirtioFunction`], that puts a virtio
//! [`Device`] behind the modern virtio-pci transport. An IOMMU model is served that way, and so are the devices behind
//! it: the monitor stays as it is, and the guest uses its stock drivers.
//!
//! The end that takes devices is [`client`], a feature (on by default).
//!
//! - [`Server`] has the socket, its one client, and the protocol.
//! - [`Windows`] is the guest memory that the client gives: descriptors, mapped here, for as long as the client says.
//! - [`PrivateListener`] is such a socket, for others too.
//! - [`Interrupts`] are raised on eventfds of the client's, [`Link::dma_write`] reaches its memory and its MSI doorbell.
//! - [`pci`] has configuration space, [`spec`] what lies on the socket.
//!
//! # Who may do what
//! A client is not trusted: what it sends is checked, and what is wrong costs its own connection. It is asked for memory
//! that cannot go away (sealed against shrinking, as QEMU's `memory-backend-memfd` is, and not of huge pages, which can
//! run out): other memory would let it kill this process. Descriptors for interrupts must be eventfds. They are the
//! client's all the same: one that makes them blocking again, and full, holds up its own function.
//!
//! A client may take up descriptors of this process: an eventfd for each interrupt, and a file for each piece of memory
//! ([`WindowLimits::files`]). Who serves many sockets raises the limit of descriptors (`RLIMIT_NOFILE`).
//!
//! # Threads
//! [`Server::run`] serves on the thread it is called on; the crate starts none.
//!
//! # Why not the `vfio_user` crate
//! Its server has no DMA_WRITE (which is how a function without MSI-X sends an MSI), no GET_REGION_IO_FDS, and cannot
//! refuse a second client or be stopped. Its client cannot map without write access or without a file, and answers no
//! DMA of the server's. Both are what this crate's tests use as peers.
//!
//! Not done: MSI (only MSI-X and the pin), migration, access to memory without a descriptor by messages.
//!
//! [vfio-user]: https://www.qemu.org/docs/master/interop/vfio-user.html
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(
    not(test),
    warn(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)
)]

#[cfg(feature = "client")]
pub mod client;
mod function;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        reason = "what it plays with is its own; a panic is what it is for"
    )
)]
pub mod fuzzing;
mod log;
pub mod memory;
mod message;
pub mod pci;
mod server;
pub mod spec;
pub mod virtio;

pub use function::{Area, Doorbell, Function, IrqRequest, Region, RegionFile};
pub use memory::{WindowLimits, Windows};
pub use server::{BindError, Interrupts, Link, PrivateListener, Server, Stopper};
pub use virtio::{Device, VirtioFunction};
