//! Subscribers come, are filled, replayed and leave beside steps.

use shuttle::thread;

use super::peers::{Exact, Pages, Shadow, find, holds};
use super::*;
use crate::ack::Resolver;
use crate::change::Change;
use crate::iommu::Subscription;
use crate::subscribe::{Interest, Kinds, Observer, Reach, Space};

fn steps(mut driver: Driver<3>, count: usize) -> thread::JoinHandle<Driver<3>> {
    thread::spawn(move || {
        for _ in 0..count {
            let pages = driver.any_step();
            driver.let_go(pages);
        }
        driver
    })
}

pub(super) fn any_reach() -> Reach {
    let apertures = match roll(2) {
        0 => vec![IovaRange::ALL],
        // Not plain: extents go through the lens.
        _ => vec![IovaRange::new(Iova(0), Iova(u64::MAX >> 1)).unwrap()],
    };
    Reach {
        replace: roll(2) == 0,
        wide_unmap: roll(2) == 0,
        batches: roll(2) == 0,
        apertures,
        ..Reach::default()
    }
}

fn check_mirror(subscription: &Subscription, shadow: &Mutex<Shadow>, driver: &Driver<3>) {
    let audit = subscription.audit().unwrap();
    assert!(audit.is_clean(), "{audit:?}");
    let held: Vec<_> = shadow.lock().unwrap().held.values().copied().collect();
    assert_eq!(held, driver.mappings());
}

/// A mirror is filled slice by slice while the record changes, twice.
fn replay_beside_steps() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let mut driver = Driver::new(&domain, &Memory::new());
    driver.map_all();
    let driver = steps(driver, 3);
    let (mirror, shadow) = Exact::new(any_reach());
    let subscription = endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    if roll(2) == 0 {
        subscription.replay().unwrap().wait().unwrap();
    } else {
        subscription.reach_changed(any_reach()).unwrap().wait().unwrap();
    }
    let driver = driver.join().unwrap();
    check_mirror(&subscription, &shadow, &driver);
    subscription.leave().wait().unwrap();
    assert!(shadow.lock().unwrap().held.is_empty());
}

#[test]
fn mirror_filled_beside_steps_equals_the_record() {
    check(replay_beside_steps);
}

/// Steps that cut, join and replace mappings of several pages, across the cursor of a replay too.
fn replay_beside_cuts() {
    let iommu = unit();
    let domain = iommu.create_domain(1, Tables::OwnedCut).unwrap();
    let memory = Memory::new();
    for at in 0..4 {
        domain.map(page_at(at, memory.page())).unwrap().wait().unwrap();
    }
    let stepper = thread::spawn({
        let domain = domain.clone();
        move || {
            for _ in 0..3 {
                let first = roll(4);
                let last = first + roll(4 - first);
                let range = IovaRange::new(Iova(first * PAGE), Iova(last * PAGE + PAGE - 1)).unwrap();
                let target = Gpa((8 + roll(8)) * PAGE);
                let done = match roll(3) {
                    0 => domain.unmap(range),
                    _ => domain.replace(Mapping::over(range, target, Access::RW).unwrap()),
                };
                done.unwrap().wait().unwrap();
            }
        }
    });
    let (mirror, shadow) = Exact::new(any_reach());
    let subscription = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap();
    stepper.join().unwrap();
    let mut record = Vec::new();
    domain.for_each(IovaRange::ALL, |m| {
        record.push(m);
        core::ops::ControlFlow::Continue(())
    });
    let held: Vec<_> = shadow.lock().unwrap().held.values().copied().collect();
    assert_eq!(held, record);
    subscription.leave().wait().unwrap();
    assert!(shadow.lock().unwrap().held.is_empty());
}

#[test]
fn mirror_filled_beside_cuts_holds_whole_extents() {
    check(replay_beside_cuts);
}

/// Two mirrors of one domain: one stays, the other leaves in the middle of a step.
fn leave_beside_steps() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let mut driver = Driver::new(&domain, &Memory::new());
    driver.map_all();
    let (staying, staying_shadow) = Exact::new(any_reach());
    let staying = endpoint.subscribe_mirror(staying, Interest::MIRROR).unwrap();
    let (leaving, leaving_shadow) = Exact::new(any_reach());
    let leaving = endpoint.subscribe_mirror(leaving, Interest::MIRROR).unwrap();
    let driver = steps(driver, 2);
    if roll(2) == 0 {
        leaving.leave().wait().unwrap();
    } else {
        drop(leaving);
    }
    {
        let mut shadow = leaving_shadow.lock().unwrap();
        assert!(!shadow.running, "a callback still runs");
        assert!(shadow.held.is_empty());
        shadow.left = true;
    }
    let driver = driver.join().unwrap();
    check_mirror(&staying, &staying_shadow, &driver);
}

#[test]
fn leave_waits_for_a_running_callback_and_empties_the_mirror() {
    check(leave_beside_steps);
}

/// An observer that ends another subscription from inside its callback.
struct Ender(Option<Subscription>);

impl Observer for Ender {
    fn changed(&mut self, _space: Space, _change: &Change) {
        drop(self.0.take());
    }
}

fn leave_inside_a_callback() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let mut driver = Driver::new(&domain, &Memory::new());
    driver.map(0);
    let (mirror, shadow) = Exact::new(any_reach());
    let mirror = endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    let (cache, entries) = Pages::new();
    let cache = endpoint.subscribe_cache(cache, Interest::CACHE).unwrap();
    let ender = Box::new(Ender(Some(mirror)));
    let _ender = endpoint.subscribe_observer(ender, Interest::all_of(Kinds::MAP | Kinds::UNMAP)).unwrap();
    let driver = steps(driver, 2);
    let other = thread::spawn(move || {
        let _ = cache.fill(Iova(0), Access::READ);
        cache
    });
    driver.join().unwrap();
    let cache = other.join().unwrap();
    assert!(cache.audit().unwrap().is_clean(), "{entries:?}");
    let shadow = shadow.lock().unwrap();
    assert!(shadow.held.is_empty() && !shadow.running);
}

#[test]
fn leave_inside_a_callback_takes_effect_after_the_step() {
    check(leave_inside_a_callback);
}

/// A device with a cache: a hit is used under a guard, a miss is filled.
fn fills_beside_steps() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    let mut driver = Driver::<2>::new(&domain, &memory);
    driver.map_all();
    let (cache, entries) = Pages::new();
    let subscription = Arc::new(endpoint.subscribe_cache(cache, Interest::CACHE).unwrap());
    let devices = [0, 1].map(|at| {
        let (endpoint, memory) = (endpoint.clone(), memory.clone());
        let (entries, subscription) = (entries.clone(), subscription.clone());
        thread::spawn(move || {
            let mut reader = endpoint.reader("device").unwrap();
            let iova = place(at).start();
            for _ in 0..2 {
                let guard = reader.enter();
                if find(&entries, iova).is_none() {
                    let _ = subscription.fill(iova, Access::READ);
                }
                if let Some(gpa) = find(&entries, iova) {
                    memory.access(gpa);
                    memory.access(gpa);
                }
                drop(guard);
            }
        })
    });
    for _ in 0..3 {
        let pages = driver.any_step();
        for page in pages {
            assert!(!holds(&entries, page), "a stale entry");
            memory.let_go(page);
        }
    }
    devices.into_iter().for_each(|device| device.join().unwrap());
    let audit = subscription.audit().unwrap();
    assert!(audit.is_clean(), "{audit:?}");
}

#[test]
fn fill_beside_steps_leaves_no_stale_entry() {
    check(fills_beside_steps);
}

/// Takes what acks there are, and answers them.
fn answer(shadow: &Mutex<Shadow>, with: fn(Resolver)) -> usize {
    let unresolved = core::mem::take(&mut shadow.lock().unwrap().unresolved);
    let count = unresolved.len();
    for resolver in unresolved {
        shadow.lock().unwrap().resolved += 1;
        with(resolver);
    }
    count
}

/// A peer that answers from a thread of its own.
fn peer(shadow: &Arc<Mutex<Shadow>>, stop: &Arc<AtomicBool>, with: fn(Resolver)) -> thread::JoinHandle<()> {
    let (shadow, stop) = (shadow.clone(), stop.clone());
    thread::spawn(move || {
        loop {
            // Looked at first: what was promised before the stop is answered.
            let stopped = stop.load(Ordering::SeqCst);
            if answer(&shadow, with) == 0 && stopped {
                return;
            }
            thread::yield_now();
        }
    })
}

/// Every ack comes late, from another thread: steps and a leave wait for them.
fn late_acks() {
    let (iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    let (mirror, shadow) = Exact::late();
    let stop = Arc::new(AtomicBool::new(false));
    let peer = peer(&shadow, &stop, Resolver::done);
    let subscription = endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    let mut driver = Driver::<2>::new(&domain, &memory);
    let all_resolved = || {
        let shadow = shadow.lock().unwrap();
        assert_eq!(shadow.promised, shadow.resolved, "a completion before its ack");
    };
    for _ in 0..2 {
        let pages = driver.any_step();
        all_resolved();
        driver.let_go(pages);
    }
    assert!(!subscription.is_fenced());
    subscription.leave().wait().unwrap();
    all_resolved();
    stop.store(true, Ordering::SeqCst);
    peer.join().unwrap();
    assert_eq!(iommu.outstanding(), 0);
}

#[test]
fn late_acks_wake_who_waits_for_them() {
    check(late_acks);
}

/// Every ack is a failure, whoever polls it: the mirror is fenced, no matter under which locks the answer is dropped.
fn failing_acks() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    let memory = Memory::new();
    domain.map(page_at(5, memory.page())).unwrap().wait().unwrap();
    let (mirror, shadow) = Exact::late();
    let stop = Arc::new(AtomicBool::new(false));
    let peer = peer(&shadow, &stop, drop);
    let device = thread::spawn({
        let (memory, endpoint) = (memory.clone(), endpoint.clone());
        move || batch(&mut endpoint.reader("device").unwrap(), &memory, 2)
    });
    let subscription = endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    let driver = thread::spawn({
        let mut driver = Driver::<2>::new(&domain, &memory);
        move || {
            driver.map_all();
            let pages = driver.any_step();
            driver.let_go(pages);
        }
    });
    let subscription = match roll(3) {
        0 => {
            subscription.leave().wait().unwrap();
            None
        }
        1 => {
            // It may be fenced by now.
            let _ = subscription.replay().map(|done| done.wait());
            Some(subscription)
        }
        _ => Some(subscription),
    };
    driver.join().unwrap();
    device.join().unwrap();
    stop.store(true, Ordering::SeqCst);
    peer.join().unwrap();
    if let Some(subscription) = subscription {
        // The answer to the first call may have come when nobody waited for it.
        assert!(subscription.is_fenced() && endpoint.is_fenced());
        assert!(shadow.lock().unwrap().fenced);
    }
}

#[test]
fn failing_acks_fence_without_a_deadlock() {
    check(failing_acks);
}

/// Nobody waits for the answers of a replay.
fn failing_ack_of_a_replay() {
    let (_iommu, domain, endpoint) = domain_and_endpoint();
    domain.map(page_at(0, Gpa(0))).unwrap().wait().unwrap();
    let (mirror, shadow) = Exact::late();
    let stop = Arc::new(AtomicBool::new(false));
    let peer = peer(&shadow, &stop, drop);
    let mut subscription = endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    drop(subscription.filled());
    stop.store(true, Ordering::SeqCst);
    peer.join().unwrap();
    assert!(subscription.is_fenced() && shadow.lock().unwrap().fenced);
}

#[test]
fn ack_that_fails_when_nobody_waits_fences_all_the_same() {
    check(failing_ack_of_a_replay);
}
