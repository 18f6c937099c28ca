//! Cutting a device off.

use std::os::fd::OwnedFd;

use super::*;

fn unfollowable(rig: &Rig) -> Completion {
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    rig.fill(0, Access::READ);
    rig.peer.lock().fails = Some((kind::INVALIDATE, 0, Errno::IO));
    rig.domain.unmap(pages(0, 3)).unwrap()
}

#[test]
fn device_without_an_action_is_told_to_drop_everything() {
    let rig = Rig::with(protocol(), |device| device.time_limit(Duration::ZERO));
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    rig.fill(0, Access::READ);
    rig.peer.stall(true);
    let done = rig.domain.unmap(pages(0, 3)).unwrap();
    rig.handle.expire(Instant::now());
    rig.peer.stall(false);
    rig.peer.take_told();
    over(done);
    let told: Vec<_> = rig.peer.take_told().iter().map(|m| (m.iova, m.size)).collect();
    assert_eq!(told, [(0, 1 << 63), (1 << 63, 1 << 63)]);
    rig.check_fenced();
    assert_eq!(rig.handle.start().unwrap_err().raw_os_error(), Some(Errno::BADF.raw_os_error()));
}

#[test]
fn device_that_refuses_even_that_stops_the_machine() {
    for stalled in [false, true] {
        let rig = Rig::new();
        let mut done = unfollowable(&rig);
        rig.peer.stall(stalled);
        assert!(!done.is_complete() && done.is_stuck());
        let incidents = rig.incidents.lock().unwrap();
        assert!(incidents.iter().any(|i| matches!(i, Incident::FenceFailed { .. })), "{incidents:?}");
        assert!(!rig.handle.is_fenced());
    }
}

#[test]
fn action_that_fails_stops_the_machine() {
    let rig = Rig::with(protocol(), |device| device.fence(|| Err(FenceFailed("no".into()))));
    let mut done = unfollowable(&rig);
    assert!(!done.is_complete() && done.is_stuck());
}

#[test]
fn what_waits_is_over_when_the_device_was_cut_off() {
    let rig = Rig::fenced_by_action();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    over(rig.domain.map(rw(4, 4, 4)).unwrap());
    rig.fill(0, Access::READ);
    rig.fill(4 * PAGE, Access::READ);
    rig.peer.stall(true);
    let first = rig.domain.unmap(pages(0, 3)).unwrap();
    let second = rig.domain.unmap(pages(4, 4)).unwrap();
    rig.peer.stall(false);
    rig.peer.lock().fails = Some((kind::INVALIDATE, 0, Errno::FAULT));
    assert!(rig.handle.serve(&rig.subscription).is_err());
    over(second);
    over(first);
    rig.check_fenced();
}

#[test]
fn descriptor_is_closed_when_the_device_was_cut_off() {
    let rig = Rig::fenced_by_action();
    let held = Arc::strong_count(&rig.peer.0);
    over(unfollowable(&rig));
    assert_eq!(Arc::strong_count(&rig.peer.0), held - 1);
}

#[test]
fn way_back_is_a_new_cache_after_a_reset() {
    let rig = Rig::fenced_by_action();
    over(unfollowable(&rig));
    let Rig { endpoint, domain, memory, subscription, .. } = rig;
    over(subscription.leave());
    let peer = Peer::new();
    let (cache, handle) = Device::over(Arc::new(peer.clone()), protocol()).cache(memory);
    let subscription = endpoint.subscribe_cache(Box::new(cache), Interest::CACHE).unwrap();
    handle.start().unwrap();
    over(domain.map(rw(0, 0, 0)).unwrap());
    peer.reach(0, Access::READ);
    assert_eq!(handle.serve(&subscription).unwrap(), Turn::default());
    assert!(matches!(peer.reach(0, Access::READ), Lookup::Hit(_)));
}

#[test]
fn ready_made_fences_say_which_call_failed() {
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(fence::net(null(), 2)().unwrap_err().0.starts_with("VHOST_NET_SET_BACKEND: "));
    assert!(fence::vsock(null())().unwrap_err().0.starts_with("VHOST_VSOCK_SET_RUNNING: "));
    assert!(fence::reset_owner(null())().unwrap_err().0.starts_with("VHOST_RESET_OWNER: "));
    let error = Protocol::negotiate(null()).unwrap_err();
    assert!(error.to_string().starts_with("VHOST_GET_FEATURES: "), "{error}");
}
