//! What a hostile driver can make the unit do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use viommu::subscribe::{FenceFailed, Interest, Mirror, Reach, Refused, Unmapped};
use viommu::{Access, Ack, IovaRange, Mapping};
use viommu_vtd::spec::register as r;
use viommu_vtd::{Config, Progress};

use crate::rig::*;

#[test]
fn tables_that_refer_to_themselves_end_a_comparison() {
    let (mut rig, endpoint) = Rig::started(Config { walk_entries: 1 << 14, ..Config::default() });
    let (subscription, handle) = mirror(&endpoint);
    // All entries of every level are this table, and the last level has no access at all behind them.
    let root = rig.table();
    for entry in 0..511 {
        rig.poke(root + entry * 8, root | RW);
    }
    rig.attach(DEVICE, 1, root);
    let start = Instant::now();
    rig.announce(DEVICE, 1);
    assert!(rig.vtd.metrics().syncs_cut > 0);
    assert!(start.elapsed().as_secs() < 30);
    assert!(!subscription.is_fenced() && handle.held().len() <= 2 << 14);
    // The same without a leaf: nothing but tables.
    let (empty, middle) = (rig.table(), rig.table());
    let top = rig.table();
    for entry in 0..512 {
        rig.poke(top + entry * 8, middle | RW);
        rig.poke(middle + entry * 8, empty | RW);
        rig.poke(empty + entry * 8, 0);
    }
    rig.attach(DEVICE, 2, top);
    let cut = rig.vtd.metrics().syncs_cut;
    rig.announce(DEVICE, 2);
    assert_eq!(handle.held(), []);
    assert!(rig.vtd.metrics().syncs_cut > cut);
}

/// A mirror for many extents: it counts.
#[derive(Default)]
struct Count(Arc<AtomicUsize>);

impl Mirror for Count {
    fn reach(&self) -> Reach {
        Reach { wide_unmap: false, ..Reach::default() }
    }
    fn map(&mut self, _: &Mapping) -> Result<Ack, Refused> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(Ack::Done)
    }
    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        self.0.fetch_sub(1, Ordering::Relaxed);
        Ok(Unmapped::done(range.bytes()))
    }
    fn fence(&mut self) -> Result<(), FenceFailed> {
        Ok(())
    }
    fn held(&self) -> Vec<Mapping> {
        Vec::new()
    }
}

#[test]
fn one_call_does_a_bounded_piece() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let held = Arc::new(AtomicUsize::new(0));
    let _subscription = endpoint.subscribe_mirror(Box::new(Count(held.clone())), Interest::MIRROR).unwrap();
    let (root, leaves) = (rig.table(), rig.table());
    (0..512).for_each(|entry| rig.poke(leaves + entry * 8, 0x8000 | RW));
    for table in 0..80 {
        let at = rig.entry(root, table << 21, 2);
        rig.poke(at, leaves | RW);
    }
    rig.attach(DEVICE, 1, root);
    let status = rig.push(&[device_context(DEVICE), domain(1)]);
    let mut calls = 0;
    while rig.vtd.process() == Progress::More {
        calls += 1;
        assert_ne!(rig.status(), status);
    }
    assert!(calls >= 1, "{calls}");
    assert_eq!((rig.status(), held.load(Ordering::Relaxed)), (status, 80 * 512));
    // The cost of an invalidation is what is mapped.
    let before = rig.vtd.metrics();
    rig.submit(&[pages(1, 0x5000, 0)]);
    let after = rig.vtd.metrics();
    assert_eq!(after.sync_slices - before.sync_slices, 1);
    assert!(after.sync_entries - before.sync_entries <= 8);
}

#[test]
fn nonsense_in_every_register_does_no_harm() {
    let (rig, endpoint) = Rig::started(Config::default());
    let mut reader = reader(&endpoint);
    for at in (0..0x300).step_by(4) {
        for value in [u32::MAX, 0, 0x8000_0000, 1] {
            rig.write32(at, value);
            let _ = rig.process();
            let _ = access(&mut reader, 0x1000, Access::READ);
        }
    }
    rig.vtd.write(u64::MAX, &[0; 8]);
    rig.vtd.write(r::GLOBAL_COMMAND, &[0; 3]);
    let mut all = [0; 16];
    rig.vtd.read(u64::MAX - 3, &mut all);
    assert_eq!(all, [0; 16]);
    let _ = rig.vtd.reset();
}

#[test]
fn a_queue_that_never_ends_is_served_in_pieces() {
    let (rig, _endpoint) = Rig::started(Config::default());
    // All descriptors are waits, and the tail is behind the end: the head never gets there.
    for at in (0..4096).step_by(16) {
        rig.poke(QUEUE + at, 5);
        rig.poke(QUEUE + at + 8, 0);
    }
    rig.write64(r::QUEUE_TAIL, 0x7_fff0);
    assert_eq!(rig.process(), Progress::Idle);
    assert_eq!(rig.read32(r::FAULT_STATUS), 1 << 4, "an error, and not a loop");
}
