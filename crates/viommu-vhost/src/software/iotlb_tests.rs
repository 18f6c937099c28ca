use proptest::prelude::*;

use super::*;

const PAGE: u64 = 0x1000;

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

fn entry(iova: u64, bytes: u64, gpa: u64, access: Access) -> Mapping {
    Mapping::new(Iova(iova), bytes, Gpa(gpa), access).unwrap()
}

fn page(n: u64) -> Mapping {
    entry(n * PAGE, PAGE, n * PAGE, Access::RW)
}

#[test]
fn update_over_a_live_entry_keeps_both_and_the_old_one_is_found() {
    let mut tlb = Iotlb::default();
    tlb.update(&entry(0x1000, 0x1000, 0x8000, Access::RW)).unwrap();
    tlb.update(&entry(0x1000, 0x1000, 0x9000, Access::RW)).unwrap();
    assert_eq!((tlb.len(), tlb.overlaps()), (2, 1));
    assert_eq!(tlb.lookup(Iova(0x1004), Access::READ), Lookup::Hit(Gpa(0x8004)));
    assert_eq!(tlb.invalidate(range(0x1fff, 0x1fff)), 2);
    assert_eq!((tlb.len(), tlb.overlaps()), (0, 0));
}

#[test]
fn invalidate_of_one_byte_drops_the_entire_entry() {
    let mut tlb = Iotlb::default();
    tlb.update(&page(1)).unwrap();
    tlb.update(&page(2)).unwrap();
    assert_eq!(tlb.invalidate(range(0x1800, 0x1800)), 1);
    assert_eq!(tlb.lookup(Iova(0x1000), Access::READ), Lookup::Miss);
    assert_eq!(tlb.lookup(Iova(0x2000), Access::READ), Lookup::Hit(Gpa(0x2000)));
    assert_eq!(
        tlb.counts(),
        Counts { hits: 1, misses: 1, fills: 2, invalidations: 1, invalidated: 1, ..Counts::default() }
    );
}

#[test]
fn the_2049th_entry_drops_the_oldest() {
    let mut tlb = Iotlb::default();
    for n in (0..2049).rev() {
        tlb.update(&page(n)).unwrap();
    }
    assert_eq!((tlb.len(), tlb.counts().evictions), (2048, 1));
    assert_eq!(tlb.lookup(Iova(2048 * PAGE), Access::READ), Lookup::Miss);
    assert_eq!(tlb.lookup(Iova(2047 * PAGE), Access::READ), Lookup::Hit(Gpa(2047 * PAGE)));
    assert_eq!(tlb.lookup(Iova(0), Access::READ), Lookup::Hit(Gpa(0)));
}

#[test]
fn a_hit_does_not_make_an_entry_younger() {
    let mut tlb = Iotlb::new(2);
    tlb.update(&page(1)).unwrap();
    tlb.update(&page(2)).unwrap();
    assert!(matches!(tlb.lookup(Iova(PAGE), Access::READ), Lookup::Hit(_)));
    tlb.update(&page(3)).unwrap();
    assert_eq!(tlb.lookup(Iova(PAGE), Access::READ), Lookup::Miss);
}

#[test]
fn what_was_invalidated_makes_room() {
    let mut tlb = Iotlb::new(2);
    tlb.update(&page(1)).unwrap();
    tlb.update(&page(2)).unwrap();
    tlb.invalidate(page(1).range);
    tlb.update(&page(3)).unwrap();
    assert_eq!((tlb.len(), tlb.counts().evictions), (2, 0));
}

#[test]
fn without_capacity_there_is_no_limit() {
    let mut tlb = Iotlb::new(0);
    for n in 0..5000 {
        tlb.update(&page(n)).unwrap();
    }
    assert_eq!((tlb.len(), tlb.counts().evictions), (5000, 0));
}

#[test]
fn wrong_permission_is_denied_and_no_miss() {
    let mut tlb = Iotlb::default();
    tlb.update(&entry(0x1000, 0x1000, 0, Access::READ)).unwrap();
    tlb.update(&entry(0x2000, 0x1000, 0, Access::WRITE)).unwrap();
    assert_eq!(tlb.lookup(Iova(0x1000), Access::WRITE), Lookup::Denied);
    assert_eq!(tlb.lookup(Iova(0x2000), Access::READ), Lookup::Denied);
    assert_eq!(tlb.lookup(Iova(0x2000), Access::RW), Lookup::Denied);
    assert_eq!(tlb.lookup(Iova(0x2000), Access::WRITE), Lookup::Hit(Gpa(0)));
    assert_eq!((tlb.counts().denied, tlb.counts().misses), (3, 0));
}

#[test]
fn all_addresses_are_two_halves_and_one_flush() {
    let mut tlb = Iotlb::default();
    let all = Mapping::over(IovaRange::ALL, Gpa(0), Access::RW).unwrap();
    tlb.update(&all).unwrap();
    assert_eq!((tlb.len(), tlb.overlaps()), (2, 0));
    for at in [0, (1 << 63) - 1, 1 << 63, u64::MAX] {
        assert_eq!(tlb.lookup(Iova(at), Access::RW), Lookup::Hit(Gpa(at)));
    }
    assert_eq!(tlb.invalidate(IovaRange::ALL), 2);
    assert!(tlb.is_empty());
}

#[test]
fn fenced_iotlb_takes_nothing_and_answers_nothing() {
    let mut tlb = Iotlb::default();
    tlb.update(&page(1)).unwrap();
    tlb.fence();
    assert!(tlb.is_empty());
    assert_eq!(tlb.update(&page(1)), Err(Fenced));
    assert_eq!(tlb.lookup(Iova(PAGE), Access::READ), Lookup::Fenced);
    assert_eq!(tlb.counts().misses, 0);
    tlb.reset();
    assert_eq!(tlb.lookup(Iova(PAGE), Access::READ), Lookup::Miss);
}

/// The same rules over a list in the order of age.
#[derive(Default)]
struct Naive(Vec<Mapping>);

impl Naive {
    fn update(&mut self, capacity: usize, entry: Mapping) {
        if self.0.len() == capacity {
            self.0.remove(0);
        }
        self.0.push(entry);
    }

    fn lookup(&self, iova: Iova, access: Access) -> Lookup {
        let at = self.0.iter().filter(|e| e.range.contains(iova)).min_by_key(|e| e.range.start());
        match at {
            None => Lookup::Miss,
            Some(e) if e.access.contains(access) => Lookup::Hit(Gpa(e.gpa.0 + iova.0 - e.range.start().0)),
            Some(_) => Lookup::Denied,
        }
    }

    fn overlaps(&self) -> usize {
        let pair =
            |(n, a): (usize, &Mapping)| self.0[..n].iter().filter(|b| a.range.overlaps(b.range)).count();
        self.0.iter().enumerate().map(pair).sum()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Update(u64, u64, u64, u8),
    Invalidate(u64, u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0_u64..40, 1_u64..6, 0_u64..100, 0_u8..4).prop_map(|(s, n, g, a)| Op::Update(s, n, g, a)),
        1 => (0_u64..40, 1_u64..6).prop_map(|(s, n)| Op::Invalidate(s, n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn iotlb_agrees_with_a_list_of_entries(ops in prop::collection::vec(op(), 1..60)) {
        let mut tlb = Iotlb::new(8);
        let mut naive = Naive::default();
        for op in ops {
            match op {
                Op::Update(start, bytes, gpa, access) => {
                    let new = entry(start, bytes, gpa, Access::from_bits_truncate(access));
                    tlb.update(&new).unwrap();
                    naive.update(8, new);
                }
                Op::Invalidate(start, bytes) => {
                    let range = range(start, start + bytes - 1);
                    let before = naive.0.len();
                    naive.0.retain(|e| !e.range.overlaps(range));
                    prop_assert_eq!(tlb.invalidate(range), before - naive.0.len());
                }
            }
            prop_assert_eq!(tlb.len(), naive.0.len());
            prop_assert_eq!(tlb.overlaps(), naive.overlaps());
            for at in 0..46 {
                for access in [Access::READ, Access::WRITE, Access::RW] {
                    prop_assert_eq!(tlb.lookup(Iova(at), access), naive.lookup(Iova(at), access));
                }
            }
            let counts = tlb.counts();
            let gone = counts.evictions + counts.invalidated;
            prop_assert_eq!(counts.fills, tlb.len() as u64 + gone);
        }
    }
}
