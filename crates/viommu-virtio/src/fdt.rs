//! Which devices are behind which IOMMU, as a device tree tells it; written with [`vm_fdt`].
//!
//! An IOMMU's node has `#iommu-cells = <1>` and a phandle: [`begin_mmio_iommu`] or [`begin_pci_iommu`]. A PCI host
//! bridge names IOMMUs in `iommu-map` ([`IommuMap`]), a platform device names its own in `iommus` ([`write_iommus`]). The
//! bindings are Linux's `virtio/mmio.yaml`, `virtio/pci-iommu.yaml` and `pci/pci-iommu.txt`.
//!
//! After an error the writer holds a part of what was to be written: it is of no more use.
//!
//! ```
//! use viommu_virtio::fdt::{IommuMap, begin_pci_iommu, write_iommus};
//! use viommu_virtio::viot::{PciRange, Transport, Viot, ViotIommu};
//! use vm_fdt::FdtWriter;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let own = "00:01.0".parse()?;
//! let mut iommu = ViotIommu::new(Transport::Pci { segment: 0, bdf: own });
//! iommu.ranges.push(PciRange::buses(0, 0..=255));
//! let topology = Viot { iommus: vec![iommu], ..Viot::default() };
//! let phandle = 1;
//!
//! let mut fdt = FdtWriter::new()?;
//! let root = fdt.begin_node("")?;
//! let bridge = fdt.begin_node("pcie@40000000")?;
//! // The other properties of the host bridge go here too: before its children.
//! IommuMap::of_segment(&topology, 0, &[phandle])?.write(&mut fdt)?;
//! let node = begin_pci_iommu(&mut fdt, own, phandle)?;
//! fdt.end_node(node)?;
//! fdt.end_node(bridge)?;
//! let ethernet = fdt.begin_node("ethernet@50000000")?;
//! write_iommus(&mut fdt, phandle, 0x20000)?;
//! fdt.end_node(ethernet)?;
//! fdt.end_node(root)?;
//! let blob = fdt.finish()?;
//! # Ok(())
//! # }
//! ```

use core::ops::RangeInclusive;

use vm_fdt::{FdtWriter, FdtWriterNode};

use crate::viot::{Bdf, Transport, Viot};

/// Why something cannot be written into a device tree.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FdtError {
    /// The writer refused: no node is open, say, or the phandle is another node's.
    #[error("device tree: {0}")]
    Writer(#[from] vm_fdt::Error),
    /// 0 and 2^32 - 1 are no phandles.
    #[error("device tree: {0:#x} is no phandle")]
    Phandle(u32),
    /// There is no phandle for an IOMMU.
    #[error("device tree: no phandle is given for IOMMU {iommu}")]
    NoPhandle {
        /// The IOMMU's position in [`Viot::iommus`].
        iommu: usize,
    },
    /// A range of functions ends below its start.
    #[error("device tree: functions {start} to {end}: the end is below the start")]
    EmptyRange {
        /// The first function.
        start: Bdf,
        /// The last one.
        end: Bdf,
    },
    /// An endpoint id is above 2^32 - 1.
    #[error("device tree: functions {start} to {end} have endpoint ids above 32 bits")]
    IdOverflow {
        /// The first function.
        start: Bdf,
        /// The last one.
        end: Bdf,
    },
    /// A function is mapped already.
    #[error("device tree: functions {start} to {end}: some are mapped already")]
    Overlap {
        /// The first function.
        start: Bdf,
        /// The last one.
        end: Bdf,
    },
    /// An address or a size has more bits than its cells.
    #[error("device tree: {0:#x} needs two cells")]
    Cells(u64),
}

/// An entry of [`IommuMap`]: the functions `rids` are behind an IOMMU, with consecutive endpoint ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IommuMapEntry {
    rids: RangeInclusive<Bdf>,
    phandle: u32,
    endpoint_start: u32,
}

impl IommuMapEntry {
    /// The functions, inclusive and not empty.
    #[must_use]
    pub fn rids(&self) -> &RangeInclusive<Bdf> {
        &self.rids
    }

    /// The IOMMU's phandle.
    #[must_use]
    pub fn phandle(&self) -> u32 {
        self.phandle
    }

    /// The endpoint id of the first function.
    #[must_use]
    pub fn endpoint_start(&self) -> u32 {
        self.endpoint_start
    }

    /// rid-base, phandle, iommu-base and length.
    fn cells(&self) -> [u32; 4] {
        let (start, end) = (u32::from(self.rids.start().0), u32::from(self.rids.end().0));
        [start, self.phandle, self.endpoint_start, end.saturating_sub(start).saturating_add(1)]
    }
}

/// The property `iommu-map` of a PCI host bridge: which functions below it are behind which IOMMU. A function without an
/// entry does DMA to guest physical memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IommuMap {
    entries: Vec<IommuMapEntry>,
}

impl IommuMap {
    /// A map of no function.
    #[must_use]
    pub const fn new() -> Self {
        Self { entries: Vec::new() }
    }

    /// The map for a host bridge with all of `segment`, with the endpoint ids of [`Viot::endpoint_id`]: IOMMUs that are
    /// functions of the segment are left out. `phandles` are those of [`Viot::iommus`], position by position; one of an
    /// IOMMU that manages nothing in the segment is not looked at.
    ///
    /// # Errors
    ///
    /// [`FdtError::NoPhandle`], and those of [`map`](Self::map).
    pub fn of_segment(topology: &Viot, segment: u16, phandles: &[u32]) -> Result<Self, FdtError> {
        let mut map = Self::new();
        for (iommu, described) in topology.iommus.iter().enumerate() {
            for range in described.ranges.iter().filter(|range| range.segments.contains(&segment)) {
                let phandle = *phandles.get(iommu).ok_or(FdtError::NoPhandle { iommu })?;
                let (start, end) = (*range.bdfs.start(), *range.bdfs.end());
                if start > end {
                    return Err(FdtError::EmptyRange { start, end });
                }
                let first = range.endpoint_id(segment, start).ok_or(FdtError::IdOverflow { start, end })?;
                map.map(start..=end, phandle, first)?;
            }
        }
        for described in &topology.iommus {
            match described.transport {
                Transport::Pci { segment: own, bdf } if own == segment => map.omit(bdf),
                _ => (),
            }
        }
        Ok(map)
    }

    /// Puts the functions `rids`, inclusive, behind the IOMMU with `phandle`: the first has the endpoint id
    /// `endpoint_start`, each further one the next.
    ///
    /// # Errors
    ///
    /// [`FdtError::Phandle`], [`FdtError::EmptyRange`], [`FdtError::IdOverflow`] or [`FdtError::Overlap`]; the map is
    /// unchanged then.
    pub fn map(
        &mut self,
        rids: RangeInclusive<Bdf>,
        phandle: u32,
        endpoint_start: u32,
    ) -> Result<(), FdtError> {
        let (start, end) = (*rids.start(), *rids.end());
        let phandle = checked_phandle(phandle)?;
        let Some(further) = end.0.checked_sub(start.0) else {
            return Err(FdtError::EmptyRange { start, end });
        };
        if endpoint_start.checked_add(u32::from(further)).is_none() {
            return Err(FdtError::IdOverflow { start, end });
        }
        if self.entries.iter().any(|entry| *entry.rids.start() <= end && start <= *entry.rids.end()) {
            return Err(FdtError::Overlap { start, end });
        }
        self.entries.push(IommuMapEntry { rids, phandle, endpoint_start });
        Ok(())
    }

    /// Leaves a function out, and keeps the endpoint ids of the others. What an IOMMU's own function needs: no IOMMU
    /// manages its DMA.
    pub fn omit(&mut self, rid: Bdf) {
        let Some(position) = self.entries.iter().position(|entry| entry.rids.contains(&rid)) else { return };
        let entry = self.entries.remove(position);
        let (start, end) = (*entry.rids.start(), *entry.rids.end());
        // rid is above start in one and below end in the other, so neither leaves 16 bits.
        let below = (rid > start).then(|| {
            let rids = start..=Bdf(rid.0.saturating_sub(1));
            IommuMapEntry { rids, ..entry.clone() }
        });
        let above = (rid < end).then(|| {
            let next = rid.0.saturating_add(1);
            let skipped = u32::from(next.saturating_sub(start.0));
            let endpoint_start = entry.endpoint_start.saturating_add(skipped);
            IommuMapEntry { rids: Bdf(next)..=end, endpoint_start, ..entry.clone() }
        });
        self.entries.splice(position..position, below.into_iter().chain(above));
    }

    /// The entries, as they are written.
    #[must_use]
    pub fn entries(&self) -> &[IommuMapEntry] {
        &self.entries
    }

    /// Writes the property into the host bridge's node: before the node's children. A map of no function is no
    /// property, since Linux refuses an empty one.
    ///
    /// # Errors
    ///
    /// [`FdtError::Writer`].
    pub fn write(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let cells: Vec<u32> = self.entries.iter().flat_map(IommuMapEntry::cells).collect();
        Ok(fdt.property_array_u32("iommu-map", &cells)?)
    }
}

/// Writes the property `iommus` into the open node of a platform device: it is behind the IOMMU with `phandle`, which
/// knows it as `endpoint`.
///
/// # Errors
///
/// [`FdtError::Phandle`] or [`FdtError::Writer`].
pub fn write_iommus(fdt: &mut FdtWriter, phandle: u32, endpoint: u32) -> Result<(), FdtError> {
    Ok(fdt.property_array_u32("iommus", &[checked_phandle(phandle)?, endpoint])?)
}

/// How many cells of 32 bits a number has: what the parent node states in `#address-cells` or `#size-cells`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cells {
    /// 32 bits.
    One,
    /// 64 bits.
    Two,
}

impl Cells {
    fn push(self, value: u64, cells: &mut Vec<u32>) -> Result<(), FdtError> {
        let low = u32::try_from(value & 0xffff_ffff).unwrap_or(u32::MAX);
        let high = u32::try_from(value >> 32).unwrap_or(u32::MAX);
        match self {
            Self::One if high != 0 => return Err(FdtError::Cells(value)),
            Self::One => cells.push(low),
            Self::Two => cells.extend([high, low]),
        }
        Ok(())
    }
}

/// A virtio-mmio device that is a virtio-iommu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioIommu<'a> {
    /// The guest physical address of its registers.
    pub base: u64,
    /// Bytes of its registers with the configuration space.
    pub size: u64,
    /// The parent's `#address-cells`.
    pub address_cells: Cells,
    /// The parent's `#size-cells`.
    pub size_cells: Cells,
    /// The cells of `interrupts`, as the interrupt controller wants them. With none the property is not written, for a
    /// machine with `interrupts-extended`.
    pub interrupts: &'a [u32],
    /// What other nodes name it by: not 0, not 2^32 - 1, and no other node's.
    pub phandle: u32,
}

/// Opens the node of a virtio-iommu on virtio-mmio, `iommu@<base>`, and writes its properties. The caller may add others
/// and must end the node.
///
/// # Errors
///
/// [`FdtError::Phandle`], [`FdtError::Cells`] or [`FdtError::Writer`].
pub fn begin_mmio_iommu(fdt: &mut FdtWriter, iommu: &MmioIommu<'_>) -> Result<FdtWriterNode, FdtError> {
    let mut reg = Vec::with_capacity(4);
    iommu.address_cells.push(iommu.base, &mut reg)?;
    iommu.size_cells.push(iommu.size, &mut reg)?;
    let phandle = checked_phandle(iommu.phandle)?;
    let node = fdt.begin_node(&format!("iommu@{:x}", iommu.base))?;
    fdt.property_string("compatible", "virtio,mmio")?;
    fdt.property_array_u32("reg", &reg)?;
    if !iommu.interrupts.is_empty() {
        fdt.property_array_u32("interrupts", iommu.interrupts)?;
    }
    finish_iommu(fdt, phandle)?;
    Ok(node)
}

/// Opens the node of a virtio-iommu that is the PCI function `bdf`, `iommu@<device>,<function>`, and writes its
/// properties: inside its host bridge's node, behind that node's properties. The caller may add others and must end the
/// node. The tree needs this node though the guest finds the function itself, for the phandle.
///
/// # Errors
///
/// [`FdtError::Phandle`] or [`FdtError::Writer`].
pub fn begin_pci_iommu(fdt: &mut FdtWriter, bdf: Bdf, phandle: u32) -> Result<FdtWriterNode, FdtError> {
    let phandle = checked_phandle(phandle)?;
    let node = fdt.begin_node(&format!("iommu@{:x},{:x}", bdf.device(), bdf.function()))?;
    // The first name is for guests from before the second was in the binding.
    let names = ["virtio,pci-iommu", "pci1af4,1057"].map(str::to_owned);
    fdt.property_string_list("compatible", names.to_vec())?;
    // A configuration space address: no register number, no size.
    fdt.property_array_u32("reg", &[u32::from(bdf.0) << 8, 0, 0, 0, 0])?;
    finish_iommu(fdt, phandle)?;
    Ok(node)
}

fn finish_iommu(fdt: &mut FdtWriter, phandle: u32) -> Result<(), FdtError> {
    fdt.property_u32("#iommu-cells", 1)?;
    Ok(fdt.property_phandle(phandle)?)
}

fn checked_phandle(phandle: u32) -> Result<u32, FdtError> {
    match phandle {
        0 | u32::MAX => Err(FdtError::Phandle(phandle)),
        _ => Ok(phandle),
    }
}

#[cfg(test)]
#[path = "fdt_tests.rs"]
mod tests;
