//! An unmap completes only when nobody can write through what it removed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use viommu::{Access, Gpa, Iova, Mapping, WaitError};
use viommu_memory::EndpointSpace;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use crate::{Memory, PAGE, Rig};

/// With vm-memory's own `Iotlb`, a write through a slice still lands after `invalidate_all`, when nothing waits for it.
#[test]
fn slices_that_were_collected_delay_the_completion() {
    let rig = Rig::new();
    let mapped = rig.map(0x1000, 1, 0x1000, Access::RW);
    rig.map(0x2000, 1, 0x5000, Access::RW);
    let mut worker = rig.worker();
    let guard = worker.enter();
    let slices = guard.get_slices(GuestAddress(0x1ff8), 16, Permissions::Write).unwrap();
    let slices: Vec<_> = slices.map(Result::unwrap).collect();

    let mut done = rig.domain.unmap(mapped).unwrap();
    assert!(!guard.check_range(GuestAddress(0x1ff8), 1, Permissions::Write));
    slices[0].write_obj(7u64, 0).unwrap();
    assert_eq!(rig.memory.read_obj::<u64>(GuestAddress(0x1ff8)).unwrap(), 7);
    assert!(!done.is_complete(), "the page is still being written");
    let now = done.wait_timeout(Duration::ZERO);
    assert!(matches!(now, Err(WaitError::HoldingGuard)), "this thread would wait for itself");
    drop(slices);
    drop(guard);
    done.wait().unwrap();
}

#[test]
fn guards_that_begin_after_the_unmap_do_not_delay_it() {
    let rig = Rig::new();
    let mapped = rig.map(0x1000, 1, 0x1000, Access::RW);
    let space = rig.space();
    let before = space.memory();
    let mut done = rig.domain.unmap(mapped).unwrap();
    assert!(!done.is_complete());
    let after = space.memory();
    drop(before);
    assert!(done.is_complete());
    assert!(after.read_obj::<u8>(GuestAddress(0x1000)).is_err());
}

#[test]
fn clones_of_a_guard_are_one_blocker() {
    let rig = Rig::new();
    let mapped = rig.map(0x1000, 1, 0x1000, Access::RW);
    let space = rig.space();
    for _ in 0..2 {
        let (first, second) = (space.memory(), space.clone().memory());
        let (third, fourth) = (first.clone(), second.clone());
        let mut done = rig.domain.unmap(mapped).unwrap();
        drop((first, second));
        assert_eq!(done.blockers().len(), 0, "not polled yet");
        assert!(!done.is_complete());
        assert_eq!(done.blockers().len(), 2);
        drop(third);
        assert!(!done.is_complete());
        assert_eq!(done.blockers().len(), 1);
        drop(fourth);
        assert!(done.is_complete());
        rig.map(0x1000, 1, 0x1000, Access::RW);
    }
}

#[test]
fn lease_taken_under_a_guard_outlives_it() {
    let rig = Rig::new();
    let mapped = rig.map(0x1000, 1, 0x1000, Access::RW);
    let memory = rig.space().memory();
    let revoked = Arc::new(AtomicBool::new(false));
    let told = revoked.clone();
    let revoke = move || told.store(true, Ordering::Relaxed);
    let lease = memory.translator().lease(mapped, Access::WRITE, "posted buffer", revoke).unwrap();
    drop(memory);
    let mut done = rig.domain.unmap(mapped).unwrap();
    assert!(!done.is_complete());
    assert!(revoked.load(Ordering::Relaxed));
    drop(lease);
    assert!(done.is_complete());
}

/// Writes whatever it can reach until it is told to stop; gives the writes that landed.
fn scribble(space: &EndpointSpace<Arc<Memory>>, stop: &AtomicBool, landed: &AtomicUsize) {
    while !stop.load(Ordering::Relaxed) {
        let memory = space.memory();
        for page in 0..4 {
            // Over the border of two pages.
            if memory.write_slice(&[0xff; 64], GuestAddress(0x1000 + page * PAGE - 32)).is_ok() {
                landed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Tells the writers to stop, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_write_lands_after_the_unmap_has_completed() {
    let rig = Rig::new();
    let (stop, landed) = (AtomicBool::new(false), AtomicUsize::new(0));
    let space = rig.space();
    let clean = [0u8; 0x4000];
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| scribble(&space, &stop, &landed));
        }
        let _stop = Stop(&stop);
        let mut last = 0;
        for round in 0..300u64 {
            let mapping = Mapping::new(Iova(0), 4 * PAGE, Gpa((round % 3) * 4 * PAGE), Access::RW).unwrap();
            rig.domain.map(mapping).unwrap().wait().unwrap();
            while landed.load(Ordering::Relaxed) == last {
                std::thread::yield_now();
            }
            rig.domain.unmap(mapping.range).unwrap().wait().unwrap();
            last = landed.load(Ordering::Relaxed);
            // The guest has its pages back.
            rig.memory.write_slice(&clean, GuestAddress(mapping.gpa.0)).unwrap();
            std::thread::yield_now();
            let mut now = vec![1; clean.len()];
            rig.memory.read_slice(&mut now, GuestAddress(mapping.gpa.0)).unwrap();
            assert!(now == clean, "round {round}: a page was written that the device no longer has");
        }
    });
}
