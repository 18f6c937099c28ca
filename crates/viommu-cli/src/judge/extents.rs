//! Sets of extents, compared address by address: they may be cut differently on both sides.

use viommu::{Iova, Mapping};

/// Whether `list` (ascending by start) covers all of `extent`: with the same target and access, or (`any`) with
/// whatever. Those of the list are disjoint, or doubles.
pub(crate) fn covered(extent: &Mapping, list: &[Mapping], any: bool) -> bool {
    let mut at = extent.range.start();
    // Disjoint but for doubles, which stand side by side: nothing before one that ends below `at` reaches over it.
    let from = list.partition_point(|m| m.range.start() <= at);
    let from =
        (0..from).rev().find(|k| list.get(*k).is_some_and(|m| m.range.last() < at)).map_or(0, |k| k + 1);
    for m in list.iter().skip(from) {
        if m.range.start() > at {
            return false;
        }
        if m.range.last() < at
            || !(any || (m.translate(at) == extent.translate(at) && m.access == extent.access))
        {
            continue;
        }
        if m.range.last() >= extent.range.last() {
            return true;
        }
        at = Iova(m.range.last().0 + 1); // below the extent's last
    }
    false
}

/// Puts a list in the order that [`covered`] needs.
pub(crate) fn sort(list: &mut [Mapping]) {
    if !list.is_sorted_by_key(|m| m.range.start()) {
        list.sort_by_key(|m| m.range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use viommu::{Access, Gpa};

    fn m(iova: u64, bytes: u64, gpa: u64) -> Mapping {
        Mapping::new(Iova(iova), bytes, Gpa(gpa), Access::RW).unwrap()
    }

    #[test]
    fn an_extent_is_covered_by_its_pieces_and_not_by_others() {
        let pieces = [m(0x1000, 0x1000, 0x8000), m(0x2000, 0x2000, 0x9000)];
        assert!(covered(&m(0x1000, 0x3000, 0x8000), &pieces, false));
        assert!(covered(&m(0x1000, 0x2000, 0x8000), &pieces, false));
        assert!(!covered(&m(0x1000, 0x4000, 0x8000), &pieces, false));
        assert!(!covered(&m(0x1000, 0x3000, 0x7000), &pieces, false));
        assert!(covered(&m(0x1000, 0x3000, 0x7000), &pieces, true));
        assert!(!covered(&m(0, 0x2000, 0x7000), &pieces, true));
        let read = Mapping { access: Access::READ, ..m(0x1000, 0x1000, 0x8000) };
        assert!(!covered(&read, &pieces, false));
    }

    #[test]
    fn doubled_pieces_and_the_last_address_are_no_trouble() {
        let last = u64::MAX - 0xfff;
        let pieces =
            [m(0x1000, 0x1000, 0), m(0x1000, 0x1000, 0), m(0x2000, 0x1000, 0x1000), m(last, 0x1000, 0)];
        assert!(covered(&m(0x1000, 0x2000, 0), &pieces, false));
        assert!(covered(&m(last, 0x1000, 0), &pieces, false));
        assert!(!covered(&m(last, 0x1000, 0), &[], true));
    }
}
