//! Histories of IOMMU mappings: what a guest did with its IOMMU, what its devices accessed, and what the virtual
//! machine monitor told its subscribers.
//!
//! [`History`] reads QEMU's `-trace` log, Linux tracepoint text and viommu's own format, plain or compressed, and
//! tells by the content which it is. [`Writer`] writes viommu's own format, [`convert()`] turns any of them into
//! it, [`Recorder`] takes events as they happen; [`Scribe`] has it follow a unit's endpoints.
//!
//! ```
//! use viommu::addr::{Gpa, Iova, IovaRange};
//! use viommu::mapping::{Access, Target};
//! use viommu_trace::{Event, Format, History, Writer, convert};
//!
//! let log = "\
//! 2026-11-22T06:37:23.052687Z virtio_iommu_attach domain=1 endpoint=8
//! 2026-11-22T06:37:23.420868Z virtio_iommu_map domain=1 virt_start=0x1000 virt_end=0x1fff phys_start=0x8000 flags=3
//! ";
//! let mut history = History::from_reader(log.as_bytes(), "a log")?;
//! assert_eq!(history.format(), Format::QemuLog);
//! let mut writer = Writer::new(Vec::new())?;
//! assert_eq!(convert(&mut history, &mut writer)?, 2);
//!
//! let mut history = History::from_reader(std::io::Cursor::new(writer.finish()?), "its copy")?;
//! assert_eq!(history.format(), Format::Viommu);
//! let attach = history.next()?.unwrap();
//! assert_eq!(attach.event, Event::Attach { domain: 1, endpoint: 8, bypass: false });
//! let map = history.next()?.unwrap();
//! assert_eq!(map.line, 2);
//! assert_eq!(map.event, Event::Map {
//!     domain: 1,
//!     range: IovaRange::new(Iova(0x1000), Iova(0x1fff)).unwrap(),
//!     gpa: Gpa(0x8000),
//!     access: Access::RW,
//!     target: Target::Ram,
//! });
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod compression;
mod convert;
mod error;
mod event;
mod format;
#[doc(hidden)]
pub mod fuzzing;
mod history;
mod input;
mod linux;
mod parse;
mod passed_over;
mod qemu;
mod recorder;
mod scribe;

pub use convert::{ConvertError, convert};
pub use error::{Place, ReadError};
pub use event::{Entry, Event, Label, Region, Reserved, Reset};
pub use format::Writer;
pub use history::{Format, History};
pub use input::{MAX_LINE, Progress};
pub use linux::Attribution;
pub use passed_over::PassedOver;
pub use recorder::Recorder;
pub use scribe::Scribe;
