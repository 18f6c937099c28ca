//! Whether a topology can be read in one way only.

use std::collections::HashMap;

use super::{PciRange, Place, TopologyError, Transport, Viot};

/// Bits of an endpoint id between one segment and the next.
const SEGMENT_SHIFT: u32 = 16;

impl Viot {
    /// Whether a guest can read it in one way only. [`to_bytes`](Self::to_bytes) and [`parse`](Self::parse) ask too.
    ///
    /// # Errors
    ///
    /// What stands against it first, see [`TopologyError`].
    pub fn check(&self) -> Result<(), TopologyError> {
        self.check_iommus()?;
        let ranges = self.checked_ranges()?;
        self.check_mmio_endpoints(&ranges)?;
        for (n, later) in ranges.iter().enumerate() {
            for earlier in ranges.iter().take(n) {
                let (at, other) = (later.place, earlier.place);
                if later.range.overlaps(earlier.range) {
                    return Err(TopologyError::SameDevice { at, other });
                }
                if later.iommu == earlier.iommu && later.ids.intersect(&earlier.ids) {
                    return Err(TopologyError::SameId { at, other });
                }
            }
        }
        self.check_own_functions(&ranges)
    }

    fn check_iommus(&self) -> Result<(), TopologyError> {
        let mut seen = HashMap::new();
        for (iommu, described) in self.iommus.iter().enumerate() {
            let at = Place::Iommu(iommu);
            if let Some(other) = seen.insert(described.transport, at) {
                return Err(TopologyError::SameIommu { at, other });
            }
        }
        Ok(())
    }

    fn checked_ranges(&self) -> Result<Vec<Ranged<'_>>, TopologyError> {
        let mut ranges = Vec::new();
        for (iommu, described) in self.iommus.iter().enumerate() {
            for (index, range) in described.ranges.iter().enumerate() {
                let place = Place::Range { iommu, index };
                if range.segments.is_empty() || range.bdfs.is_empty() {
                    return Err(TopologyError::EmptyRange { at: place });
                }
                if range.endpoint_id(*range.segments.end(), *range.bdfs.end()).is_none() {
                    return Err(TopologyError::IdOverflow { at: place });
                }
                ranges.push(Ranged { place, iommu, range, ids: Ids::of(range) });
            }
        }
        Ok(ranges)
    }

    fn check_mmio_endpoints(&self, ranges: &[Ranged<'_>]) -> Result<(), TopologyError> {
        let mut bases = HashMap::new();
        for (iommu, described) in self.iommus.iter().enumerate() {
            let mut ids = HashMap::new();
            for (index, endpoint) in described.mmio_endpoints.iter().enumerate() {
                let at = Place::MmioEndpoint { iommu, index };
                if let Some(other) = bases.insert(endpoint.base, at) {
                    return Err(TopologyError::SameDevice { at, other });
                }
                let in_range = || {
                    let single = Ids::single(endpoint.id);
                    let mut same = ranges.iter().filter(|range| range.iommu == iommu);
                    same.find(|range| range.ids.intersect(&single)).map(|range| range.place)
                };
                if let Some(other) = ids.insert(endpoint.id, at).or_else(in_range) {
                    return Err(TopologyError::SameId { at, other });
                }
            }
        }
        Ok(())
    }

    fn check_own_functions(&self, ranges: &[Ranged<'_>]) -> Result<(), TopologyError> {
        for (iommu, described) in self.iommus.iter().enumerate() {
            let Transport::Pci { segment, bdf } = described.transport else { continue };
            let mut of_others = ranges.iter().filter(|range| range.iommu != iommu);
            if let Some(other) = of_others.find(|range| range.range.contains(segment, bdf)) {
                return Err(TopologyError::IommuBehindIommu { at: Place::Iommu(iommu), other: other.place });
            }
        }
        Ok(())
    }
}

struct Ranged<'a> {
    place: Place,
    iommu: usize,
    range: &'a PciRange,
    ids: Ids,
}

/// The endpoint ids of a range: `width` of them from `first`, and as many for each further segment. Signed, so that
/// differences are numbers too.
#[derive(Debug)]
struct Ids {
    first: i64,
    width: i64,
    segments: i64,
}

impl Ids {
    fn of(range: &PciRange) -> Self {
        let count = |start: u16, end: u16| i64::from(end) - i64::from(start) + 1;
        Self {
            first: i64::from(range.endpoint_start),
            width: count(range.bdfs.start().0, range.bdfs.end().0),
            segments: count(*range.segments.start(), *range.segments.end()),
        }
    }

    fn single(id: u32) -> Self {
        Self { first: i64::from(id), width: 1, segments: 1 }
    }

    /// Whether an id is in both. Segment i of one starts `distance + k * 2^16` before segment j of the other, with k = j - i:
    /// asked is for a k that brings two of them less than a width together.
    fn intersect(&self, other: &Self) -> bool {
        let distance = other.first - self.first;
        // The k with -other.width < distance + k * 2^16 < self.width; the shift rounds down.
        let least = ((-other.width - distance) >> SEGMENT_SHIFT) + 1;
        let most = (self.width - distance - 1) >> SEGMENT_SHIFT;
        least.max(1 - self.segments) <= most.min(other.segments - 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn every_id(ids: &Ids) -> Vec<i64> {
        let of_segment = |n| (0..ids.width).map(move |id| ids.first + (n << SEGMENT_SHIFT) + id);
        (0..ids.segments).flat_map(of_segment).collect()
    }

    fn ids() -> impl Strategy<Value = Ids> {
        let near = prop_oneof![0_i64..8, 0xfff8_i64..0x10008, 0x1fff8_i64..0x20008];
        let width = prop_oneof![4 => 1_i64..9, 1 => 0xfffa_i64..=0x10000];
        (near, width, 1_i64..4).prop_map(|(first, width, segments)| Ids { first, width, segments })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn intersect_agrees_with_looking_at_every_id(a in ids(), b in ids()) {
            let of_b: std::collections::HashSet<_> = every_id(&b).into_iter().collect();
            let common = every_id(&a).iter().any(|id| of_b.contains(id));
            prop_assert_eq!(a.intersect(&b), common);
            prop_assert_eq!(b.intersect(&a), common);
        }
    }
}
