//! The bytes of the table ("Virtual I/O Translation Table", ACPI 6.5). All integers are little-endian.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const SIGNATURE: [u8; 4] = *b"VIOT";
pub(super) const REVISION: u8 = 0;

pub(super) const PCI_RANGE: u8 = 1;
pub(super) const MMIO_ENDPOINT: u8 = 2;
pub(super) const PCI_IOMMU: u8 = 3;
pub(super) const MMIO_IOMMU: u8 = 4;

/// Begins the table.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub(super) signature: [u8; 4],
    /// Bytes of the whole table.
    pub(super) length: U32,
    pub(super) revision: u8,
    /// Makes the sum of all bytes 0.
    pub(super) checksum: u8,
    pub(super) oem_id: [u8; 6],
    pub(super) oem_table_id: [u8; 8],
    pub(super) oem_revision: U32,
    pub(super) creator_id: [u8; 4],
    pub(super) creator_revision: U32,
    pub(super) node_count: U16,
    /// Where the first node is.
    pub(super) node_offset: U16,
    pub(super) reserved: [u8; 8],
}

/// Begins every node.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct NodeHead {
    pub(super) kind: u8,
    pub(super) reserved: u8,
    /// Bytes of the whole node; the next one is there.
    pub(super) length: U16,
}

/// What follows the head of a [`PCI_RANGE`].
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RangeBody {
    pub(super) endpoint_start: U32,
    pub(super) segment_start: U16,
    pub(super) segment_end: U16,
    pub(super) bdf_start: U16,
    pub(super) bdf_end: U16,
    /// Where the IOMMU's node is.
    pub(super) output_node: U16,
    pub(super) reserved: [u8; 6],
}

/// What follows the head of an [`MMIO_ENDPOINT`].
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct MmioEndpointBody {
    pub(super) endpoint: U32,
    pub(super) base: U64,
    /// Where the IOMMU's node is.
    pub(super) output_node: U16,
    pub(super) reserved: [u8; 6],
}

/// What follows the head of a [`PCI_IOMMU`].
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct PciIommuBody {
    pub(super) segment: U16,
    pub(super) bdf: U16,
    pub(super) reserved: [u8; 8],
}

/// What follows the head of an [`MMIO_IOMMU`].
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct MmioIommuBody {
    pub(super) reserved: [u8; 4],
    pub(super) base: U64,
}

const _: () = assert!(size_of::<Header>() == 48 && size_of::<NodeHead>() == 4);
const _: () = assert!(size_of::<RangeBody>() == 20 && size_of::<MmioEndpointBody>() == 20);
const _: () = assert!(size_of::<PciIommuBody>() == 12 && size_of::<MmioIommuBody>() == 12);
