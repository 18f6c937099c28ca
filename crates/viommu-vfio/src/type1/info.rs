//! What a container says of itself: from the bytes of `GET_INFO`.

use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
};
use viommu::{Iova, IovaRange};

/// Capabilities looked at: there are three kinds, and a chain that goes round must end.
const MAX_CAPS: usize = 64;

/// What a container can do. It changes when groups come and go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bit n set: pages of 2^n bytes.
    pub page_sizes: u64,
    /// Where mappings may lie, each inside a single range: ascending, inclusive. Everything, where the kernel names
    /// none (mediated devices alone).
    pub apertures: Vec<IovaRange>,
    /// Mappings that can still be made; `None` where the kernel does not say (before Linux 5.10).
    pub entries: Option<u32>,
    /// What there is for tracking dirty pages, if there is anything.
    pub dirty: Option<DirtyTracking>,
    /// Whether one call can remove everything.
    pub unmap_all: bool,
}

/// How the container tracks dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyTracking {
    /// Bytes a bit of the bitmaps: the smallest page that is offered, a power of two.
    pub page_size: u64,
    /// The largest bitmap, in bytes.
    pub max_bitmap_bytes: u64,
}

impl Info {
    /// From the bytes of a `struct vfio_iommu_type1_info` and what follows it; `None` where they make no sense.
    pub(crate) fn parse(bytes: &[u8], unmap_all: bool) -> Option<Self> {
        let flags = u32_at(bytes, 4)?;
        // Without a word on sizes, the kernel takes those of the processor.
        let has_sizes = flags & VFIO_IOMMU_INFO_PGSIZES != 0;
        let page_sizes = if has_sizes { u64_at(bytes, 8)? } else { 1 << 12 };
        let mut info =
            Self { page_sizes, apertures: vec![IovaRange::ALL], entries: None, dirty: None, unmap_all };
        if page_sizes == 0 {
            return None;
        }
        let mut at = if flags & VFIO_IOMMU_INFO_CAPS != 0 { u32_at(bytes, 16)? } else { 0 };
        for _ in 0..MAX_CAPS {
            if at == 0 {
                return Some(info);
            }
            let cap = bytes.get(usize::try_from(at).ok()?..)?;
            match u32::from(u16_at(cap, 0)?) {
                VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => info.apertures = ranges(cap)?,
                VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => {
                    let sizes = u64_at(cap, 16)?;
                    let page_size = 1_u64.checked_shl(sizes.trailing_zeros())?;
                    info.dirty = Some(DirtyTracking { page_size, max_bitmap_bytes: u64_at(cap, 24)? });
                }
                VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => info.entries = Some(u32_at(cap, 8)?),
                _ => {} // newer than this code
            }
            at = u32_at(cap, 4)?;
        }
        None
    }

    /// The smallest page, in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        1 << self.page_sizes.trailing_zeros().min(63)
    }
}

fn ranges(cap: &[u8]) -> Option<Vec<IovaRange>> {
    let count = usize::try_from(u32_at(cap, 8)?).ok()?;
    let list = cap.get(16..16_usize.checked_add(count.checked_mul(16)?)?)?;
    let mut ranges = list
        .chunks_exact(16)
        .map(|range| IovaRange::new(Iova(u64_at(range, 0)?), Iova(u64_at(range, 8)?)))
        .collect::<Option<Vec<_>>>()?;
    ranges.sort_unstable();
    let disjoint = ranges.is_sorted_by(|a, b| a.last() < b.start());
    (disjoint && !ranges.is_empty()).then_some(ranges)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The structure as Linux 7.3 writes it under an Intel IOMMU.
    fn answer() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut put = |list: &[(u64, usize)]| {
            list.iter().for_each(|(value, size)| bytes.extend_from_slice(&value.to_ne_bytes()[..*size]));
        };
        put(&[(24 + 32 + 48 + 16, 4), (3, 4), (0x4020_1000, 8), (24, 4), (0, 4)]);
        put(&[(2, 2), (1, 2), (56, 4), (0, 4), (0, 4), (0x1000, 8), (0x1000_0000, 8)]);
        put(&[(1, 2), (1, 2), (104, 4), (2, 4), (0, 4)]);
        put(&[(0, 8), (0xfedf_ffff, 8), (0xfef0_0000, 8), ((1 << 48) - 1, 8)]);
        put(&[(3, 2), (1, 2), (0, 4), (65535, 4), (0, 4)]);
        bytes
    }

    #[test]
    fn answer_of_a_kernel_is_read() {
        let range = |start, last| IovaRange::new(Iova(start), Iova(last)).unwrap();
        let expected = Info {
            page_sizes: 0x4020_1000,
            apertures: vec![range(0, 0xfedf_ffff), range(0xfef0_0000, (1 << 48) - 1)],
            entries: Some(65535),
            dirty: Some(DirtyTracking { page_size: 0x1000, max_bitmap_bytes: 0x1000_0000 }),
            unmap_all: true,
        };
        assert_eq!(Info::parse(&answer(), true), Some(expected));
    }

    #[test]
    fn answer_without_capabilities_is_everything_and_no_tracking() {
        let mut bytes = answer()[..24].to_vec();
        bytes[4] = 1;
        let info = Info::parse(&bytes, false).unwrap();
        assert_eq!(
            (info.apertures.as_slice(), info.entries, info.dirty),
            (&[IovaRange::ALL][..], None, None)
        );
    }

    #[test]
    fn answer_cut_short_or_going_round_is_none() {
        let whole = answer();
        for length in 0..whole.len() - 4 {
            assert_eq!(Info::parse(&whole[..length], true), None, "{length} bytes");
        }
        let mut round = whole;
        round[24 + 4] = 24;
        assert_eq!(Info::parse(&round, true), None);
    }
}
