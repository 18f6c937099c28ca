//! A device that takes nothing for a while.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[test]
fn device_that_takes_nothing_holds_up_nobody_else() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    rig.fill(0, Access::READ);
    rig.other_subscription.fill(Iova(0), Access::READ).unwrap();
    rig.peer.stall(true);
    let mut done = rig.domain.unmap(pages(0, 3)).unwrap();
    assert!(!done.is_complete());
    assert_eq!(rig.other.held(), [], "the other has heard");
    // Steps go on, also over the same pages.
    over(rig.domain.map(rw(8, 8, 8)).unwrap());
    over(rig.domain.map(rw(0, 0, 5)).unwrap());
    let mut again = rig.domain.unmap(pages(0, 0)).unwrap();
    assert!(!again.is_complete(), "it is behind what waits");
    let turn = rig.serve();
    assert!(turn.waits && !turn.more && turn.deadline.is_some());
    assert!(!done.is_complete());

    rig.peer.stall(false);
    assert_eq!(rig.serve(), Turn::default());
    over(done);
    over(again);
    assert_eq!(rig.peer.reach(0, Access::READ), Lookup::Miss);
    assert!(!rig.subscription.is_fenced());
}

#[test]
fn answer_that_waits_does_not_outlive_a_removal_behind_it() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 0, 0)).unwrap());
    rig.peer.stall(true);
    rig.peer.lock().asked.extend([miss(0, Access::READ), miss(0, Access::WRITE)]);
    // The second is not read while the answer to the first waits.
    assert!(rig.serve().waits);
    assert_eq!(rig.peer.lock().asked.len(), 1);
    let mut done = rig.domain.replace(rw(0, 0, 5)).unwrap();
    assert!(!done.is_complete());
    rig.peer.stall(false);
    assert_eq!(rig.serve(), Turn::default());
    over(done);
    let (old, new) = (update(0, 0, rig.host(0), 3), update(0, 0, rig.host(5), 3));
    assert_eq!(rig.peer.take_told(), [old, invalidate(0, 0), new]);
}

#[test]
fn removal_out_of_time_has_the_device_cut_off() {
    let rig = Rig::fenced_by_action();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    rig.fill(0, Access::READ);
    rig.peer.stall(true);
    let mut done = rig.domain.unmap(pages(0, 3)).unwrap();
    let deadline = rig.serve().deadline.unwrap();
    rig.handle.expire(deadline - Duration::from_millis(1));
    assert!(!done.is_complete());
    rig.handle.expire(deadline);
    assert!(matches!(rig.handle.serve(&rig.subscription), Err(ServeError::Failed)));
    over(done);
    rig.check_fenced();
    // Nobody waits for it any more.
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    over(rig.domain.unmap(pages(0, 3)).unwrap());
}

#[test]
fn time_limit_is_the_embedders() {
    let rig = Rig::with(protocol(), |device| device.time_limit(Duration::ZERO));
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    rig.fill(0, Access::READ);
    rig.peer.stall(true);
    let done = rig.domain.unmap(pages(0, 3)).unwrap();
    assert!(matches!(rig.handle.serve(&rig.subscription), Err(ServeError::Failed)));
    rig.peer.stall(false);
    over(done);
    rig.check_fenced();
}

#[test]
fn worker_alone_writes_where_it_is_said_so() {
    let woken = Arc::new(AtomicUsize::new(0));
    let count = woken.clone();
    let rig = Rig::with(protocol(), |device| {
        device.writes(Writes::ByWorker).on_wait(move || {
            count.fetch_add(1, Ordering::Relaxed);
        })
    });
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    rig.fill(0, Access::READ);
    assert_eq!(woken.load(Ordering::Relaxed), 1);
    let mut done = rig.domain.unmap(pages(0, 3)).unwrap();
    assert_eq!(woken.load(Ordering::Relaxed), 2);
    assert!(!done.is_complete());
    assert_eq!(rig.peer.take_told().len(), 1, "nothing was written in the step");
    assert_eq!(rig.serve(), Turn::default());
    over(done);
    assert_eq!((rig.peer.take_told(), rig.handle.counts().stalls), (vec![invalidate(0, 3)], 0));
}

#[test]
fn stopping_ends_what_waits_and_nothing_of_it_is_written_later() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 0, 0)).unwrap());
    over(rig.domain.map(rw(1, 1, 1)).unwrap());
    rig.fill(0, Access::READ);
    rig.peer.stall(true);
    rig.peer.reach(PAGE, Access::READ);
    assert!(rig.serve().waits);
    let done = rig.domain.unmap(pages(0, 0)).unwrap();
    rig.handle.stop();
    over(done);
    rig.peer.lock().iotlb.reset();
    over(rig.domain.unmap(pages(1, 1)).unwrap());
    assert_eq!(rig.handle.start().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    rig.peer.stall(false);
    rig.handle.start().unwrap();
    rig.peer.take_told();
    assert_eq!(rig.serve(), Turn::default());
    assert_eq!(rig.peer.take_told(), []);
}

#[test]
fn more_that_waits_than_there_is_room_for_has_the_device_cut_off() {
    let rig = Rig::fenced_by_action();
    over(rig.domain.map(rw(0, 0, 0)).unwrap());
    rig.fill(0, Access::READ);
    rig.peer.stall(true);
    let mut first = rig.domain.unmap(pages(0, 0)).unwrap();
    let mut last = Completion::ready();
    for n in 0..1024 {
        over(rig.domain.map(rw(0, 0, 0)).unwrap());
        assert!(!first.is_complete(), "{n} wait");
        last = rig.domain.unmap(pages(0, 0)).unwrap();
    }
    over(last);
    over(first);
    rig.check_fenced();
}

#[test]
fn steps_and_the_worker_at_once_lose_nothing() {
    for writes in [Writes::InStep, Writes::ByWorker] {
        let rig = Arc::new(Rig::with(protocol(), |device| device.writes(writes)));
        let worker = rig.clone();
        let over = Arc::new(AtomicUsize::new(0));
        let end = over.clone();
        let thread = std::thread::spawn(move || {
            let mut page = 0;
            while end.load(Ordering::Relaxed) == 0 {
                page = (page + 1) % 8;
                worker.peer.reach(page * PAGE, Access::READ);
                let _ = worker.serve();
            }
        });
        let mut updates = 0;
        for n in 0..2000_u64 {
            let page = n * 5 % 8;
            let mut done = match n / 8 % 2 {
                0 => rig.domain.map(rw(page, page, n % 16)).unwrap(),
                _ => rig.domain.unmap(pages(page, page)).unwrap(),
            };
            done.wait_timeout(Duration::from_secs(60)).unwrap();
            // All eight are there: until the device has one of them.
            while n % 16 == 7 && core::mem::replace(&mut updates, rig.handle.counts().updates) == updates {
                std::thread::yield_now();
            }
            if n / 8 % 2 == 1 {
                assert_eq!(rig.peer.lock().iotlb.entry(Iova(page * PAGE)), None, "step {n}");
            }
        }
        over.store(1, Ordering::Relaxed);
        thread.join().unwrap();
        rig.check_audits();
    }
}
