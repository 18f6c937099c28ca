//! A virtual IOMMU for virtual machine monitors.
//!
//! A guest programs which memory each of its devices may reach. This crate keeps the one true record of that, translates
//! device addresses with it, and tells everyone who holds a copy (VFIO, iommufd, vhost, vhost-user, vDPA, vfio-user,
//! devices in the same process) exactly what changed. The record knows what was there before, so what an event means is
//! derived here, once, and cannot be told wrongly.
//!
//! # Example
//! ```
//! use viommu::subscribe::{FenceFailed, Interest, Mirror, Reach, Refused, Unmapped};
//! use viommu::{Access, Ack, EndpointConfig, Gpa, Iommu, Iova, IovaRange, Mapping, Tables};
//!
//! /// Somebody with a full copy. A real one calls the host in each of these.
//! #[derive(Default)]
//! struct Copy(Vec<Mapping>);
//!
//! impl Mirror for Copy {
//!     fn reach(&self) -> Reach {
//!         Reach::default() // no limits
//!     }
//!     fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
//!         self.0.push(*extent);
//!         Ok(Ack::Done)
//!     }
//!     fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
//!         let gone = self.0.extract_if(.., |m| range.covers(m.range));
//!         Ok(Unmapped::done(gone.map(|m| m.range.bytes()).sum()))
//!     }
//!     fn fence(&mut self) -> Result<(), FenceFailed> {
//!         Ok(()) // the device is off the bus
//!     }
//!     fn held(&self) -> Vec<Mapping> {
//!         self.0.clone()
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The embedder: a unit over 1 GiB of guest memory, a device behind it, and who holds a copy for that device.
//! let iommu = Iommu::builder().ram(0, 1 << 30).build()?;
//! let endpoint = iommu.add_endpoint(8, EndpointConfig::default())?;
//! let mirror = endpoint.subscribe_mirror(Box::<Copy>::default(), Interest::MIRROR)?;
//!
//! // The model: what the guest asks for. It answers the guest when the completion has resolved.
//! let domain = iommu.create_domain(1, Tables::Owned)?;
//! endpoint.attach(1)?.wait()?;
//! let mapping = Mapping::new(Iova(0x1000), 0x2000, Gpa(0x8000), Access::RW).ok_or("no such range")?;
//! domain.map(mapping)?.wait()?;
//! assert_eq!(mirror.counts().held, 1);
//!
//! // The device, on a thread of its own: a guard for a batch of accesses.
//! let mut reader = endpoint.reader("queue 0").ok_or("unplugged")?;
//! let guard = reader.enter();
//! assert_eq!(guard.translate(Iova(0x2010), Access::READ)?.gpa, Gpa(0x9010));
//!
//! // The guest takes the page back. The device may be in the middle of using it.
//! let mut done = domain.unmap(mapping.range)?;
//! assert!(guard.translate(Iova(0x2010), Access::READ).is_err());
//! assert!(!done.is_complete());
//! drop(guard);
//! done.wait()?;
//! assert!(mirror.audit().ok_or("it tells")?.is_clean());
//! # Ok(())
//! # }
//! ```
//!
//! # Who calls what
//! - The *embedder* (a VMM) builds the [`Iommu`], says what lies at guest physical addresses ([`Builder::ram`],
//!   [`Iommu::add_backing`]), adds [`Endpoint`]s, subscribes those who hold copies, and hears of [`Incident`]s.
//! - A *model* (virtio-iommu, VT-d, AMD-Vi, SMMUv3, sPAPR) says what the guest did: steps on a [`Domain`], and which
//!   endpoint sees which ([`Endpoint::attach`], [`Iommu::set_views`]). Each gives a typed refusal, to be made the guest's
//!   status, or a [`Completion`], after which the guest may be answered.
//! - A *device* in this process translates under guards of its [`Reader`]; longer uses are a [`Lease`].
//! - A *subscriber* is called: a [`Mirror`](subscribe::Mirror) with a full copy, a [`Cache`](subscribe::Cache) with the
//!   entries it asked for ([`Subscription::fill`]), an [`Observer`](subscribe::Observer) that looks on. [`subscribe`] has
//!   the rules: callbacks run inside a step, must return soon, and may not make steps.
//!
//! The crate starts no thread, asks nothing of the operating system but memory, time and to wait, and needs no async
//! runtime. Steps
//! run on the thread that makes them, with all callbacks; a [`Completion`] makes progress when somebody polls it, waits on
//! it or awaits it (it is a [`Future`]). Whoever must not block (a model's queue) polls, with a waker.
//!
//! # Features
//! - `tracing` (on by default): events when a subscriber or an endpoint was cut off, or a completion was dropped too early.
//! - `serde`: [`Saved`] and what it is made of can be serialised.
//!
//! # Where to go on
//! [`Domain`] for steps, [`Endpoint`] for views, [`subscribe`] for copies, [`Guard`] for devices, [`Completion`] for when
//! something is over, [`state`] for save and restore. The repository's `docs/design.md` says how it works, with its
//! promises and its lock order; `docs/coming-from-qemu.md` maps the names of QEMU's IOMMU notifiers to those here.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[cfg(feature = "fuzzing")]
extern crate self as viommu;

#[cfg(not(loom))]
pub mod ack;
pub mod addr;
#[cfg(not(loom))]
mod audit;
#[cfg(not(loom))]
pub mod backing;
#[cfg(not(loom))]
pub mod change;
#[cfg(not(loom))]
mod deliver;
#[cfg(not(loom))]
pub mod domain;
#[cfg(not(loom))]
pub mod endpoint;
#[cfg(not(loom))]
pub mod error;
#[cfg(all(feature = "fuzzing", not(loom)))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(not(loom))]
mod iommu;
#[cfg(not(loom))]
pub mod mapping;
mod quiesce;
pub mod rate;
#[cfg(not(loom))]
pub mod reader;
#[cfg(not(loom))]
pub mod state;
#[cfg(not(loom))]
pub mod subscribe;
mod sync;
#[cfg(not(loom))]
mod table;
#[cfg(all(feature = "tracing", not(loom)))]
mod traced;

#[cfg(all(test, shuttle))]
mod shuttle_tests;

pub use addr::{Gpa, GpaRange, Iova, IovaRange};

#[cfg(not(loom))]
pub use ack::Ack;
#[cfg(not(loom))]
pub use audit::Audit;
#[cfg(not(loom))]
pub use backing::{Extent, Medium};
#[cfg(not(loom))]
pub use change::Change;
#[cfg(not(loom))]
pub use deliver::Counts;
#[cfg(not(loom))]
pub use domain::{Domain, Tables};
#[cfg(not(loom))]
pub use endpoint::{EndpointId, View};
#[cfg(not(loom))]
pub use error::{AttachError, AttachErrorKind, Cap, Incident, StepError, StepErrorKind, SubscribeError};
#[cfg(not(loom))]
pub use iommu::{
    BindingHandle, BuildError, Builder, DEFAULT_TABLE_BYTES, Endpoint, EndpointConfig, FillError, Iommu,
    Reset, ResetKind, Subscription,
};
#[cfg(not(loom))]
pub use mapping::{Access, Mapping, Target};
#[cfg(not(loom))]
pub use quiesce::completion::{Blocker, BlockerKind, Completion, WaitError};
#[cfg(not(loom))]
pub use reader::{Fault, FaultReason, Guard, Lease, OwnedGuard, Place, Reader, Translation, Translator};
#[cfg(not(loom))]
pub use state::{RestoreError, SaveError, Saved};
#[cfg(not(loom))]
pub use subscribe::{Interest, Kinds, Space};

/// The example of the README runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
mod readme {}

/// The examples of the page for those who come from QEMU run as tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/coming-from-qemu.md")]
mod coming_from_qemu {}
