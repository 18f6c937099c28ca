use proptest::prelude::*;
use viommu::{Access, Gpa, Iova};

use super::*;
use crate::software::Lookup;

fn entry(iova: u64, bytes: u64, gpa: u64) -> Mapping {
    Mapping::new(Iova(iova), bytes, Gpa(gpa), Access::RW).unwrap()
}

fn cache() -> (SoftwareCache, Arc<Mutex<Iotlb>>) {
    let iotlb = Arc::new(Mutex::new(Iotlb::default()));
    (SoftwareCache::new(iotlb.clone()), iotlb)
}

fn lookup(iotlb: &Mutex<Iotlb>, iova: u64) -> Lookup {
    lock(iotlb).lookup(Iova(iova), Access::READ)
}

#[test]
fn fill_of_the_same_entry_replaces_it() {
    let (mut cache, iotlb) = cache();
    cache.install(&entry(0x1000, 0x1000, 0x8000));
    cache.install(&entry(0x1000, 0x1000, 0x9000));
    assert_eq!(cache.held(), Some(vec![entry(0x1000, 0x1000, 0x9000)]));
    assert_eq!(lookup(&iotlb, 0x1000), Lookup::Hit(Gpa(0x9000)));
    let iotlb = lock(&iotlb);
    assert_eq!((iotlb.overlaps(), iotlb.counts().displaced), (0, 1));
}

#[test]
fn fill_over_others_drops_them() {
    let (mut cache, iotlb) = cache();
    cache.install(&entry(0, 0x2000, 0));
    cache.install(&entry(0x2000, 0x1000, 0x2000));
    cache.install(&entry(0x3000, 0x1000, 0x3000));
    cache.install(&entry(0x1000, 0x2000, 0x1000));
    assert_eq!(cache.held().unwrap(), [entry(0x1000, 0x2000, 0x1000), entry(0x3000, 0x1000, 0x3000)]);
    assert_eq!(lookup(&iotlb, 0), Lookup::Miss);
}

#[test]
fn fill_without_access_is_no_entry() {
    let (mut cache, _) = cache();
    cache.install(&Mapping { access: Access::empty(), ..entry(0, 0x1000, 0) });
    assert_eq!(cache.held(), Some(vec![]));
}

#[test]
fn invalidate_is_done_at_once() {
    let (mut cache, iotlb) = cache();
    cache.install(&entry(0x1000, 0x1000, 0x8000));
    assert!(matches!(cache.invalidate(IovaRange::ALL), Ack::Done));
    assert_eq!(lookup(&iotlb, 0x1000), Lookup::Miss);
}

#[test]
fn fence_drops_everything_and_refuses_lookups() {
    let (mut cache, iotlb) = cache();
    cache.install(&entry(0x1000, 0x1000, 0x8000));
    cache.fence().unwrap();
    assert_eq!(lookup(&iotlb, 0x1000), Lookup::Fenced);
    cache.install(&entry(0x1000, 0x1000, 0x8000));
    assert_eq!(cache.held(), Some(vec![]));
}

#[test]
fn slow_back_end_uses_what_it_has_until_it_reads() {
    let iotlb = Arc::new(Mutex::new(Iotlb::default()));
    let (mut cache, channel) = SoftwareCache::behind_channel(iotlb.clone());
    let (old, new) = (entry(0x1000, 0x1000, 0x8000), entry(0x1000, 0x1000, 0x9000));
    cache.install(&old);
    assert_eq!(lookup(&iotlb, 0x1000), Lookup::Miss);
    assert_eq!(channel.deliver(), Some(Message::Update(old)));

    assert!(matches!(cache.invalidate(old.range), Ack::Pending(_)));
    cache.install(&new);
    assert_eq!(lookup(&iotlb, 0x1000), Lookup::Hit(Gpa(0x8000)), "not read yet");
    assert_eq!(channel.waiting(), [Message::Invalidate(old.range), Message::Update(new)]);
    assert_eq!(channel.deliver(), Some(Message::Invalidate(old.range)));
    assert_eq!(lookup(&iotlb, 0x1000), Lookup::Miss);
    assert_eq!(channel.deliver_all(), 1);
    assert_eq!(lookup(&iotlb, 0x1000), Lookup::Hit(Gpa(0x9000)));
    assert_eq!(channel.deliver(), None);
}

#[test]
fn fill_before_an_invalidate_does_not_outlive_it() {
    let iotlb = Arc::new(Mutex::new(Iotlb::default()));
    let (mut cache, channel) = SoftwareCache::behind_channel(iotlb);
    cache.install(&entry(0x1000, 0x1000, 0x8000));
    let _pending = cache.invalidate(entry(0x1000, 0x1000, 0).range);
    assert_eq!(channel.deliver_all(), 2);
    assert_eq!(cache.held(), Some(vec![]));
}

#[test]
fn failing_back_end_does_nothing_of_the_message() {
    let iotlb = Arc::new(Mutex::new(Iotlb::default()));
    let (mut cache, channel) = SoftwareCache::behind_channel(iotlb.clone());
    cache.install(&entry(0x1000, 0x1000, 0x8000));
    channel.deliver_all();
    let _pending = cache.invalidate(IovaRange::ALL);
    assert_eq!(channel.fail(), Some(Message::Invalidate(IovaRange::ALL)));
    assert_eq!(lookup(&iotlb, 0x1000), Lookup::Hit(Gpa(0x8000)));
    assert_eq!(channel.fail(), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Fills and removals as a record makes them: what is held is always a part of what was filled last.
    #[test]
    fn cache_never_holds_two_entries_over_one_address(
        ops in prop::collection::vec((0_u64..40, 1_u64..6, 0_u64..100, any::<bool>()), 1..60),
    ) {
        let iotlb = Arc::new(Mutex::new(Iotlb::new(8)));
        let mut cache = SoftwareCache::new(iotlb.clone());
        let mut latest = [None; 48];
        for (start, bytes, gpa, fill) in ops {
            let new = entry(start, bytes, gpa);
            let over = usize::try_from(start).unwrap()..usize::try_from(start + bytes).unwrap();
            if fill {
                cache.install(&new);
                prop_assert_eq!(lookup(&iotlb, start), Lookup::Hit(Gpa(gpa)));
            } else {
                let _ = cache.invalidate(new.range);
            }
            for (n, byte) in latest[over].iter_mut().enumerate() {
                *byte = fill.then_some(Gpa(gpa + n as u64));
            }
            prop_assert_eq!(lock(&iotlb).overlaps(), 0);
            for (n, byte) in latest.iter().enumerate() {
                if let Lookup::Hit(gpa) = lookup(&iotlb, n as u64) {
                    prop_assert_eq!(Some(gpa), *byte);
                }
            }
        }
    }
}
