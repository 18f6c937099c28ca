//! What is measured: each piece of work runs in a process of its own, on a fresh heap.

pub(crate) mod alone;
pub(crate) mod consumers;
pub(crate) mod contended;
pub(crate) mod dense;
pub(crate) mod dispatch;
pub(crate) mod memory;
pub(crate) mod ring;
pub(crate) mod vhost;
pub(crate) mod vtd;

use std::collections::BTreeMap;

use clap::ValueEnum;

use crate::load::Effort;
use crate::ours::Ours;
use crate::peers::{Crosvm, Qemu, Radix, Ranges, VmMemory};

/// Rounds of each figure, by its name.
pub(crate) type Figures = BTreeMap<String, Vec<f64>>;

/// A piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Work {
    /// Adjacent pages, as many as is called 64k.
    Small,
    /// Adjacent pages, as many as is called 1M.
    Big,
    /// Mappings of 1 GiB.
    Huge,
    /// A reader beside a churner.
    Contended,
    /// Many readers beside a churner.
    Busy,
    /// Memory: a page in each 256 KiB.
    Every256k,
    /// Memory: a page in each 2 MiB.
    Every2m,
    /// Memory: a page in each 128 MiB.
    Every128m,
    /// Memory: a page in each 1 GiB.
    Every1g,
    /// Memory: 8 pages mapped and 7 unmapped in each 2 MiB.
    OneOfEight,
    /// An event to many consumers.
    Dispatch,
    /// Pairs beside idle readers.
    IdleReaders,
    /// A guard, taken and given back.
    Guard,
    /// Pairs at fresh random addresses.
    Fresh,
    /// Domains with nothing in them.
    Empty,
    /// Maps of memory that has not been touched.
    Cold,
    /// An endpoint with a mirror comes to a full domain.
    Attach,
    /// A consumer of an empty address space of 2^64 bytes.
    EmptyReplay,
    /// Requests through virtio-iommu's ring.
    Ring,
    /// The type1 mirror over a kernel that does nothing.
    Type1,
    /// The iommufd binding over a kernel that does nothing.
    Iommufd,
    /// The vhost-vDPA mirror over a device that does nothing.
    Vdpa,
    /// Invalidations and translations of a VT-d unit.
    Vtd,
    /// The vhost cache over a device that does nothing.
    Vhost,
}

impl Work {
    /// Whether it takes some seconds at most and is about time of one thread.
    pub(crate) fn is_short(self) -> bool {
        use Work::{
            Attach, Big, Dispatch, EmptyReplay, Guard, Huge, IdleReaders, Iommufd, Ring, Small, Type1, Vdpa,
            Vhost,
        };
        matches!(
            self,
            Small
                | Big
                | Huge
                | Dispatch
                | IdleReaders
                | Guard
                | Attach
                | EmptyReplay
                | Ring
                | Type1
                | Iommufd
                | Vdpa
                | Vhost
        )
    }
}

/// Whose work it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Who {
    Viommu,
    VmMemory,
    Rangemap,
    Crosvm,
    Qemu,
    Radix,
    /// QEMU's list of notifiers.
    List,
}

impl Who {
    /// Its name in tables and in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Viommu => "viommu",
            Self::VmMemory => "vm-memory",
            Self::Rangemap => "rangemap",
            Self::Crosvm => "crosvm",
            Self::Qemu => "qemu",
            Self::Radix => "radix",
            Self::List => "list",
        }
    }
}

/// Does one piece of work in this process. `wanted`: names of figures, all if there are none.
///
/// # Errors
/// It cannot be done here.
pub(crate) fn run(work: Work, who: Who, effort: Effort, wanted: &[String]) -> anyhow::Result<Figures> {
    macro_rules! with_each {
        ($run:path $(, $argument:expr)*) => {
            match who {
                Who::Viommu => $run(Ours::new $(, $argument)*),
                Who::VmMemory => $run(<VmMemory as crate::table::Table>::new $(, $argument)*),
                Who::Rangemap => $run(<Ranges as crate::table::Table>::new $(, $argument)*),
                Who::Crosvm => $run(<Crosvm as crate::table::Table>::new $(, $argument)*),
                Who::Qemu => $run(<Qemu as crate::table::Table>::new $(, $argument)*),
                Who::Radix => $run(<Radix as crate::table::Table>::new $(, $argument)*),
                Who::List => anyhow::bail!("a list of notifiers is no table"),
            }
        };
    }
    let wants = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    match (work, who) {
        (Work::Small, _) => with_each!(dense::run, effort, effort.small(), &wants),
        (Work::Big, _) => with_each!(dense::run, effort, effort.big(), &wants),
        (Work::Huge, _) => with_each!(dense::huge, effort),
        (Work::Every256k, _) => with_each!(memory::sparse, effort, 256 << 10),
        (Work::Every2m, _) => with_each!(memory::sparse, effort, 2 << 20),
        (Work::Every128m, _) => with_each!(memory::sparse, effort, 128 << 20),
        (Work::Every1g, _) => with_each!(memory::sparse, effort, 1 << 30),
        (Work::OneOfEight, _) => with_each!(memory::one_of_eight, effort),
        (Work::Contended, Who::Viommu) => contended::ours(effort),
        (Work::Contended, Who::VmMemory) => contended::locked::<VmMemory>(effort),
        (Work::Contended, Who::Crosvm) => contended::locked::<Crosvm>(effort),
        (Work::Contended, Who::Qemu) => contended::locked::<Qemu>(effort),
        (Work::Busy, Who::Viommu) => contended::busy(effort),
        (Work::Dispatch, Who::Viommu) => dispatch::ours(effort),
        (Work::Dispatch, Who::List) => Ok(dispatch::list(effort)),
        (Work::IdleReaders, Who::Viommu) => alone::idle_readers(effort),
        (Work::Guard, Who::Viommu) => alone::guard(effort),
        (Work::Fresh, Who::Viommu) => memory::fresh(effort),
        (Work::Empty, Who::Viommu) => memory::empty_domains(effort),
        (Work::Cold, Who::Viommu) => memory::cold(effort),
        (Work::Attach, Who::Viommu) => alone::attach(effort),
        (Work::EmptyReplay, Who::Viommu) => alone::empty_replay(effort),
        (Work::Ring, Who::Viommu) => ring::ours(effort),
        (Work::Vtd, Who::Viommu) => vtd::ours(effort),
        (Work::Type1, Who::Viommu) => consumers::type1(effort),
        (Work::Iommufd, Who::Viommu) => consumers::iommufd(effort),
        (Work::Vdpa, Who::Viommu) => consumers::vdpa(effort),
        (Work::Vhost, Who::Viommu) => vhost::ours(effort),
        _ => anyhow::bail!("{} does not do that", who.name()),
    }
}
