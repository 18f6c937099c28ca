//! A device that is cut off.

use std::sync::atomic::{AtomicUsize, Ordering};

use viommu::subscribe::Mirror as _;

use super::*;

#[test]
fn without_an_action_everything_is_unmapped_and_the_kernel_is_asked() {
    for unmap_all in [true, false] {
        let rig = Rig::new();
        rig.fake.lock().unmap_all = unmap_all;
        rig.handle.refresh().unwrap();
        over(rig.domain.map(rw(0, 9, 12)).unwrap());
        over(rig.domain.map(rw(0xfefff, 0xff001, 12)).unwrap());
        rig.fake.fail(Kind::Unmap, 0, Errno::EIO);
        // Without ALL, the fence uses the call that fails, and says so.
        let mut done = rig.domain.unmap(pages(0, 9)).unwrap();
        if unmap_all {
            over(done);
            rig.check_fenced();
            assert_eq!(rig.handle.dirty_start(), Err(Errno::EBADF));
        } else {
            assert!(!done.is_complete() && done.is_stuck());
            let incidents = rig.incidents.lock().unwrap();
            assert!(matches!(incidents[0], Incident::FenceFailed { .. }), "{incidents:?}");
        }
    }
}

#[test]
fn without_the_call_for_all_each_aperture_is_unmapped() {
    let fake = Fake::new(Config::x86_host());
    fake.lock().unmap_all = false;
    let (mut mirror, _) = container_over(&fake).mirror(memory_of(&REGIONS));
    for at in [0, 0xfedff, 0xfef00, (1 << 36) - 1] {
        assert!(matches!(mirror.map(&rw(at, at, 3)), Ok(Ack::Done)));
    }
    mirror.fence().unwrap();
    assert_eq!(fake.maps(), 0);
    let fake = Fake::new(Config::default());
    fake.lock().unmap_all = false;
    let (mut mirror, _) = container_over(&fake).mirror(memory_of(&REGIONS));
    assert!(matches!(mirror.map(&rw(1 << 50, 1 << 50, 3)), Ok(Ack::Done)));
    mirror.fence().unwrap();
    assert_eq!(fake.maps(), 0);
}

#[test]
fn what_is_left_after_an_unmap_of_all_is_no_fence() {
    let fake = Fake::new(Config::x86_host());
    let (mut mirror, _) = container_over(&fake).mirror(memory_of(&REGIONS));
    // A kernel that loses count: what it had left at the start is never left again.
    fake.lock().container =
        software::Container::new(Config { dma_entry_limit: 7, ..Config::x86_host() }).unwrap();
    let failed = mirror.fence().unwrap_err();
    assert_eq!(failed.0, "65528 mappings are left after all were removed");
}

#[test]
fn an_action_is_the_embedders_word_and_is_asked_until_it_succeeds() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    let fake = Fake::new(Config::x86_host());
    let (devices, left) = (fake.clone(), fake.clone());
    let container = container_over(&fake).fence(move || {
        if counter.fetch_add(1, Ordering::Relaxed) == 0 {
            return Err(FenceFailed("a device does not close".into()));
        }
        devices.lock().container.detach();
        Ok(())
    });
    let (mut mirror, _) = container.mirror(memory_of(&REGIONS));
    assert!(matches!(mirror.map(&rw(0, 3, 0)), Ok(Ack::Done)));
    assert_eq!(mirror.fence(), Err(FenceFailed("a device does not close".into())));
    assert_eq!(mirror.held().len(), 1);
    assert_eq!(mirror.fence(), Ok(()));
    assert_eq!(mirror.fence(), Ok(()), "and not any more");
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    assert_eq!((left.maps(), mirror.held().len()), (0, 0));
    assert!(mirror.map(&rw(0, 3, 0)).is_err() && mirror.unmap(pages(0, 3)).unwrap().bytes == 0);
}

#[test]
fn the_way_back_is_a_new_mirror() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 9, 12)).unwrap());
    rig.fake.fail(Kind::Unmap, 0, Errno::EIO);
    over(rig.domain.unmap(pages(0, 9)).unwrap());
    rig.check_fenced();
    rig.fake.heal();
    let Rig { fake, endpoint, subscription, memory, domain, .. } = rig;
    over(subscription.leave());
    over(domain.map(rw(0, 3, 0)).unwrap());
    let (mirror, handle) = container_over(&fake).mirror(memory);
    let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR).unwrap();
    assert_eq!(handle.entries(), 1);
    assert!(subscription.audit().unwrap().is_clean());
}

#[test]
fn what_was_removed_behind_its_back_is_noticed() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    over(rig.domain.map(rw(8, 9, 0)).unwrap());
    let unmap = UnmapDma { flags: UnmapFlags::empty(), iova: 0, size: 4 * PAGE };
    rig.fake.lock().container.unmap_dma(unmap, None).unwrap();
    over(rig.domain.unmap(pages(0, 3)).unwrap());
    rig.check_fenced();
    let incidents = rig.incidents.lock().unwrap();
    let Incident::Fenced { why, .. } = &incidents[0] else { panic!("{incidents:?}") };
    assert!(why.contains("removed 0 bytes where 16384 were held"), "{why}");
}

#[test]
fn leaving_unmaps_what_is_held_and_closes_the_descriptor() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 9, 12)).unwrap());
    let Rig { fake, subscription, handle, .. } = rig;
    over(subscription.leave());
    assert_eq!((fake.maps(), handle.entries()), (0, 0));
    assert_eq!(handle.dirty_start(), Err(Errno::EBADF));
}
