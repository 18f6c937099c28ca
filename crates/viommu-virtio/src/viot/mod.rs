//! Which devices are behind which IOMMU, as the ACPI table VIOT ("Virtual I/O Translation Table", ACPI 6.5) tells it.
//!
//! A [`Viot`] is a value that an embedder fills in; [`Viot::to_bytes`] gives the table for its XSDT, and
//! [`Viot::endpoint_id`] the number under which the driver knows a function, to be used by the device and by who does DMA.
//! On guests with a device tree the same value gives the property `iommu-map`.
//!
//! The writer of the crate `acpi_tables` states revision 1 and a creator of its own, so the table is written here.
//!
//! ```
//! use viommu_virtio::viot::{PciRange, Transport, Viot, ViotIommu};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut iommu = ViotIommu::new(Transport::Pci { segment: 0, bdf: "00:01.0".parse()? });
//! iommu.ranges.push(PciRange::buses(0, 0..=0));
//! let viot = Viot { iommus: vec![iommu], ..Viot::default() };
//! assert_eq!(viot.endpoint_id(0, "00:03.0".parse()?), Some((0, 0x18)));
//! assert_eq!(viot.to_bytes()?.len(), 88);
//! # Ok(())
//! # }
//! ```

use core::ops::RangeInclusive;

mod bdf;
mod check;
mod error;
mod layout;
mod table;
#[cfg(test)]
mod tests;

pub use bdf::{Bdf, ParseBdfError};
pub use error::{Malformed, Place, TopologyError, ViotError};

/// The table: its names, and the IOMMUs with what is behind them. The default describes none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Viot {
    /// Who made the machine.
    pub oem_id: [u8; 6],
    /// The maker's name of the table.
    pub oem_table_id: [u8; 8],
    /// The maker's revision of the table.
    pub oem_revision: u32,
    /// Which program wrote the table.
    pub creator_id: [u8; 4],
    /// The program's revision.
    pub creator_revision: u32,
    /// The IOMMUs. Their positions here are what [`Viot::endpoint_id`] answers with.
    pub iommus: Vec<ViotIommu>,
}

impl Default for Viot {
    fn default() -> Self {
        Self {
            oem_id: *b"VIOMMU",
            oem_table_id: *b"VIOMVIOT",
            oem_revision: 1,
            creator_id: *b"VIOM",
            creator_revision: 1,
            iommus: Vec::new(),
        }
    }
}

impl Viot {
    /// The IOMMU that manages a PCI function, and the function's endpoint id there.
    ///
    /// `None` for a function in no range: its DMA is to guest physical memory. And for the IOMMU's own function, which
    /// a guest leaves untranslated though it is in a range. For a topology that [`check`](Self::check) refuses the
    /// first range with the function counts.
    #[must_use]
    pub fn endpoint_id(&self, segment: u16, bdf: Bdf) -> Option<(usize, u32)> {
        self.iommus.iter().enumerate().find_map(|(position, iommu)| {
            let id = iommu.ranges.iter().find_map(|range| range.endpoint_id(segment, bdf))?;
            (iommu.transport != Transport::Pci { segment, bdf }).then_some((position, id))
        })
    }

    /// The IOMMU that manages the platform device whose registers start at `base`, and the device's endpoint id there.
    #[must_use]
    pub fn mmio_endpoint_id(&self, base: u64) -> Option<(usize, u32)> {
        self.iommus.iter().enumerate().find_map(|(position, iommu)| {
            let endpoint = iommu.mmio_endpoints.iter().find(|endpoint| endpoint.base == base)?;
            Some((position, endpoint.id))
        })
    }
}

/// A virtio-iommu and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViotIommu {
    /// Where the guest finds the device.
    pub transport: Transport,
    /// The PCI functions behind it. A function that is to be hot-plugged must be in a range at boot: take whole buses.
    pub ranges: Vec<PciRange>,
    /// The platform devices behind it.
    pub mmio_endpoints: Vec<MmioEndpoint>,
}

impl ViotIommu {
    /// A virtio-iommu with nothing behind it.
    #[must_use]
    pub const fn new(transport: Transport) -> Self {
        Self { transport, ranges: Vec::new(), mmio_endpoints: Vec::new() }
    }
}

/// Where the guest finds a virtio-iommu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A PCI function, which must be there when the guest boots.
    Pci {
        /// Its PCI segment.
        segment: u16,
        /// The function.
        bdf: Bdf,
    },
    /// A virtio-mmio device, which needs an object in the ACPI namespace too: `LNRO0005` with this address in `_CRS`.
    Mmio {
        /// The guest physical address of its registers.
        base: u64,
    },
}

/// PCI functions behind an IOMMU: in each of `segments` those of `bdfs`. Both are inclusive and not empty.
///
/// The endpoint id of function `bdf` in `segment` is `endpoint_start`, plus 2^16 for each segment and 1 for each
/// function from the range's start to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciRange {
    /// The endpoint id of the first function of the first segment.
    pub endpoint_start: u32,
    /// The PCI segments.
    pub segments: RangeInclusive<u16>,
    /// The functions of each segment.
    pub bdfs: RangeInclusive<Bdf>,
}

impl PciRange {
    /// A range in which a function's endpoint id is its segment in the upper 16 bits and its [`Bdf`] in the lower ones:
    /// no two functions of a machine have one id then, and nobody needs a table to tell it.
    #[must_use]
    pub fn identity(segments: RangeInclusive<u16>, bdfs: RangeInclusive<Bdf>) -> Self {
        let endpoint_start = u32::from(*segments.start()) << 16 | u32::from(bdfs.start().0);
        Self { endpoint_start, segments, bdfs }
    }

    /// Whole buses of one segment, with the ids of [`identity`](Self::identity).
    #[must_use]
    pub fn buses(segment: u16, buses: RangeInclusive<u8>) -> Self {
        let first = u16::from_be_bytes([*buses.start(), 0]);
        let last = u16::from_be_bytes([*buses.end(), 0xff]);
        Self::identity(segment..=segment, Bdf(first)..=Bdf(last))
    }

    /// Whether a function is in it.
    #[must_use]
    pub fn contains(&self, segment: u16, bdf: Bdf) -> bool {
        self.segments.contains(&segment) && self.bdfs.contains(&bdf)
    }

    /// The endpoint id of a function; `None` if it is not in the range, or the id is above 32 bits.
    #[must_use]
    pub fn endpoint_id(&self, segment: u16, bdf: Bdf) -> Option<u32> {
        if !self.contains(segment, bdf) {
            return None;
        }
        let segments = u32::from(segment.checked_sub(*self.segments.start())?);
        let functions = u32::from(bdf.0.checked_sub(self.bdfs.start().0)?);
        self.endpoint_start.checked_add(segments << 16 | functions)
    }

    fn overlaps(&self, other: &Self) -> bool {
        fn common<T: Ord>(a: &RangeInclusive<T>, b: &RangeInclusive<T>) -> bool {
            a.start().max(b.start()) <= a.end().min(b.end())
        }
        common(&self.segments, &other.segments) && common(&self.bdfs, &other.bdfs)
    }
}

/// A platform device behind an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmioEndpoint {
    /// The device's endpoint id.
    pub id: u32,
    /// The guest physical address of the device's registers: the start of its first memory resource.
    pub base: u64,
}
