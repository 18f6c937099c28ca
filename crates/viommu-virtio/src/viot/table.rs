//! From a topology to the table's bytes, and back.

use std::collections::HashMap;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::{
    Header, MMIO_ENDPOINT, MMIO_IOMMU, MmioEndpointBody, MmioIommuBody, NodeHead, PCI_IOMMU, PCI_RANGE,
    PciIommuBody, REVISION, RangeBody, SIGNATURE,
};
use super::{Bdf, Malformed, MmioEndpoint, PciRange, Place, Transport, Viot, ViotError, ViotIommu};

const HEADER: usize = size_of::<Header>();
const NODE_HEAD: usize = size_of::<NodeHead>();
const IOMMU_NODE: usize = NODE_HEAD + size_of::<PciIommuBody>();
const ENDPOINT_NODE: usize = NODE_HEAD + size_of::<RangeBody>();

impl Viot {
    /// The table, with its checksum: first the IOMMUs' nodes, then, IOMMU by IOMMU, PCI ranges and MMIO endpoints.
    ///
    /// # Errors
    ///
    /// [`ViotError::TooLong`] or [`ViotError::Topology`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, ViotError> {
        let endpoints: usize =
            self.iommus.iter().map(|iommu| iommu.ranges.len() + iommu.mmio_endpoints.len()).sum();
        let bytes = HEADER
            .saturating_add(self.iommus.len().saturating_mul(IOMMU_NODE))
            .saturating_add(endpoints.saturating_mul(ENDPOINT_NODE));
        let length = u16::try_from(bytes).map_err(|_| ViotError::TooLong { bytes })?;
        self.check()?;

        let mut table = Vec::with_capacity(bytes);
        table.extend([0; HEADER]);
        let mut nodes = Nodes { table, count: 0 };
        let offsets: Vec<u16> = self.iommus.iter().map(|iommu| nodes.iommu(iommu.transport)).collect();
        for (iommu, output_node) in self.iommus.iter().zip(offsets) {
            iommu.ranges.iter().for_each(|range| nodes.range(range, output_node));
            iommu.mmio_endpoints.iter().for_each(|endpoint| nodes.mmio_endpoint(*endpoint, output_node));
        }
        let Nodes { mut table, count } = nodes;
        debug_assert_eq!(table.len(), bytes);

        let header = |checksum| Header {
            signature: SIGNATURE,
            length: u32::from(length).into(),
            revision: REVISION,
            checksum,
            oem_id: self.oem_id,
            oem_table_id: self.oem_table_id,
            oem_revision: self.oem_revision.into(),
            creator_id: self.creator_id,
            creator_revision: self.creator_revision.into(),
            node_count: count.into(),
            node_offset: narrow(HEADER).into(),
            reserved: [0; 8],
        };
        let checksum = sum(header(0).as_bytes()).wrapping_add(sum(&table)).wrapping_neg();
        table.splice(..HEADER, header(checksum).as_bytes().iter().copied());
        Ok(table)
    }

    /// Reads a table. Bytes behind its length are not looked at, nor is what a guest passes over: the revision,
    /// reserved fields, nodes of an unknown type, what is behind a node's known part or the counted nodes.
    ///
    /// More is asked for than what Linux asks for: the checksum, that every output node is one, and that the topology
    /// can be read in one way only.
    ///
    /// # Errors
    ///
    /// [`ViotError::Malformed`] for the first that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ViotError> {
        let (header, table) = checked_header(bytes)?;
        let mut viot = Self {
            oem_id: header.oem_id,
            oem_table_id: header.oem_table_id,
            oem_revision: header.oem_revision.get(),
            creator_id: header.creator_id,
            creator_revision: header.creator_revision.get(),
            iommus: Vec::new(),
        };

        let mut offset = usize::from(header.node_offset.get());
        let mut iommu_at = HashMap::new();
        let mut offset_of = HashMap::new();
        let mut endpoints = Vec::new();
        for _ in 0..header.node_count.get() {
            let (kind, node) = node_at(table, offset)?;
            let transport = match kind {
                PCI_RANGE => {
                    endpoints.push((offset, Endpoint::Range(body(kind, node, offset)?)));
                    None
                }
                MMIO_ENDPOINT => {
                    endpoints.push((offset, Endpoint::Mmio(body(kind, node, offset)?)));
                    None
                }
                PCI_IOMMU => {
                    let node: PciIommuBody = body(kind, node, offset)?;
                    Some(Transport::Pci { segment: node.segment.get(), bdf: Bdf(node.bdf.get()) })
                }
                MMIO_IOMMU => {
                    let node: MmioIommuBody = body(kind, node, offset)?;
                    Some(Transport::Mmio { base: node.base.get() })
                }
                _ => None,
            };
            if let Some(transport) = transport {
                let iommu = viot.iommus.len();
                iommu_at.insert(offset, iommu);
                offset_of.insert(Place::Iommu(iommu), offset);
                viot.iommus.push(ViotIommu::new(transport));
            }
            offset += node.len();
        }

        for (offset, endpoint) in endpoints {
            let output = endpoint.output_node();
            let iommu = iommu_at.get(&usize::from(output)).copied();
            let described = iommu.and_then(|iommu| Some((iommu, viot.iommus.get_mut(iommu)?)));
            let (iommu, described) =
                described.ok_or(ViotError::Malformed { offset, reason: Malformed::OutputNode(output) })?;
            offset_of.insert(endpoint.add_to(iommu, described), offset);
        }
        viot.check().map_err(|error| ViotError::Malformed {
            offset: offset_of.get(&error.at()).copied().unwrap_or(HEADER),
            reason: Malformed::Topology(error),
        })?;
        Ok(viot)
    }
}

struct Nodes {
    table: Vec<u8>,
    count: u16,
}

impl Nodes {
    fn push(&mut self, kind: u8, body: &(impl IntoBytes + Immutable)) -> u16 {
        let offset = narrow(self.table.len());
        let length = narrow(NODE_HEAD + size_of_val(body));
        self.table.extend_from_slice(NodeHead { kind, reserved: 0, length: length.into() }.as_bytes());
        self.table.extend_from_slice(body.as_bytes());
        self.count += 1;
        offset
    }

    fn iommu(&mut self, transport: Transport) -> u16 {
        match transport {
            Transport::Pci { segment, bdf } => {
                let body = PciIommuBody { segment: segment.into(), bdf: bdf.0.into(), reserved: [0; 8] };
                self.push(PCI_IOMMU, &body)
            }
            Transport::Mmio { base } => {
                self.push(MMIO_IOMMU, &MmioIommuBody { reserved: [0; 4], base: base.into() })
            }
        }
    }

    fn range(&mut self, range: &PciRange, output_node: u16) {
        let body = RangeBody {
            endpoint_start: range.endpoint_start.into(),
            segment_start: (*range.segments.start()).into(),
            segment_end: (*range.segments.end()).into(),
            bdf_start: range.bdfs.start().0.into(),
            bdf_end: range.bdfs.end().0.into(),
            output_node: output_node.into(),
            reserved: [0; 6],
        };
        self.push(PCI_RANGE, &body);
    }

    fn mmio_endpoint(&mut self, endpoint: MmioEndpoint, output_node: u16) {
        let body = MmioEndpointBody {
            endpoint: endpoint.id.into(),
            base: endpoint.base.into(),
            output_node: output_node.into(),
            reserved: [0; 6],
        };
        self.push(MMIO_ENDPOINT, &body);
    }
}

enum Endpoint {
    Range(RangeBody),
    Mmio(MmioEndpointBody),
}

impl Endpoint {
    fn output_node(&self) -> u16 {
        match self {
            Self::Range(body) => body.output_node.get(),
            Self::Mmio(body) => body.output_node.get(),
        }
    }

    fn add_to(&self, iommu: usize, described: &mut ViotIommu) -> Place {
        match self {
            Self::Range(body) => {
                described.ranges.push(PciRange {
                    endpoint_start: body.endpoint_start.get(),
                    segments: body.segment_start.get()..=body.segment_end.get(),
                    bdfs: Bdf(body.bdf_start.get())..=Bdf(body.bdf_end.get()),
                });
                Place::Range { iommu, index: described.ranges.len() - 1 }
            }
            Self::Mmio(body) => {
                described
                    .mmio_endpoints
                    .push(MmioEndpoint { id: body.endpoint.get(), base: body.base.get() });
                Place::MmioEndpoint { iommu, index: described.mmio_endpoints.len() - 1 }
            }
        }
    }
}

/// The header, and the table cut to its length.
fn checked_header(bytes: &[u8]) -> Result<(Header, &[u8]), ViotError> {
    let malformed = |offset, reason| ViotError::Malformed { offset, reason };
    let (header, _) = Header::read_from_prefix(bytes).map_err(|_| malformed(bytes.len(), Malformed::Cut))?;
    if header.signature != SIGNATURE {
        return Err(malformed(0, Malformed::Signature));
    }
    let length = header.length.get();
    let table = u16::try_from(length)
        .ok()
        .filter(|length| usize::from(*length) >= HEADER)
        .and_then(|length| bytes.get(..usize::from(length)))
        .ok_or_else(|| malformed(core::mem::offset_of!(Header, length), Malformed::Length(length)))?;
    if sum(table) != 0 {
        return Err(malformed(core::mem::offset_of!(Header, checksum), Malformed::Checksum));
    }
    let first = header.node_offset.get();
    if header.node_count.get() > 0 && usize::from(first) < HEADER {
        let offset = core::mem::offset_of!(Header, node_offset);
        return Err(malformed(offset, Malformed::NodeOffset(first)));
    }
    Ok((header, table))
}

/// The type of the node at `offset`, and its bytes with the head: at least those of a head.
fn node_at(table: &[u8], offset: usize) -> Result<(u8, &[u8]), ViotError> {
    let malformed = |reason| ViotError::Malformed { offset, reason };
    let rest = table.get(offset..).unwrap_or_default();
    let (head, _) = NodeHead::read_from_prefix(rest).map_err(|_| malformed(Malformed::NodeCut))?;
    let length = head.length.get();
    if usize::from(length) < NODE_HEAD {
        return Err(malformed(Malformed::NodeLength { kind: head.kind, length }));
    }
    let node = rest.get(..usize::from(length)).ok_or_else(|| malformed(Malformed::NodeCut))?;
    Ok((head.kind, node))
}

fn body<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    kind: u8,
    node: &[u8],
    offset: usize,
) -> Result<T, ViotError> {
    let rest = node.get(NODE_HEAD..).unwrap_or_default();
    let length = narrow(node.len());
    let reason = Malformed::NodeLength { kind, length };
    T::read_from_prefix(rest).map(|(body, _)| body).map_err(|_| ViotError::Malformed { offset, reason })
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// For offsets and lengths in a table that is known to have 16 bits of them.
fn narrow(value: usize) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}
