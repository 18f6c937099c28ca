//! What is wrong with a topology or with a table.

use core::fmt;

/// A part of a [`Viot`](super::Viot), by its positions in the vectors, the first is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// An IOMMU.
    Iommu(usize),
    /// A PCI range of an IOMMU.
    Range {
        /// The IOMMU's position.
        iommu: usize,
        /// The range's position among the IOMMU's ranges.
        index: usize,
    },
    /// An MMIO endpoint of an IOMMU.
    MmioEndpoint {
        /// The IOMMU's position.
        iommu: usize,
        /// The endpoint's position among the IOMMU's MMIO endpoints.
        index: usize,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iommu(iommu) => write!(f, "IOMMU {iommu}"),
            Self::Range { iommu, index } => write!(f, "PCI range {index} of IOMMU {iommu}"),
            Self::MmioEndpoint { iommu, index } => write!(f, "MMIO endpoint {index} of IOMMU {iommu}"),
        }
    }
}

/// A topology that a guest cannot read in one way only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// A range's segments or functions end below their start.
    #[error("{at} ends below its start")]
    EmptyRange {
        /// The range.
        at: Place,
    },
    /// An endpoint id of a range is above 2^32 - 1.
    #[error("{at} has endpoint ids above 32 bits")]
    IdOverflow {
        /// The range.
        at: Place,
    },
    /// Two IOMMUs are one PCI function, or have one base address.
    #[error("{at} is the same device as {other}")]
    SameIommu {
        /// The later one.
        at: Place,
        /// The earlier one.
        other: Place,
    },
    /// An IOMMU's function is in a range of another IOMMU: the DMA of an IOMMU is managed by none.
    #[error("{at} is behind another IOMMU: it is in {other}")]
    IommuBehindIommu {
        /// The IOMMU.
        at: Place,
        /// The other one's range.
        other: Place,
    },
    /// A PCI function is in two ranges, or two MMIO endpoints have one base address. Of one IOMMU or of two.
    #[error("{at} and {other} describe the same device")]
    SameDevice {
        /// The later one.
        at: Place,
        /// The earlier one.
        other: Place,
    },
    /// An IOMMU would know two devices by one endpoint id.
    #[error("{at} and {other} share an endpoint id")]
    SameId {
        /// The later one.
        at: Place,
        /// The earlier one.
        other: Place,
    },
}

impl TopologyError {
    /// What is refused; if there are two, the later one.
    #[must_use]
    pub fn at(&self) -> Place {
        match *self {
            Self::EmptyRange { at }
            | Self::IdOverflow { at }
            | Self::SameIommu { at, .. }
            | Self::IommuBehindIommu { at, .. }
            | Self::SameDevice { at, .. }
            | Self::SameId { at, .. } => at,
        }
    }
}

/// Why there is no table, or nothing to be read from one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ViotError {
    /// The table would have more than 65535 bytes: offsets in it have 16 bits.
    #[error("a VIOT of {bytes} bytes: more than 65535")]
    TooLong {
        /// The bytes it would need.
        bytes: usize,
    },
    /// The topology is no good.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// Bytes that are no table, or not one to rely on.
    #[error("VIOT, at offset {offset:#x}: {reason}")]
    Malformed {
        /// The node or the header's field, in bytes from the table's start.
        offset: usize,
        /// What is wrong there.
        reason: Malformed,
    },
}

/// What is wrong with a table's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The bytes end inside the header.
    #[error("the bytes end inside the header")]
    Cut,
    /// It is another table.
    #[error("the signature is not VIOT")]
    Signature,
    /// The table's length is below the header's, above 65535, or there are not as many bytes.
    #[error("the table's length of {0} is not possible")]
    Length(u32),
    /// The table's bytes do not add up to 0.
    #[error("the checksum is wrong")]
    Checksum,
    /// The first node is inside the header.
    #[error("the first node is at {0:#x}, inside the header")]
    NodeOffset(u16),
    /// A node reaches past the table's end.
    #[error("a node reaches past the table's end")]
    NodeCut,
    /// A node is shorter than one of its type.
    #[error("a node of type {kind} has a length of {length}")]
    NodeLength {
        /// The type's number.
        kind: u8,
        /// The length that the node states.
        length: u16,
    },
    /// A PCI range or an MMIO endpoint names an IOMMU where no IOMMU's node starts.
    #[error("no IOMMU's node starts at its output node, {0:#x}")]
    OutputNode(u16),
    /// The node is well formed but the topology is no good.
    #[error(transparent)]
    Topology(#[from] TopologyError),
}
